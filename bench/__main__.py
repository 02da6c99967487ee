"""All benchmarks, one after the other in one process: `python -m bench --smoke` shows that they run.

    python -m bench [sinkhorn kmeans ...] [--smoke --device cuda --json FILE]

Flags go to each of them. A benchmark that fails does not stop the others; the exit status is 1 then.
For times start each in a process of its own: `python -m bench.sinkhorn`.
"""

import importlib
import pkgutil
import sys
import traceback

import bench

# What is no benchmark, and those that train for minutes: python -m bench.cifar_minutes.
SHARED = {"__main__", "measure", "compare", "processes", "reports"}
LONG = {"cifar_minutes", "lightly_swav"}


def names():
    """The benchmarks: what is in this folder but for what they share, and what takes minutes."""
    found = {module.name for module in pkgutil.iter_modules(bench.__path__)}
    return sorted(found - SHARED - LONG)


def main(argv):
    flags = argv[:]
    chosen = []
    while flags and not flags[0].startswith("-"):
        chosen.append(flags.pop(0))
    unknown = set(chosen) - set(names())
    if unknown:
        print(f"there is no benchmark {', '.join(sorted(unknown))}: take {', '.join(names())}")
        return 2
    failed = []
    for name in chosen or names():
        try:
            importlib.import_module(f"bench.{name}").main(flags)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
