"""Run a script of this repository on a Slurm cluster through submitit, or on this machine.

  python run_with_submitit.py main_swav.py --nodes 8 --ngpus 8 --partition learnfair \\
      --data_path /data/imagenet/train --dump_path runs/swav --nmb_crops 2 6

The first word is the script; if it is left out, main_dino.py for the --arch of a transformer, else
main_swav.py. Flags that are not below are the script's; its own parser, --arch and the paths of data
are checked before anything is submitted, and weights that are not there yet are said. A job that is
preempted or reaches its time limit is requeued and goes on from its checkpoint. Logs are in
<dump_path>/submitit/<job>.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

from src import dist
from src.data.datasets import NAMES
from src.data.shards import expand_shards
from src.evaluate.retrieval_sets import REVISITED
from src.nets.backbones import build_backbone, is_transformer
from src.nets.weights import LIBRARIES
from src.run import flags

ROOT = Path(__file__).resolve().parent
# Flags of the scripts that name what is read.
DATA = ("data_path", "train_path", "val_path", "data_root", "dataset", "whitening_path",
        "distractors_path", "label_list", "label_lists", "probe_data")  # fmt: skip
WEIGHTS = ("pretrained", "init_from", "linear_weights", "resume")
GB_PER_GPU = 40  # as in the published DINO launcher


# ============ what each task runs ============
class ScriptJob:
    """Calls main(argv) of a script; submitit pickles it and asks it for its successor."""

    def __init__(self, script: Path, argv: list[str], root: Path = ROOT):
        self.script, self.argv, self.root = str(script), argv, str(root)

    def __call__(self):
        sys.path[:0] = [self.root, str(Path(self.script).parent)]
        return load_script(self.script).main(self.argv)

    def __submitit_checkpoint__(self):
        """The job to run after a preemption or a timeout: the same, it finds its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    # submitit 1.5 requeues only what has a method of the older name, and calls the newer one.
    checkpoint = __submitit_checkpoint__


def load_script(path):
    """The module of a script, by path; ValueError if it is not one of ours."""
    path = Path(path).resolve()
    if getattr(sys.modules.get(path.stem), "__file__", None) == str(path):
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_parser") or not hasattr(module, "main"):
        raise ValueError(f"{path} has no get_parser() and main(argv): not a script to launch")
    return module


# ============ before submission ============
def take_script(words: list[str]) -> tuple[Path, list[str]]:
    """The script and its flags, from what the launcher's parser left over; says which if none is named."""
    if words and not words[0].startswith("-"):
        name, flags = words[0], words[1:]
    else:
        name, flags = choose_script(words), words
    for path in (Path(name), ROOT / name):
        if path.suffix == ".py" and path.is_file():
            return path.resolve(), flags
    scripts = sorted(path.name for kind in ("main", "eval") for path in ROOT.glob(f"{kind}_*.py"))
    raise ValueError(
        f"there is no script {name}; the first word must be one of {', '.join(scripts)}"
    )


def choose_script(words: list[str]) -> str:
    """The script that flags without a script are for, as in DINO's published commands; says which."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--arch", "-a", default="")
    arch = parser.parse_known_args(words)[0].arch
    if is_transformer(arch):
        name, reason = "main_dino.py", f"which trains --arch {arch}"
    else:
        name, reason = "main_swav.py", "the usual one"
    print(f"script:  {name}, {reason}; give another one as the first word")
    return name


def check_flags(script: Path, flags: list[str]):
    """The parsed flags; leaves with status 2 and a sentence if the script's parser refuses them."""
    parser = load_script(script).get_parser()
    parser.error = lambda message: parser.exit(2, f"error: {script.name}: {message}\n")
    return parser.parse_args(flags)


def check_arch(script: Path, args: argparse.Namespace) -> None:
    """Raise ValueError on an --arch that is not known, or that a script does not train."""
    arch = getattr(args, "arch", None)
    if not arch or getattr(args, "pretrained", ""):  # whose file says what is right
        return
    if is_transformer(arch) and "patch_size" not in args:
        raise ValueError(
            f"--arch {arch} is a vision transformer, which {script.name} does not train: use "
            "main_dino.py as the first word, or another --arch"
        )
    with torch.device("meta"):  # without its memory
        build_backbone(arch)


def check_data(args: argparse.Namespace) -> None:
    """Raise FileNotFoundError on a path of data that is not there; say which weights are not.

    A job that runs before may still make the weights.
    """
    for name in DATA:
        for path in paths_of(args, name):
            if path in (*NAMES, *REVISITED) or exists(path):
                continue
            if ".tar" in path:
                expand_shards(path, f"--{name}")
            else:
                raise FileNotFoundError(
                    f"--{name} {path} does not exist: give a path that is there on this machine and on all "
                    "nodes"
                )
    for name in WEIGHTS:
        for path in paths_of(args, name):
            if not path.startswith((*LIBRARIES, "http://", "https://")) and not exists(path):
                print(
                    f"WARNING: --{name} {path} does not exist on this machine: the job fails unless it is "
                    "there, for all nodes, when it begins"
                )


def paths_of(args: argparse.Namespace, name: str) -> list[str]:
    """The paths that a flag names, if the script has it: one, several, or NAME=PATH."""
    value = getattr(args, name, None)
    values = value if isinstance(value, list) else [value]
    paths = [x[1] if isinstance(x, tuple) else x for x in values]
    return [path for path in paths if path]


def exists(path: str) -> bool:
    """Whether there is a file or folder, also behind ~."""
    return os.path.exists(os.path.expanduser(path))


def choose_cluster(cluster: str | None) -> str:
    """slurm where there is a Slurm, else local; ValueError if slurm is asked for and not there."""
    missing = [program for program in ("sbatch", "srun") if shutil.which(program) is None]
    if cluster is None:
        if missing:
            print(f"{' and '.join(missing)} not on PATH: running on this machine (--cluster local)")
        return "local" if missing else "slurm"
    if cluster == "slurm" and missing:
        raise ValueError(f"--cluster slurm needs {' and '.join(missing)} on PATH")
    return cluster


# ============ executors ============
def slurm_executor(folder, args, name):
    """submitit's Slurm executor with all that sbatch shall get."""
    import submitit

    nodes, gpus = args.nodes or 2, 8 if args.ngpus is None else args.ngpus
    tasks = args.tasks or gpus
    constraints = [args.constraint, "volta32gb" if args.use_volta32 else None]
    executor = submitit.AutoExecutor(
        folder, cluster="slurm", slurm_max_num_timeout=args.max_num_timeout
    )
    executor.update_parameters(
        name=args.name or name,
        nodes=nodes,
        tasks_per_node=tasks,
        gpus_per_node=gpus or None,
        cpus_per_task=args.cpus,
        mem_gb=args.mem or GB_PER_GPU * max(1, gpus),
        timeout_min=args.timeout,
        stderr_to_stdout=True,
        slurm_signal_delay_s=args.signal_delay,
        # since Slurm 22.05 srun does not take over the batch job's --cpus-per-task
        slurm_srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={args.cpus}"],
        slurm_partition=args.partition,
        slurm_qos=args.qos,
        slurm_account=args.account,
        slurm_constraint="&".join(filter(None, constraints)) or None,
        slurm_comment=args.comment or None,
        slurm_additional_parameters={"requeue": True},
    )
    if shutil.which("scontrol") is None:
        print("scontrol is not on PATH here: a job can be requeued only where the nodes have it")
    return executor, f"{nodes} nodes of {tasks} processes and {gpus} GPUs"


def local_executor(folder, args, name):
    """submitit's executor for this machine: one process a GPU, or CPU processes without any."""
    import submitit

    if (args.nodes or 1) > 1:
        raise ValueError(f"--cluster local is one node; use --nodes 1 instead of {args.nodes}")
    gpus_here = dist.visible_gpus()
    wanted = len(gpus_here) if args.ngpus is None else args.ngpus
    if gpus_here and wanted > len(gpus_here):
        raise ValueError(f"--ngpus {wanted}: this machine has {len(gpus_here)} GPUs")
    gpus, tasks = min(wanted, len(gpus_here)), args.tasks or wanted or 1
    executor = submitit.LocalExecutor(folder, max_num_timeout=args.max_num_timeout)
    executor.update_parameters(
        tasks_per_node=tasks,
        gpus_per_node=gpus,
        visible_gpus=gpus_here[:gpus],
        timeout_min=args.timeout,
        signal_delay_s=args.signal_delay,
        stderr_to_stdout=True,
    )
    return executor, f"{tasks} processes and {gpus} GPUs on this machine"


EXECUTORS = {"slurm": slurm_executor, "local": local_executor}


def run_here(job: ScriptJob, args: argparse.Namespace) -> int:
    """Run the script in this very process; what it raises and returns is the launcher's."""
    if (args.nodes or 1) * (args.tasks or args.ngpus or 1) > 1:
        raise ValueError("--cluster debug is one process: use --nodes 1 --ngpus 1")
    print("cluster: debug, this process", flush=True)
    return job()


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Submit, and say where to look; wait for a local job. Returns the status, 1 if it failed.

    With --cluster debug the status is the script's.
    """
    args, words = get_parser().parse_known_args(argv)
    script, flags = take_script(words)
    script_args = check_flags(script, flags)
    check_arch(script, script_args)
    check_data(script_args)
    cluster = choose_cluster(args.cluster)
    job = ScriptJob(script, flags)
    if cluster == "debug":
        return run_here(job, args)
    try:
        from submitit.core.utils import FailedJobError
    except ImportError as error:
        raise ValueError("run_with_submitit.py needs submitit: pip install submitit") from error
    folder = Path(args.shared_dir or getattr(script_args, "dump_path", None) or ".") / "submitit"
    executor, size = EXECUTORS[cluster](folder.resolve() / "%j", args, script.stem)
    try:
        job = executor.submit(job)
    except FailedJobError as error:
        raise ValueError("sbatch refused the job, with the words above") from error
    print(f"cluster: {cluster}, {size}")
    print(f"job:     {job.job_id}")
    print(f"logs:    {job.paths.folder}")
    print(f"follow:  tail -F {job.paths.stdout}", flush=True)
    return 0 if cluster == "slurm" else wait_for(job, folder)


def wait_for(job, folder):
    """Wait for a local job, and show the end of its log if it failed."""
    try:
        job.wait()
        failures = [sub.exception() for sub in (job.task(i) for i in range(job.num_tasks))]
    except KeyboardInterrupt:
        job.cancel()
        raise
    finally:  # submitit makes it when a local job starts, and puts nothing into it
        with contextlib.suppress(OSError):
            (folder / "%j").rmdir()
    for rank, failure in enumerate(failures):
        if failure is not None:
            log = job.task(rank).paths.stdout
            end = log.read_text().strip().splitlines()[-12:] if log.exists() else []
            print(f"task {rank} failed; the end of {log}:", *end, sep="\n", file=sys.stderr)
            return 1
    print("done")
    return 0


def get_parser() -> flags.Parser:
    """The launcher's own flags."""
    parser = flags.Parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # None is no default to show
    add = parser.add_argument
    number, seconds = flags.positive(int), flags.at_least_zero(int)
    add("--cluster", choices=["debug", *sorted(EXECUTORS)], default=None,
        help="default: slurm where there is sbatch, else local; debug: in this process")  # fmt: skip
    add("--nodes", type=number, default=None, help="default: 2 under Slurm, else 1")
    add("--ngpus", type=seconds, default=None,
        help="GPUs and processes a node; default: 8 under Slurm, else all there are")  # fmt: skip
    add("--tasks", type=number, default=None, help="processes a node, if not one a GPU (CPU runs)")
    add(
        "--timeout",
        type=number,
        default=2800,
        help="minutes; then it is requeued (default: 2800)",
    )
    add(
        "--max_num_timeout",
        type=number,
        default=20,
        help="how often it may reach the limit (default: 20)",
    )
    add("--signal_delay", type=number, default=120, help="seconds to save in (default: 120)")
    add("--partition", default=None, help="Slurm partition")
    add("--qos", default=None, help="Slurm quality of service")
    add("--account", default=None, help="Slurm account")
    add("--constraint", default=None, help="Slurm constraint on the nodes")
    add("--use_volta32", action="store_true", help="same as --constraint volta32gb")
    add("--cpus", type=number, default=10, help="CPU cores a process, for the loader (default: 10)")
    add("--mem", type=number, default=None, help="GB a node; default: 40 for each GPU")
    add("--comment", default="", help="comment for the scheduler")
    add("--name", default=None, help="name of the job; default: that of the script")
    add("--shared_dir", default=None,
        help="folder for logs and job that all nodes see; default: --dump_path")  # fmt: skip
    return parser


if __name__ == "__main__":
    flags.run(main)
