"""Evaluate one network on several data sets, one after the other, and print one table.

    python scripts/transfer.py --pretrained runs/mine --sets places205=/data/places205 \
        inat18=/data/inat18 voc07=VOCdevkit/VOC2007 pets=/data/pets [--nproc_per_node 8]

The columns of SwAV's Tables 2 and 6 (arXiv:2006.09882): a set called places205 or inat18 is classified by
eval_linear.py with the protocol of that name, voc07 by eval_voc07.py --protocol svm, and any other by
eval_linear.py as it is. Other flags, such as --checkpoint_key teacher --workers 4, go to all of them.

Each evaluation has a folder of its own below --dump_path, by default transfer/ in the run's folder. The
table, of the last epoch of each training, is in transfer.md there, and transfer.jsonl has a line for
each set. The same command again goes on where it stopped. With --nproc_per_node torchrun starts as many
processes. Exit status: that of the first evaluation that fails or is stopped.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = {
    "places205": ["eval_linear.py", "--protocol", "places205"],
    "inat18": ["eval_linear.py", "--protocol", "inat18"],
    "voc07": ["eval_voc07.py", "--protocol", "svm"],
}
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, rest = parser.parse_known_args(argv)
    sets = dict(parse_set(text, parser) for text in args.sets)
    if len(sets) < len(args.sets):
        parser.error("--sets: two data sets have one name")
    folder = dump_folder(args)
    rows = []
    for name, path in sets.items():
        status = run(command(args, name, path, folder / name, rest))
        if status != 0:
            print(
                f"{name} ended with status {status}; the same command goes on with it",
                file=sys.stderr,
            )
            return status
        rows.append(result(name, path, folder / name))
    table = as_table(rows)
    (folder / "transfer.md").write_text(table)
    (folder / "transfer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"\n{table}\nwritten to {folder / 'transfer.md'}")
    return 0


def parse_set(text, parser):
    """(name, path) of name=path."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path or "/" in name:
        parser.error(f"--sets {text} must be name=path, such as places205=/data/places205")
    return name, path


def dump_folder(args):
    """Where the folders of the evaluations go."""
    if args.dump_path:
        return Path(args.dump_path)
    run_folder = Path(args.pretrained)
    if args.pretrained and run_folder.is_dir():
        return run_folder / "transfer"
    return Path("runs") / f"transfer_{run_folder.stem or 'untrained'}"


def command(args, name, path, folder, rest):
    """The words of the evaluation of a data set."""
    script, *flags = BY_NAME.get(name, ["eval_linear.py"])
    start = [sys.executable]
    if args.nproc_per_node > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc_per_node", str(args.nproc_per_node)]
    words = [*start, str(ROOT / script), *flags, "--data_path", path, "--dump_path", str(folder)]
    return [*words, *(["--pretrained", args.pretrained] if args.pretrained else []), *rest]


def run(words):
    """The exit status of a command, which gets the signals that come meanwhile."""
    process = subprocess.Popen(words)
    before = {}
    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None:
            before[number] = signal.signal(number, lambda number, _: process.send_signal(number))
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def result(name, path, folder):
    """What an evaluation has written, in one line."""
    if name == "voc07":
        found = json.loads((folder / "eval_voc07_svm.json").read_text())
        figures = {"metric": "mAP (interpolated)", "value": found["map_interpolated"]}
        figures["second"] = f"11-point {found['map_11points']:.2f}"
    else:
        found = json.loads((folder / "eval_linear.json").read_text())
        metric = "top-1" if "top1" in found else "mAP"
        second = "top5" if "top1" in found else "map_11points"
        first = "top1" if "top1" in found else "map"
        figures = {"metric": metric, "value": found[first]}
        best = found[f"best_{first}"]
        figures["second"] = (
            f"{second.replace('top5', 'top-5')} {found[second]:.2f}, best epoch {best:.2f}"
        )
    return {"data": name, "path": path, "protocol": found["settings"]["protocol"], **figures}


def as_table(rows):
    """The results in Markdown."""
    lines = ["| data | protocol | metric | % | |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['data']} | {row['protocol']} | {row['metric']} | {row['value']:.2f} | {row['second']} |"
        )
    return "\n".join(lines) + "\n"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sets", nargs="+", required=True, metavar="NAME=PATH", help="the data sets, in order")
    add("--pretrained", default="", help="a run's folder, a checkpoint, or a file of weights")
    add("--dump_path", default="", help="where the results go")
    add("--nproc_per_node", type=int, default=1, help="processes of each evaluation")
    return parser


if __name__ == "__main__":
    sys.exit(main())
