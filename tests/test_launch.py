"""What the Slurm scripts and run_with_submitit.py would run, and that they really run it."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_with_submitit
from tests.dist.test_process import ALLOCATION, fake_program

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
RECIPES = json.loads((GOLDEN / "official_recipes.json").read_text())
SCRIPTS = sorted((ROOT / "scripts").glob("swav_*_pretrain.sh"))
PUBLISHED = [
    path for path in SCRIPTS if f"swav/scripts/{path.name}" in RECIPES
]  # all but RN50-w5, of which no script was published


def load(script):
    return run_with_submitit.load_script(ROOT / script)


# ============ the Slurm scripts ============


def run_recipe(path, folder, **changes):
    """Run a script with a fake srun and scontrol: (argv of srun, its MASTER_* variables)."""
    record = folder / "argv"
    fake_program(
        folder,
        "srun",
        f'env | grep ^MASTER_ > {record}.env; for word; do printf "%s\\0" "$word"; done > {record}',
    )
    fake_program(folder, "scontrol", 'test "$3" = "gpu[001-008]" && seq -f "gpu%03g" 1 8')
    environ = ALLOCATION | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_CPUS_PER_TASK": "8",
        "DATASET_PATH": "/data/image net",
        "EXPERIMENT_PATH": "runs/a run",
    }
    run = subprocess.run(
        ["bash", path, "--seed", "7"],
        env={k: v for k, v in (environ | changes).items() if v is not None},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        return run
    masters = dict(line.split("=") for line in Path(f"{record}.env").read_text().split())
    return record.read_text().split("\0")[:-1], masters


def sbatch_lines(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    found = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(
        line.startswith("#SBATCH") for line in lines[first_command:]
    )  # Slurm stops there
    return found


def checked_arguments(path, script, folder, **environ):
    """The arguments that a launcher's command gives its script, once the command is right."""
    argv, masters = run_recipe(path, folder, **environ)
    assert argv[:4] == ["--label", "--kill-on-bad-exit=1", "--cpus-per-task=8", "python"]
    assert argv[4:6] == ["-u", script]
    args = load(script).get_parser().parse_args(argv[6:])
    assert args.data_path == "/data/image net" and args.dump_path == "runs/a run"
    assert args.seed == 7  # what is appended to the command wins
    assert masters == {"MASTER_ADDR": "gpu001", "MASTER_PORT": "14217"}
    lines = sbatch_lines(path)
    assert {"signal=USR1@120", "requeue", "open-mode=append"} <= set(lines)
    return args


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_srun_with_flags_that_its_parser_takes(path, tmp_path):
    checked_arguments(path, "main_swav.py", tmp_path)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_script_has_the_values_of_the_published_one(path, tmp_path):
    recipe = RECIPES[f"swav/scripts/{path.name}"]
    assert set(recipe["sbatch"]) <= set(sbatch_lines(path))
    published = []
    for flag, value in recipe["flags"].items():
        published += [f"--{flag}", *value.split()]
    parser = load("main_swav.py").get_parser()
    expected = vars(parser.parse_args(published))  # the published line is taken as it stands
    ours = vars(parser.parse_args(run_recipe(path, tmp_path)[0][6:]))
    different = {name for name in ours if ours[name] != expected[name]}
    assert different <= {"data_path", "dump_path", "dist_url", "seed", "sync_bn"}
    assert ours["sync_bn"] == "pytorch" and expected["sync_bn"] in ("apex", "pytorch")


def test_there_is_a_script_for_every_published_run():
    names = {path.name for path in SCRIPTS}
    assert {Path(name).name for name in RECIPES if name.startswith("swav/scripts/swav")} <= names
    assert len(PUBLISHED) == 9 and len(SCRIPTS) == 10


def test_the_widest_network_as_in_appendix_b2(tmp_path):
    path = ROOT / "scripts" / "swav_RN50w5_400ep_pretrain.sh"
    args = load("main_swav.py").get_parser().parse_args(run_recipe(path, tmp_path)[0][6:])
    assert "gpus=128" in sbatch_lines(path)
    assert (args.arch, args.epochs, args.batch_size * 128) == ("resnet50w5", 400, 1536)
    assert (args.queue_length, args.epoch_queue_starts) == (1536, 0)
    assert (args.nmb_crops, args.size_crops) == ([2, 4], [224, 96])
    assert (args.head_bn, args.base_lr, args.final_lr, args.wd) == (False, 4.8, 0.0048, 1e-6)
    assert args.freeze_prototypes_niters == 1281167 // 1536  # one epoch of ImageNet


@pytest.mark.parametrize("name", ["DATASET_PATH", "EXPERIMENT_PATH"])
def test_a_missing_path_is_asked_for(name, tmp_path):
    run = run_recipe(SCRIPTS[0], tmp_path, **{name: None})
    assert run.returncode != 0 and f"{name}: set it to" in run.stderr
    assert not (tmp_path / "argv").exists()


# ============ run_with_submitit.py ============

submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")
TASK = """
import argparse, os, time
from pathlib import Path
import torch
from src import dist
from src.run.stop import StopSignal, requeue_slurm_job

def get_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dump_path", default=".")
    parser.add_argument("--nmb_crops", type=int, nargs="+", default=[2])
    parser.add_argument("--fail", type=int, default=-1)
    parser.add_argument("--wait_for_signal", action="store_true")
    return parser

def main(argv=None):
    args = get_parser().parse_args(argv)
    process = dist.init("cpu", timeout=100)
    total = dist.all_reduce_sum(torch.tensor(process.rank + 1)).item()
    if process.rank == args.fail:
        raise RuntimeError("this task fails")
    folder = Path(args.dump_path)
    again = (folder / "stopped").exists()
    dist.barrier()
    stop = StopSignal()
    (folder / f"pid{process.rank}").write_text(str(os.getpid()))
    while args.wait_for_signal and not again:
        time.sleep(0.02)
        if stop.agreed():
            if process.rank == 0:
                (folder / "stopped").write_text(stop.name)
            dist.barrier()
            requeue_slurm_job(stop)
            dist.shutdown()
            return 1
    text = f"{process.launcher} {process.world_size} {total} {args.nmb_crops} {again}"
    (folder / f"rank{process.rank}").write_text(text)
    dist.shutdown()
    return 0
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "run").mkdir()
    return tmp_path / "task.py"


def launch(*words, path="", **environ):
    """Run the launcher as a user does, `path` in front of PATH."""
    environ = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} | environ
    environ["OMP_NUM_THREADS"] = "1"  # OpenMP complains on stderr of an empty one, say
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), *map(str, words)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=110)


@pytest.mark.slow
@submitit
def test_a_local_job_of_two_processes_really_runs(task, tmp_path):
    run = launch(
        task,
        "--nmb_crops",
        2,
        6,
        "--nodes",
        1,
        "--ngpus",
        2,
        "--timeout",
        5,
        "--dump_path",
        tmp_path / "run",
        "--cluster",
        "local",
        CUDA_VISIBLE_DEVICES="",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for rank in range(2):
        text = (tmp_path / "run" / f"rank{rank}").read_text()
        assert text == "submitit 2 3 [2, 6] False"
    job = re.search(r"job: +(\d+)", run.stdout).group(1)
    folder = tmp_path / "run" / "submitit" / job
    assert "cluster: local, 2 processes and 0 GPUs on this machine" in run.stdout
    assert f"logs:    {folder}" in run.stdout
    assert f"tail -F {folder / f'{job}_0_log.out'}" in run.stdout
    assert (folder / f"{job}_0_log.out").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [job]  # and no %j


@submitit
@pytest.mark.slow
def test_a_local_job_that_fails_shows_why(task, tmp_path):
    run = launch(task, "--fail", 0, "--ngpus", 1, "--dump_path", tmp_path / "run")
    assert run.returncode == 1
    assert "task 0 failed" in run.stderr and "this task fails" in run.stderr


@submitit
@pytest.mark.slow
def test_a_local_job_at_its_time_limit_is_run_again(task, tmp_path):
    run = launch(
        task,
        "--wait_for_signal",
        "--ngpus=2",
        f"--dump_path={tmp_path / 'run'}",
        "--timeout=1",
        "--signal_delay=35",  # the signal comes after 25 s: importing torch can take ten
        CUDA_VISIBLE_DEVICES="",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "run" / "stopped").read_text() == "SIGUSR2"
    assert (tmp_path / "run" / "rank1").read_text() == "submitit 2 3 [2] True"


# A Slurm of one node: sbatch copies the file it gets, srun starts two tasks.
SBATCH = 'cp "$1" {folder}/submitted.sh; echo Submitted batch job 4217'
SRUN = """
while [ "${{1#-}}" != "$1" ]; do
  case "$1" in --output) shift;; esac
  shift
done
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" >> {folder}/log$rank 2>&1 &
  pids="$pids $!"
done
status=0
for pid in $pids; do wait $pid || status=1; done
exit $status
"""


@pytest.fixture
def slurm(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir()
    fake_program(folder, "sbatch", SBATCH.format(folder=folder))
    fake_program(folder, "srun", SRUN.format(folder=folder))
    fake_program(folder, "scontrol", f'test "$1" = requeue && echo "$@" >> {folder}/requeued')
    return folder


def batch_environment(slurm):
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}
    job = {"SLURM_JOB_ID": str(4217), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "gpu001"}
    path = {"PATH": f"{slurm}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return os.environ | step | job | path | {"MASTER_PORT": str(20000 + os.getpid() % 9000)}


@pytest.mark.slow
@submitit
def test_what_is_submitted_to_slurm(task, tmp_path, slurm):
    run = launch(
        task,
        "--nodes",
        8,
        "--ngpus",
        8,
        "--timeout",
        2800,
        "--partition",
        "learnfair",
        "--use_volta32",
        "--comment",
        "for a paper",
        "--qos",
        "high",
        "--account",
        "vision",
        "--nmb_crops",
        2,
        6,
        "--dump_path",
        tmp_path / "run",
        "--cpus",
        8,
        "--mem",
        450,
        path=slurm,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = (slurm / "submitted.sh").read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    found = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    folder = tmp_path / "run" / "submitit"
    assert {
        "nodes=8", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=8", "time=2800",
        "mem=450GB", "partition=learnfair", "constraint=volta32gb", "comment='for a paper'",
        "qos=high", "account=vision", "signal=USR2@120", "requeue", "open-mode=append",
        "job-name=task", f"output={folder}/%j/%j_0_log.out",
    } <= found  # fmt: skip
    command = next(line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=1 --cpus-per-task=8" in command
    assert command.endswith(f"-m submitit.core._submit {folder}/%j")
    assert "job:     4217" in run.stdout and "cluster: slurm, 8 nodes of 8 processes" in run.stdout
    assert f"tail -F {folder}/4217/4217_0_log.out" in run.stdout


@submitit
@pytest.mark.slow
def test_a_preempted_slurm_job_saves_requeues_and_goes_on(task, tmp_path, slurm):
    launched = launch(
        task,
        "--wait_for_signal",
        "--nodes",
        1,
        "--ngpus",
        2,
        "--nmb_crops",
        2,
        4,
        "--dump_path",
        tmp_path / "run",
        path=slurm,
    )
    assert launched.returncode == 0, launched.stderr
    environ = batch_environment(slurm)
    batch = ["bash", str(slurm / "submitted.sh")]
    with subprocess.Popen(batch, env=environ, cwd=tmp_path) as job:
        pids = [tmp_path / "run" / f"pid{rank}" for rank in range(2)]
        deadline = time.time() + 60
        while not all(path.exists() and path.read_text() for path in pids):
            assert time.time() < deadline and job.poll() is None, (slurm / "log0").read_text()
            time.sleep(0.05)
        for path in pids:  # as Slurm does when it preempts a job
            os.kill(int(path.read_text()), signal.SIGTERM)
            os.kill(int(path.read_text()), signal.SIGUSR2)
        job.wait(60)
    log = (slurm / "log0").read_text()
    assert (slurm / "requeued").read_text() == "requeue 4217\n", log
    assert "Calling checkpoint method" in log
    assert (tmp_path / "run" / "stopped").read_text() == "SIGUSR2"
    assert not (tmp_path / "run" / "rank0").exists()
    subprocess.run(batch, env=environ, cwd=tmp_path, check=True, timeout=60)  # Slurm runs it again
    for rank in range(2):
        text = (tmp_path / "run" / f"rank{rank}").read_text()
        assert text == "submitit 2 3 [2, 4] True"


@submitit
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["main_foo.py"], "there is no script main_foo.py; the first word must be one of"),
        (["--nmb_cropz", "2"], "main_swav.py: unrecognized arguments: --nmb_cropz 2"),
        (["main_swav.py", "--nmb_crops", "two"], "--nmb_crops"),
        (["--nodes", "0", "main_swav.py"], "--nodes"),
        (["bench/measure.py"], "has no get_parser() and main(argv)"),
        (["--cluster", "local", "--nodes", "2"], "--cluster local is one node; use --nodes 1"),
        (["--cluster", "slurm"], "--cluster slurm needs sbatch and srun on PATH"),
        (["--cluster", "debug", "--nodes", "2"], "--cluster debug is one process"),
        (
            ["main_swav.py", "--arch", "vit_small"],
            "--arch vit_small is a vision transformer, which",
        ),
        (["main_swav.py", "--arch", "resnet51"], "--arch resnet51 is not known"),
        (["--arch", "vit_small", "--data_path", "/nowhere"], "--data_path /nowhere does not exist"),
        (["eval_knn.py", "--val_path", "nowhere"], "--val_path nowhere does not exist"),
        (
            ["eval_copy_detection.py", "--data_path", ".", "--whitening_path", "nowhere"],
            "--whitening_path nowhere does not exist",
        ),
        (["eval_image_retrieval.py", "--dataset", "oxford"], "--dataset oxford does not exist"),
        (["eval_semisup.py", "--label_list", "1.txt"], "--label_list 1.txt does not exist"),
        (["eval_linear.py", "--label_lists", ".", "1.txt"], "--label_lists 1.txt does not exist"),
        (["--probe_data", "pets=pets", "a=."], "--probe_data pets does not exist"),
        (["--data_path", "a-{0..9}.tar"], "--data_path: there is no tar shard a-0.tar"),
    ],
)
def test_bad_words_are_one_sentence_and_status_2(words, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_with_submitit.flags.run(lambda: run_with_submitit.main(words))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.pkl"))


@pytest.mark.parametrize(
    ("words", "name", "reason"),
    [
        (["--arch", "vit_small", "--epochs", "3"], "main_dino.py", "trains --arch vit_small"),
        (["--arch=xcit_small_12_p16"], "main_dino.py", "trains --arch xcit_small_12_p16"),
        (["-a", "deit_small"], "main_dino.py", "trains --arch deit_small"),
        (["--arch", "resnet50"], "main_swav.py", "the usual one"),
        ([], "main_swav.py", "the usual one"),
    ],
)
def test_without_a_script_the_arch_says_which_one_and_a_line_says_so(words, name, reason, capsys):
    script, flags = run_with_submitit.take_script(words)
    assert (script.name, flags) == (name, words)
    said = capsys.readouterr().out
    assert f"script:  {name}" in said and reason in said and said.count("\n") == 1
    run_with_submitit.take_script(["main_simclr.py"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("eval_knn.py --pretrained runs/later", "--pretrained runs/later"),
        ("main_swav.py --init_from weights.pth", "--init_from weights.pth"),
        ("eval_knn.py --pretrained runs", ""),
        ("eval_knn.py --pretrained none", ""),
        ("eval_knn.py --pretrained timm:resnet18", ""),
        ("eval_knn.py --pretrained https://host/a.pth", ""),
        ("eval_image_retrieval.py --dataset rparis6k --data_path .", ""),
        ("main_swav.py --data_path digits", ""),
    ],
)
def test_weights_that_are_not_there_yet_are_said_before_submission(
    words, missing, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    script, flags = run_with_submitit.take_script(words.split())
    run_with_submitit.check_data(run_with_submitit.check_flags(script, flags))
    expected = (
        f"WARNING: {missing} does not exist on this machine: the job fails unless it is there, for all "
        "nodes, when it begins\n"
    )
    assert capsys.readouterr().out == (expected if missing else "")


def test_a_job_in_this_process_gives_the_status_and_the_error_of_its_script(tmp_path, capsys):
    (tmp_path / "short.py").write_text(
        "import argparse\n"
        "def get_parser():\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--status', type=int)\n"
        "    return parser\n"
        "def main(argv=None):\n"
        "    status = get_parser().parse_args(argv).status\n"
        "    if status == 2:\n"
        "        raise ValueError('--status 2 is wrong')\n"
        "    return status\n"
    )
    words = [str(tmp_path / "short.py"), "--cluster", "debug", "--status"]
    for status in (0, 2, 143):
        with pytest.raises(SystemExit) as stop:
            run_with_submitit.flags.run(lambda: run_with_submitit.main([*words, str(status)]))  # noqa: B023
        assert stop.value.code == status
        error = capsys.readouterr().err
        assert error == ("error: --status 2 is wrong\n" if status == 2 else "")


@pytest.mark.slow
@submitit
def test_a_job_that_slurm_refuses_is_one_sentence(task, tmp_path, slurm):
    fake_program(slurm, "sbatch", "echo sbatch: error: invalid partition specified: x >&2; exit 1")
    run = launch(task, "--partition", "x", "--dump_path", tmp_path / "run", path=slurm)
    assert run.returncode == 2
    lines = run.stderr.splitlines()
    assert lines[0] == "sbatch: error: invalid partition specified: x"
    assert lines[1].startswith("error: sbatch refused the job") and len(lines) == 2


def test_without_submitit_the_user_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setitem(sys.modules, "submitit.core", None)
    monkeypatch.setitem(sys.modules, "submitit.core.utils", None)
    with pytest.raises(ValueError, match="pip install submitit"):
        run_with_submitit.main(["main_swav.py", "--cluster", "local"])


def test_the_flags_of_the_published_launcher_and_of_the_scripts_do_not_clash():
    flags = json.loads((GOLDEN / "official_flags.json").read_text())["dino/run_with_submitit.py"]
    ours = set(run_with_submitit.get_parser()._option_string_actions)
    assert {name for flag in flags for name in flag["flags"]} <= ours
    for path in [*ROOT.glob("main_*.py"), *ROOT.glob("eval_*.py")]:
        theirs = set(run_with_submitit.load_script(path).get_parser()._option_string_actions)
        assert ours & theirs == {"-h", "--help"}, path


def test_words_of_script_and_launcher_may_be_mixed():
    words = "main_swav.py --nmb_crops 2 6 --nodes 4 --epochs 3 --comment a --size_crops 24 12"
    args, left = run_with_submitit.get_parser().parse_known_args(words.split())
    script, flags = run_with_submitit.take_script(left)
    assert (script.name, args.nodes, args.comment) == ("main_swav.py", 4, "a")
    assert flags == "--nmb_crops 2 6 --epochs 3 --size_crops 24 12".split()
    assert run_with_submitit.take_script(["--epochs", "3"]) == (script, ["--epochs", "3"])
    assert run_with_submitit.check_flags(script, flags).nmb_crops == [2, 6]
