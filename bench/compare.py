"""Hold the ratios of a run against those that are kept in the tree, and name what fell.

    python -m bench.sinkhorn --json now.jsonl                  one or more benchmarks, into one file
    python -m bench.compare now.jsonl                          with bench/kept.json; status 1 if one fell
    python -m bench.compare now.jsonl --keep                   keep these from now on

A ratio is a column "times faster" of a table. It is compared with that of the same row of the same table on
the same kind of machine (processor and threads, or GPU): what was not kept for this machine is listed, and
is no failure. Of several runs in a file the best ratio counts, since other work on a machine lowers it.
"""

import argparse
import json
import sys
from pathlib import Path

KEPT = Path(__file__).parent / "kept.json"
COLUMN = "times faster"


def ratios_of(lines):
    """{machine: {"table | row": the best ratio}} of tables, lines of JSON."""
    found = {}
    for line in lines:
        table = json.loads(line)
        if COLUMN not in table["header"]:
            continue
        column = table["header"].index(COLUMN)
        ratios = found.setdefault(table["machine"], {})
        for row in table["rows"]:
            name = f"{table['title']} | {row[0]}"
            if isinstance(row[column], (int, float)):
                ratios[name] = max(row[column], ratios.get(name, 0.0))
    return found


def compare(now, kept, share):
    """(lines of text, names of what fell by more than `share`)."""
    lines, fell = [], []
    for machine, ratios in now.items():
        lines.append(machine)
        for name, ratio in ratios.items():
            before = kept.get(machine, {}).get(name)
            if before is None:
                lines.append(f"  {'-':>8}  {ratio:8.3g}  {name} (not kept yet)")
                continue
            has_fallen = ratio < (1 - share) * before
            fell += [name] if has_fallen else []
            lines.append(f"  {before:8.3g}  {ratio:8.3g}  {name}{'  FELL' if has_fallen else ''}")
    return lines, fell


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="of --json of the benchmarks")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where ratios are kept")
    parser.add_argument("--keep", action="store_true", help="keep those of the file, beside others")
    parser.add_argument("--share", type=float, default=0.2, help="that a ratio may fall by")
    args = parser.parse_args(argv)
    try:
        now = ratios_of(args.file.read_text().splitlines())
    except (OSError, ValueError, KeyError) as error:
        print(f"{args.file} holds no tables of --json: {error}", file=sys.stderr)
        return 2
    kept = json.loads(args.kept.read_text()) if args.kept.exists() else {}
    lines, fell = compare(now, kept, args.share)
    print("    kept       now")
    print("\n".join(lines))
    if args.keep:
        for machine, ratios in now.items():
            kept[machine] = {**kept.get(machine, {}), **ratios}
        args.kept.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(f"kept in {args.kept}")
        return 0
    if fell:
        print(f"fell by more than {100 * args.share:.0f} %: {'; '.join(fell)}")
    return 1 if fell else 0


if __name__ == "__main__":
    sys.exit(main())
