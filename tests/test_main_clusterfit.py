"""main_clusterfit.py as its users run it: both steps, resumed, killed, misused, on several processes."""

import json
import math
import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_knn
import main_clusterfit
from src.data.datasets import open_dataset
from src.labels.assignment_files import check_clusters, read_clusters, write_clusters
from src.labels.features import raw_pixels
from src.nets.convnets import build_convnet
from src.run.log import read_log
from tests.gloo import run_mains, start_mains
from tests.runs import images, losses, one_panel, signal_handlers
from tests.test_launch import load, run_recipe, sbatch_lines
from tests.test_main_dino import few_label_accuracy

pytestmark = pytest.mark.usefixtures(signal_handlers.__name__, one_panel.__name__)

ROOT = Path(__file__).parent.parent
SMALL = shlex.split(
    "--nmb_cluster 12 --niter 5 --arch resnet10 --width 0.125 --size_crops 8 --batch_size 128 "
    "--epochs 2 --lr 0.1 --decay_epochs 1 --gamma 0.5 --workers 0 --log_freq 1 --knn_freq 0 "
    "--no-tensorboard"
)


def train(folder, *argv):
    """Run main in this process: its status and the log by iteration."""
    status = main_clusterfit.main([*SMALL, "--dump_path", str(folder), *map(str, argv)])
    return status, losses(folder) if (Path(folder) / "log.jsonl").exists() else {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of both steps: folder and losses."""
    folder = tmp_path_factory.mktemp("whole")
    status, values = train(folder, "--knn_freq", "2")
    assert status == 0
    return folder, values


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Flags of two iterations of 10 images, for tests that are about something else."""
    folder = images(tmp_path_factory.mktemp("few") / "images", 20)
    argv = ["--data_path", folder, "--preset", "tiny", "--batch_size", 10, "--epochs", 1]
    return [*argv, "--nmb_cluster", 4]


# ============ the two steps ============
@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(whole):
    folder, values = whole
    assert sorted(values) == list(range(20))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("checkpoint.pth", "checkpoint.prev.pth", "checkpoints/ckp-2.pth"),
        *("log.jsonl", "train.log", "args.json", "plots/curves.png", "plots/crops.png"),
        *(f"clusters/{name}" for name in ("assignments.npy", "centroids.npy", "clusters.json")),
    }
    lines = [line for line in read_log(folder) if "knn" not in line]
    health = {
        "prediction_entropy",
        "accuracy",
        "prototypes_used",
        "embedding_std",
        "rankme",
        "unique",
    }
    assert all(health | {"gradient_norm", "data_share"} <= line.keys() for line in lines)
    assert 20 < read_log(folder)[-1]["knn"] <= 100
    assert [lines[i]["lr"] for i in (0, 10)] == [0.05, 0.025]  # of 0.1 for 256 images
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert state["method"] == "clusterfit" and state["model"]["top_layer.weight"].shape[0] == 12
    text = (folder / "train.log").read_text()
    assert "ln(K) = 2.485" in text and "no --pretrained: clusters of the pixels" in text
    assert re.search(r"clusters 12 of 1,297 images in .* NMI 0\.\d\d with the labels", text)


@pytest.mark.slow
def test_the_clusters_are_those_of_the_unit_rows_and_their_file_says_what_they_are(whole):
    folder = whole[0] / "clusters"
    summary = json.loads((folder / "clusters.json").read_text())
    assignments, centroids = (
        np.load(folder / f"{name}.npy") for name in ("assignments", "centroids")
    )
    rows = F.normalize(raw_pixels(open_dataset("digits"))[0].double(), dim=1)
    distances = torch.cdist(rows, torch.from_numpy(centroids).double())
    best = distances.min(1).values
    mine = distances[torch.arange(1297), torch.from_numpy(assignments)]
    torch.testing.assert_close(mine, best, atol=1e-6, rtol=0)
    assert summary["sizes"] == np.bincount(assignments, minlength=12).tolist()
    assert (summary["num_images"], summary["num_clusters"]) == (1297, 12)
    assert summary["settings"]["niter"] == 5 and 0.2 < summary["nmi_labels"] < 1


@pytest.mark.slow
def test_the_clusters_are_learned(whole):
    values = [whole[1][i] for i in range(20)]
    assert abs(values[0] - math.log(12)) < 0.3
    assert sum(values[-5:]) / 5 < math.log(12) - 0.4


def test_the_loss_is_the_cross_entropy_of_every_crop():
    scores = torch.randn(3 * 4, 5, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 2])
    logs = scores.log_softmax(1).view(3, 4, 5)
    expected = -sum(logs[v, i, labels[i]] for v in range(3) for i in range(4)) / 12
    assert main_clusterfit.clusterfit_loss(scores, labels).item() == pytest.approx(expected.item())


@pytest.mark.slow
def test_the_steps_one_after_the_other_equal_both(whole, tmp_path):
    assert train(tmp_path / "a", "cluster") == (0, {})
    assert not (tmp_path / "a" / "checkpoint.pth").exists()
    for name in ("assignments.npy", "centroids.npy"):
        path = tmp_path / "a" / "clusters" / name
        assert path.read_bytes() == (whole[0] / "clusters" / name).read_bytes()
    status, values = train(
        tmp_path / "b", "fit", "--clusters", tmp_path / "a" / "clusters", "--epochs", 1
    )
    assert status == 0
    assert values == {i: loss for i, loss in whole[1].items() if i < 10}


@pytest.mark.slow
def test_clusters_that_are_there_are_used_again_and_not_with_other_settings(few, tmp_path):
    train(tmp_path, "cluster", *few)
    path = tmp_path / "clusters" / "assignments.npy"
    before = path.stat().st_mtime_ns
    train(tmp_path, "cluster", *few)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="--niter 5, not 6"):
        train(tmp_path, "cluster", *few, "--niter", 6)
    assert train(tmp_path, "fit", *few, "--niter", 6)[0] == 0  # which makes no clusters
    with pytest.raises(ValueError, match="clusters of 20 images"):
        train(tmp_path, "fit")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_make_the_clusters_that_one_makes(tmp_path, world_size):
    argv = [*SMALL, "cluster", "--niter", "20"]
    assert train(tmp_path / "one", *argv)[0] == 0
    mains = start_mains("main_clusterfit", tmp_path / "several", argv, world_size)
    assert [main.wait() for main in mains] == [0] * world_size, mains[0].read()
    for name in ("assignments.npy", "centroids.npy"):
        found = [(tmp_path / x / "clusters" / name).read_bytes() for x in ("one", "several")]
        assert found[0] == found[1]


# ============ the teacher ============
@pytest.mark.slow
def test_the_teacher_is_the_network_of_a_run_with_its_own_images(whole):
    dataset = open_dataset("digits")
    features, indices = main_clusterfit.open_teacher(str(whole[0]), dataset)("cpu")
    assert features.shape == (1297, 64) and torch.equal(indices, torch.arange(1297))
    model = build_convnet("resnet10", 12, stem="small", width=0.125).eval()
    model.load_state_dict(torch.load(whole[0] / "checkpoint.pth", weights_only=True)["model"])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (dataset.mean, dataset.std))
    image = (dataset.load(5).float() / 255 - mean) / std  # 8 px, as its crops
    with torch.no_grad():
        torch.testing.assert_close(features[5], model.forward_backbone(image[None])[0])
    middle, _ = main_clusterfit.open_teacher(str(whole[0]), dataset, layer="trunk.layer2")("cpu")
    assert middle.shape == (1297, 16)


def test_any_method_and_torchvision_can_teach(few, tmp_path):
    from torchvision.models import get_model

    torch.save(get_model("squeezenet1_1").state_dict(), tmp_path / "squeezenet.pth")
    argv = [*few, "cluster", "--pretrained", tmp_path / "squeezenet.pth", "--nmb_cluster", 4]
    argv += ["--teacher_arch", "squeezenet1_1", "--layer", "trunk.features.3"]
    assert train(tmp_path / "a", *argv)[0] == 0
    settings = json.loads((tmp_path / "a" / "clusters" / "clusters.json").read_text())["settings"]
    assert settings["teacher_arch"] == "squeezenet1_1"
    centroids = np.load(tmp_path / "a" / "clusters" / "centroids.npy")
    assert centroids.shape == (4, 128)


# ============ going on ============
@pytest.mark.slow
def test_a_run_goes_on_to_the_last_bit_from_the_middle_and_the_end_of_an_epoch(
    whole, tmp_path, monkeypatch
):
    iterations = iter(range(100))
    with monkeypatch.context() as patch:
        must_stop = main_clusterfit.Run.must_stop

        def send_a_signal_now_and_then(self, done):
            if next(iterations) in (3, 9):
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop(self, done)

        patch.setattr(main_clusterfit.Run, "must_stop", send_a_signal_now_and_then)
        for _ in range(2):
            assert train(tmp_path)[0] == 128 + signal.SIGTERM
    status, values = train(tmp_path)
    assert status == 0 and values == whole[1]
    text = (tmp_path / "train.log").read_text()
    assert re.findall(r"continues from epoch (\d), iteration (\d)", text) == [
        *(("1", "4"), ("2", "0"))
    ]
    assert text.count("clusters 12 of 1,297 images in") == 1


@pytest.mark.slow
def test_a_signal_during_the_clustering_leaves_nothing_half_done(few, tmp_path, monkeypatch):
    before, compute = signal.getsignal(signal.SIGUSR1), main_clusterfit.initial_centroids

    def signalled(*args, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        return compute(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(main_clusterfit, "initial_centroids", signalled)
        patch.setattr(main_clusterfit, "write_clusters", None)  # is not called any more
        assert train(tmp_path, *few)[0] == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before
    assert {path.name for path in tmp_path.iterdir()} == {"train.log"}
    assert train(tmp_path, *few)[0] == 0


@pytest.mark.slow
def test_a_signal_during_the_features_means_what_it_meant_before(few, tmp_path, monkeypatch):
    def handler(*_):
        raise SystemExit(99)

    before = signal.signal(signal.SIGUSR1, handler)
    with monkeypatch.context() as patch:
        patch.setattr(
            main_clusterfit, "raw_pixels", lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR1)
        )
        with pytest.raises(SystemExit, match="99"):
            train(tmp_path, *few)
    signal.signal(signal.SIGUSR1, before)
    assert not (tmp_path / "clusters.npy").exists()
    assert train(tmp_path, *few)[0] == 0


@pytest.mark.slow
def test_two_processes_equal_one_and_another_number_takes_the_run_over(tmp_path):
    """Small steps, as float32 alone moves a gradient; without photometry, which is drawn by rank."""
    argv = ["--lr", 0.01, "--epochs", 2, "--color_jitter", 0]
    _, expected = train(tmp_path / "one", *argv)
    half = [*SMALL, *argv, "--batch_size", 64]
    run_mains("main_clusterfit", tmp_path / "two", half, 2)
    run_mains("main_clusterfit", tmp_path / "mixed", [*half, "--epochs", 1], 2)
    assert train(tmp_path / "mixed", *argv)[0] == 0
    for name in ("two", "mixed"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=2e-3)
        read = [read_clusters(tmp_path / x / "clusters")[0] for x in ("one", name)]
        assert torch.equal(*read)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_clusters(few, tmp_path):
    train(tmp_path, *few)
    train(tmp_path / "b", "cluster", *few, "--seed", 5)
    with pytest.raises(ValueError, match="a run on other clusters"):
        train(tmp_path, "fit", *few, "--epochs", 2, "--clusters", tmp_path / "b" / "clusters")


# ============ files of clusters ============
SUMMARY = {"settings": {"niter": 3}, "num_images": 4, "num_clusters": 2}


def test_clusters_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, rows = tmp_path / "clusters", torch.tensor([0, 1, 1, 0])
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda path, array: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(ValueError, match="--clusters .* cannot be written: full"):
            write_clusters(folder, rows, torch.zeros(2, 3), SUMMARY)
    assert not list(tmp_path.iterdir()) and not check_clusters(folder, 4)
    write_clusters(folder, rows, torch.zeros(2, 3), SUMMARY)
    assert check_clusters(folder, 4, {"niter": 3, "later": 1})
    found, num_clusters = read_clusters(folder)
    assert torch.equal(found, rows) and num_clusters == 2
    with pytest.raises(ValueError, match="cannot be written"):
        write_clusters(folder, rows, torch.zeros(2, 3), SUMMARY)
    assert [path.name for path in tmp_path.iterdir()] == ["clusters"]


@pytest.mark.slow
def test_clusters_of_images_with_other_names_are_refused(tmp_path, few):
    folder = images(tmp_path / "images", 20)
    argv = [*few, "--data_path", folder, "--clusters", tmp_path / "clusters"]
    assert train(tmp_path / "one", *argv)[0] == 0
    (folder / "00003.jpg").rename(folder / "1.jpg")
    with pytest.raises(ValueError, match="--clusters .* images with other names"):
        train(tmp_path / "two", "fit", *argv)
    with pytest.raises(OSError, match="images of other names"):
        summary = tmp_path / "clusters" / "clusters.json"
        summary.write_text(summary.read_text().replace("images_digest", "unknown"))  # an older file
        train(tmp_path / "one", *argv)


@pytest.mark.parametrize("damage", ["json", "npy", "range", "shape"])
def test_damaged_files_are_named(tmp_path, damage):
    rows = {"range": torch.tensor([0, 1, 2, 0]), "shape": torch.zeros(3, dtype=torch.int64)}
    folder = tmp_path / "clusters"
    write_clusters(folder, rows.get(damage, torch.zeros(4).long()), torch.zeros(2, 3), SUMMARY)
    if damage == "json":
        (folder / "clusters.json").write_text("{")
    if damage == "npy":
        (folder / "assignments.npy").write_bytes(b"\x93NUMPY")
    name = "clusters.json" if damage == "json" else "assignments.npy"
    with pytest.raises(ValueError, match=f"--clusters: .*{name}"):
        read_clusters(folder)


# ============ options, and what can go wrong ============
@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        "--arch alexnet --width 0.02 --size_crops 64 --sobel true --momentum 0.5",
        "--nmb_crops 1 2 --size_crops 12 8 --min_scale_crops 0.4 0.2 --max_scale_crops 1 0.5",
        "--in_chans 1 --decay_epochs --lr_scaling none --precision bf16 --seed 3",
    ],
)
def test_every_option_trains(few, tmp_path, argv):
    status, values = train(tmp_path, *few, *argv.split())
    assert status == 0 and len(values) == 2
    assert all(0 < loss < 5 for loss in values.values())


def test_faiss_makes_clusters_too(few, tmp_path):
    pytest.importorskip("faiss")
    assert train(tmp_path, "cluster", *few, "--kmeans_backend", "faiss")[0] == 0


@pytest.mark.slow
def test_the_evaluation_takes_the_runs_own_arguments(whole, tmp_path, capsys):
    assert eval_knn.main(["--pretrained", str(whole[0]), "--dump_path", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "missing: none; left over: top_layer.bias, top_layer.weight; wrong shape: none" in text


@pytest.mark.slow
def test_a_run_that_learns_nothing_is_named_while_it_happens(few, tmp_path, capsys):
    weights = build_convnet("resnet10", 4, stem="small", width=0.125).state_dict()
    weights["top_layer.weight"].zero_()
    torch.save(weights, tmp_path / "flat.pth")
    argv = (*few, "--batch_size", 2, "--lr", 1e-12, "--init_from", tmp_path / "flat.pth")
    train(tmp_path / "said", *argv)
    text = capsys.readouterr().out
    assert "WARNING: the loss stays at ln(K) = 1.386" in text and "(--nmb_cluster)" in text
    with pytest.raises(main_clusterfit.flags.RunError, match="--lr"):
        train(tmp_path / "stopped", *argv, "--abort_on_collapse")


@pytest.mark.slow
def test_digits_are_learned_without_labels(tmp_path):
    """A sixth of the bare command's epochs."""
    trained, untrained = few_label_accuracy(main_clusterfit.main, tmp_path, "--epochs", 10)
    assert trained > untrained + 10, (trained, untrained)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("train", "'train'"),
        ("fit", "holds no clusters"),
        ("--nmb_cluster 3000", "--nmb_cluster 3000 is more"),
        ("--nmb_cluster 0", "--nmb_cluster"),
        ("--layer layer4", "--layer layer4 needs --pretrained"),
        ("--preset imagenet --nmb_cluster 12", "--data_path digits needs --pretrained"),
        ("--pretrained /nowhere", "/nowhere"),
        ("--clusters {file}/clusters", "cannot be written"),
        ("--batch_size 5000", "--batch_size 5000"),
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--dump_path {file}", "--dump_path"),
        ("--lr 0", "--lr"),
        ("--arch nothing", "--arch nothing"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, argv, words):
    (tmp_path / "file").write_text("")
    argv = argv.format(file=tmp_path / "file").split()
    with pytest.raises(SystemExit) as stop:
        main_clusterfit.flags.run(
            lambda: main_clusterfit.main([*SMALL, "--dump_path", str(tmp_path / "run"), *argv])
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.strip().count("\n") == 0, error
    assert not list(tmp_path.glob("run/*.pth"))


# ============ the launcher ============
def test_the_launcher_runs_the_published_recipe(tmp_path):
    path = ROOT / "scripts" / "clusterfit_resnet50.sh"
    argv, _ = run_recipe(path, tmp_path, TEACHER="runs/a teacher")
    assert argv[3:6] == ["python", "-u", "main_clusterfit.py"]
    args = load("main_clusterfit.py").get_parser().parse_args(argv[6:])
    assert {"gpus=8", "nodes=1", f"job-name={path.stem}"} <= set(sbatch_lines(path))
    assert args.pretrained == "runs/a teacher" and args.step == "both"
    assert (args.nmb_cluster, args.niter, args.arch) == (16000, 50, "resnet50")
    assert (args.batch_size * 8, args.lr, args.wd, args.momentum) == (256, 0.1, 1e-4, 0.9)
    assert (args.lr_scaling, args.lr_reference_batch) == ("linear", 256)
    assert (args.epochs, args.decay_epochs, args.gamma) == (105, [30, 60, 90, 100], 0.1)
    assert (args.color_jitter, args.jitter_prob) == ([0.4, 0.4, 0.4, 0.2], 1.0)
    run = run_recipe(path, tmp_path)
    assert run.returncode != 0 and "TEACHER: set it to" in run.stderr
