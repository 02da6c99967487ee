"""Compare methods on CIFAR-10: the same small network and epochs, every evaluation, several seeds.

For each method and seed a network is trained, and evaluated by k-NN, a linear classifier, logistic
regression, fine-tuning on 1 %, 10 % and all of the labels, and clustering; beside them the untrained
network, whose fine-tuned figures are those from scratch. All figures are of the test images, of the last
epoch of each, with settings that are the same for all methods; nothing is chosen on them.

    python scripts/compare_methods.py --data_path cifar10_folder              two hours of two cores
    python scripts/compare_methods.py --data_path cifar10_folder --full       100 epochs, for a GPU

One chain of commands a core runs at a time. Each result is a line of --out/results.jsonl as it comes, and
--out/results.md is the table, mean and standard deviation over seeds. What is there is not done again:
the same command goes on where it was stopped, in the middle of a training too. A step that fails is said,
the others go on, and the exit status is 1.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNTRAINED = "untrained"
NETWORK = "--arch resnet18 --stem small --width {width}"
# Learning rates and all else are of --preset cifar, which was chosen on the training images.
TRAINING = f"{NETWORK} --preset cifar --epochs {{epochs}} --knn_freq 0 --workers {{workers}} --no-tensorboard"
CROPS = "--size_crops {size} {small_size}"
METHODS = {
    "swav": f"main_swav.py {CROPS}",
    "dino": "main_dino.py --global_crops_size {size} --local_crops_size {small_size} "
    "--warmup_epochs 1 --lr 0.002",
    "deepclusterv2": f"main_deepclusterv2.py {CROPS}",
    "simclr": f"main_simclr.py {CROPS}",
    "rotnet": "main_rotnet.py --size_crops {size}",
}
NAMES = {
    "swav": "SwAV",
    "dino": "DINO",
    "deepclusterv2": "DeepCluster-v2",
    "simclr": "SimCLR",
    "rotnet": "RotNet",
    UNTRAINED: "untrained network",
}
IMAGES = "--size {size} --workers {workers}"
# name: (command, file of the result, its title). Of classifiers the last epoch counts, not the best.
EVALUATIONS = {
    "knn": (f"eval_knn.py {IMAGES} --nb_knn 20", "eval_knn.json", "k-NN"),
    "linear": (
        f"eval_linear.py {IMAGES} --cache_features --epochs 20",
        "eval_linear.json",
        "linear",
    ),
    "logistic": (
        f"eval_linear.py {IMAGES} --solver lbfgs",
        "eval_logistic.json",
        "logistic",
    ),
    "1percent": (
        f"eval_semisup.py {IMAGES} --labels_perc 1 --val_freq 20",
        "eval_semisup_1percent.json",
        "1 % of labels",
    ),
    "10percent": (
        f"eval_semisup.py {IMAGES} --labels_perc 10 --val_freq 20",
        "eval_semisup_10percent.json",
        "10 % of labels",
    ),
    "finetune": (
        f"eval_finetune.py {IMAGES} --protocol resnet --epochs {{finetune_epochs}} "
        "--val_freq {finetune_epochs}",
        "eval_finetune.json",
        "all labels",
    ),
    "clusters": (
        f"visualize.py clusters {IMAGES} --split val --num_clusters 10 --neighbours 0",
        "clusters.json",
        "10 clusters",
    ),
}


# ============ steps ============
class Comparison:
    """The steps of all methods and seeds, what they gave, and where that is written."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.file, self.lock = self.out / "results.jsonl", threading.Lock()
        self.start, self.running, self.stopped = time.monotonic(), set(), False
        self.done = {}
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
                    result = json.loads(line)
                    self.done[result["method"], result["seed"], result["step"]] = result
        self.chains = [
            (method, seed) for seed in range(args.seeds) for method in [*args.methods, UNTRAINED]
        ]
        self.num_steps = sum(len(self.steps_of(*chain)) for chain in self.chains)
        self.check_commands()
        self.failed = 0

    def check_commands(self):
        """ValueError where --out holds a result of another command: other settings are not one table."""
        for method, seed in self.chains:
            for name, command, _ in self.steps_of(method, seed):
                found = self.done.get((method, seed, name))
                if found and found["command"] != command:
                    raise ValueError(
                        f"--out {self.out} holds {name} of {method} by another command "
                        f"({found['command']}): use another --out"
                    )

    def steps_of(self, method, seed):
        """(name, command, file of the result) of each step of a chain, in order."""
        args, folder = self.args, self.out / f"{method}_{seed}"
        values = {
            "width": args.width,
            "size": args.size,
            "small_size": args.size // 2,
            "epochs": args.epochs,
            "workers": args.workers,
            "finetune_epochs": args.finetune_epochs,
        }
        steps = []
        shared = f"--data_path {shlex.quote(args.data_path)} --seed {seed} --device {args.device}"
        if method != UNTRAINED:
            command = (
                f"{METHODS[method]} {TRAINING} {shared} --dump_path {shlex.quote(str(folder))}"
            )
            steps.append(("train", command.format(**values), "checkpoint.pth"))
        source = f"--pretrained {shlex.quote(str(folder))}"
        if method == UNTRAINED:
            source = f"{NETWORK} --dump_path {shlex.quote(str(folder))}"
        for name in args.evaluations:
            command, file, _ = EVALUATIONS[name]
            if name == "clusters" and method != UNTRAINED:  # with the pictures of the run
                file = f"plots/clusters/{file}"
            steps.append((name, f"{command} {shared} {source}".format(**values), file))
        return steps

    def run_chain(self, method, seed):
        """Run what is left of a chain; a step after a failed training is left out."""
        folder = self.out / f"{method}_{seed}"
        folder.mkdir(exist_ok=True)
        for name, command, file in self.steps_of(method, seed):
            if (method, seed, name) in self.done:
                continue
            if self.stopped:
                return
            seconds, status = self.run(command, folder / f"{name}.log")
            if self.stopped:
                return
            result = {"method": method, "seed": seed, "step": name, "seconds": round(seconds, 1)}
            if status == 0 and name != "train":
                try:
                    result["value"] = figure(name, folder / file)
                except (OSError, ValueError, LookupError):  # the log may say why
                    status = 1
            if status:
                with self.lock:
                    self.failed += 1
                self.say(f"FAILED {method} seed {seed} {name}: see {folder / f'{name}.log'}")
                if name == "train":
                    return
                continue
            self.add({**result, "command": command})

    def run(self, command, log):
        """(seconds, exit status) of a command of one core, whose output goes to a file."""
        start, environment = time.monotonic(), os.environ.copy()
        if self.args.device == "cpu":
            environment |= {"OMP_NUM_THREADS": "1"}
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, *shlex.split(command)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with self.lock:
                self.running.add(process)
            if self.stopped:
                process.send_signal(signal.SIGTERM)
            status = process.wait()
            with self.lock:
                self.running.discard(process)
        return time.monotonic() - start, status

    def add(self, result):
        """Keep a result, write the table, and say how far it is."""
        with self.lock:
            self.done[result["method"], result["seed"], result["step"]] = result
            with self.file.open("a") as file:
                file.write(json.dumps(result) + "\n")
            (self.out / "results.md").write_text(table(self.done, self.args))
        value = f" {result['value']:.2f}" if "value" in result else ""
        self.say(f"{result['method']} seed {result['seed']} {result['step']}{value}")

    def say(self, text):
        """A line on the screen: steps done, time since the start."""
        minutes = (time.monotonic() - self.start) / 60
        print(f"{len(self.done)}/{self.num_steps} {minutes:.1f} min  {text}", flush=True)

    def stop(self, number, frame):
        """End all commands, each of which saves first; the same command goes on from there."""
        self.stopped = True
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)


def figure(name, path):
    """The figure in per cent of an evaluation's file."""
    result = json.loads(path.read_text())
    if name in ("knn", "logistic"):
        return result["results"][0]["top1"]
    return 100 * result["accuracy"] if name == "clusters" else result["top1"]


# ============ the table ============
def table(done, args):
    """A Markdown table of mean and standard deviation (of a sample) over the seeds that are done."""
    titles = [EVALUATIONS[name][2] for name in args.evaluations]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for method in [*args.methods, UNTRAINED]:
        cells = []
        for name in args.evaluations:
            values = [
                done[method, seed, name]["value"]
                for seed in range(args.seeds)
                if (method, seed, name) in done
            ]
            cells.append(mean_and_spread(values, args.seeds))
        lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_and_spread(values, wanted):
    """ "53.1 ± 0.4", with the number of values where some are missing; "-" without any."""
    if not values:
        return "-"
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return text if len(values) == wanted else f"{text} (n = {len(values)})"


# ============ main ============
def main(argv=None):
    """Run what is left; returns 0, 1 where a step failed, or 130 after a signal."""
    args = parse_args(argv)
    try:
        comparison = Comparison(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), comparison.stop)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        chains = [pool.submit(comparison.run_chain, *chain) for chain in comparison.chains]
        for chain in chains:
            chain.result()
    print(table(comparison.done, args))
    if comparison.stopped:
        print("stopped; the same command goes on")
        return 130
    return 1 if comparison.failed else 0


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--data_path", required=True, help="a folder with train/ and val/ or test/, or a named set")
    add("--out", default="runs/compare_methods", help="folder of everything")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--evaluations", nargs="+", choices=EVALUATIONS, default=list(EVALUATIONS))
    add("--seeds", type=int, default=3, help="runs of each method")
    add("--epochs", type=int, default=2, help="of training without labels")
    add("--finetune_epochs", type=int, default=1, help="of fine-tuning on all labels")
    add("--width", type=float, default=0.25, help="of the ResNet-18, as a multiple")
    add(
        "--size",
        type=int,
        default=20,
        help="of large crops and evaluated images; small crops: half",
    )
    add(
        "--full",
        action="store_true",
        help="100 epochs, 50 of fine-tuning, the whole width, crops of 32 pixels",
    )
    add("--device", default="cpu", help="cpu or cuda")
    add(
        "--jobs",
        type=int,
        default=None,
        help="commands at a time (default: one a core; one on a GPU)",
    )
    args = parser.parse_args(argv)
    if args.full:
        parser.set_defaults(epochs=100, finetune_epochs=50, width=1.0, size=32)
        args = parser.parse_args(argv)
    if args.jobs is None:
        args.jobs = cores if args.device == "cpu" else 1
    args.workers = 0 if args.device == "cpu" else max(1, cores - 1)
    if Path(args.data_path).exists():
        args.data_path = str(Path(args.data_path).resolve())
    args.out = str(Path(args.out).resolve())
    return args


if __name__ == "__main__":
    sys.exit(main())
