"""main_deepcluster.py and main_deepercluster.py as their users run them: bare, resumed, killed, misused."""

import importlib
import math
import os
import re
import shlex
import signal
import tarfile

import numpy as np
import pytest
import torch

from src.labels import two_level
from src.run import flags
from src.run.log import read_log
from tests.gloo import kill_mains, run_mains, start_mains
from tests.runs import images, losses, one_panel, signal_handlers, wait_for_lines
from tests.test_main_dino import few_label_accuracy

pytestmark = pytest.mark.usefixtures(signal_handlers.__name__, one_panel.__name__)

METHODS = ["deepcluster", "deepercluster"]
SMALL = shlex.split(
    "--arch resnet10 --width 0.125 --stem small --size_crops 12 --k 12 --dim_pca 16 "
    "--batch_size 128 --epochs 2 --lr 0.02 --workers 0 --log_freq 1 --knn_freq 0 --no-tensorboard "
)
OF_METHOD = {
    "deepcluster": ["--reassign", "1", "--niter", "5"],
    "deepercluster": ["--reassignment", "1", "--niter", "5", "--super_classes", "8"],
}
TINY = ["--preset", "tiny", "--batch_size", 48]  # for images in folders and shards
both, slow = pytest.mark.parametrize("method", METHODS), pytest.mark.slow


def script(method):
    return importlib.import_module(f"main_{method}")


def arguments(method, *argv):
    return [*SMALL, *OF_METHOD[method], *map(str, argv)]


def train(method, folder, *argv):
    """Run main in this process: its status and the losses by iteration."""
    argv = arguments(method, "--dump_path", folder, *argv)
    return script(method).main(argv), losses(folder)


def assignments(folder):
    return [line for line in read_log(folder) if "assignment_seconds" in line]


def state_of(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def labels_of(folder):
    return state_of(folder)["method_state"]["pseudo_labels"]["labels"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by method: folder and losses."""
    found = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        status, values = train(method, folder, "--knn_freq", "2")
        assert status == 0
        found[method] = folder, values
    return found


@pytest.mark.slow
@both
def test_a_run_leaves_what_the_readme_promises(whole, method):
    folder, values = whole[method]
    assert sorted(values) == list(range(20))
    lines = [line for line in read_log(folder) if "loss" in line]
    wanted = {
        "prediction_entropy",
        "accuracy",
        "prototypes_used",
        "embedding_std",
        "rankme",
        "unique",
    }
    assert all(wanted | {"gradient_norm", "eta_seconds"} <= line.keys() for line in lines)
    first, second = assignments(folder)
    assert (first["epoch_float"], second["epoch_float"]) == (0, 1)
    assert "nmi_previous" not in first and 0 < second["nmi_previous"] < 1
    for line in (first, second):
        assert 0 < line["nmi_labels"] < 1 and line["cluster_min"] <= line["cluster_median"]
    state = state_of(folder)["method_state"]["pseudo_labels"]
    assert state["labels"].shape == ({"deepcluster": 1, "deepercluster": 2}[method], 1297)
    assert state["epoch"] == 1 and state["labels"].min() == 0
    assert (folder / "plots" / "curves.png").exists() and (folder / "plots" / "crops.png").exists()
    assert not (folder / "clustering").exists()  # its files are as large as the data
    text = (folder / "train.log").read_text()
    assert "is the loss of predicting nothing" in text
    assert re.search(r"epoch 2/2 clusters 12 of 1,297 images in .* NMI 0\.\d\d with the", text)


@pytest.mark.slow
@both
def test_the_classifier_is_new_after_each_clustering(whole, method, tmp_path, monkeypatch):
    from src.nets.top_layer import TopLayer

    sizes, reset = [], TopLayer.reset

    def spying(layer, number, generator=None):
        reset(layer, number, generator)
        sizes.append((number, layer.weight.std().item()))

    monkeypatch.setattr(TopLayer, "reset", spying)
    train(method, tmp_path, "--log_freq", 100, "--epochs", 1)
    made = 1 if method == "deepcluster" else 9  # V and 8 classifiers of sub-classes
    assert len(sizes) == 2 * made  # when built, and anew
    assert all(0.007 < std < 0.013 for _, std in sizes)


@pytest.mark.slow
@both
def test_a_run_goes_on_to_the_last_bit_from_the_middle_and_the_end_of_an_epoch(
    whole, tmp_path, monkeypatch, method
):
    iterations = iter(range(100))
    with monkeypatch.context() as patch:
        run = script(method).Run
        must_stop = run.must_stop

        def send_a_signal_now_and_then(self, done):
            if next(iterations) in (3, 10, 16):
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop(self, done)

        patch.setattr(run, "must_stop", send_a_signal_now_and_then)
        for _ in range(3):
            assert train(method, tmp_path)[0] == 128 + signal.SIGTERM
    status, values = train(method, tmp_path)
    assert status == 0 and values == whole[method][1]
    expected = [{k: v for k, v in x.items() if "seconds" not in k} for x in assignments(tmp_path)]
    found = assignments(whole[method][0])
    assert expected == [{k: v for k, v in x.items() if "seconds" not in k} for x in found]


@pytest.mark.slow
def test_a_run_killed_inside_the_clustering_goes_on_there(whole, tmp_path, monkeypatch):
    kmeans, calls = two_level.euclidean_kmeans, []

    def dies_in_the_second_level(*args, **options):
        calls.append(options["first_step"])
        if len(calls) == 5:  # the second of the second assignment: inside its first cluster
            inner = options["on_step"]

            def step(number, centroids):
                inner(number, centroids)
                if number == 2:
                    raise KeyboardInterrupt

            options["on_step"] = step
        return kmeans(*args, **options)

    monkeypatch.setattr(two_level, "euclidean_kmeans", dies_in_the_second_level)
    with pytest.raises(KeyboardInterrupt):
        train("deepercluster", tmp_path)
    assert (tmp_path / "clustering" / "super.npy").exists()
    status, values = train("deepercluster", tmp_path)
    assert status == 0 and values == whole["deepercluster"][1]
    assert calls == [0, 0, 0, 0, 0, 3, 0]  # features, first level and three iterations were kept
    text = (tmp_path / "train.log").read_text()
    assert "continues the clustering in" in text
    assert torch.equal(labels_of(tmp_path), labels_of(whole["deepercluster"][0]))


@slow
@pytest.mark.parametrize("moment", ["features", "k-means"])
def test_deepcluster_leaves_its_clustering_at_once(whole, tmp_path, monkeypatch, moment):
    deepcluster = script("deepcluster")
    name = "extract_features" if moment == "features" else "euclidean_kmeans"
    work, asked = getattr(deepcluster, name), []

    def signalled(*args, **options):
        if len(asked) == 0:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return work(*args, **options)

    monkeypatch.setattr(deepcluster, name, signalled)
    assert train("deepcluster", tmp_path)[0] == 128 + signal.SIGTERM
    assert not (tmp_path / "checkpoint.pth").exists()
    status, values = train("deepcluster", tmp_path)
    assert status == 0 and values == whole["deepcluster"][1]


@pytest.mark.slow
def test_another_number_of_images_is_refused_on_resume(tmp_path, capsys):
    folder = images(tmp_path / "images", 130)
    argv = ("--data_path", folder, *TINY, "--size_dataset", 100)
    assert train("deepercluster", tmp_path / "run", *argv, "--epochs", 1)[0] == 0
    (folder / "00003.jpg").unlink()
    with pytest.raises(SystemExit) as stop:
        argv = arguments("deepercluster", "--dump_path", tmp_path / "run", *argv)
        flags.run(lambda: script("deepercluster").main(argv))
    assert stop.value.code == 2
    assert "pseudo-labels are of 130 images, and --data_path has 129" in capsys.readouterr().err


# Flips are drawn by each process; batch norm's sums round otherwise on several.
NO_DRAWS = ("--no_flip", "--lr", "0.001", "--syncbn_process_group_size", "0")


def on_several(method, folder, processes, *argv):
    argv = arguments(method, *argv, "--batch_size", 128 // processes)
    run_mains(f"main_{method}", folder, argv, processes)
    return losses(folder)


@slow
@both
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_make_the_assignments_and_losses_of_one(tmp_path, method, processes):
    """8 super-classes: 4 on each of 2 processes, 2 on each of 4; groups of 1 and 2 for 2 clusters."""
    _, expected = train(method, tmp_path / "one", *NO_DRAWS)
    found = on_several(method, tmp_path / "more", processes, *NO_DRAWS)
    first = {i: x for i, x in expected.items() if i < 10}
    assert {i: x for i, x in found.items() if i < 10} == pytest.approx(first, rel=1e-4)
    assert found == pytest.approx(expected, rel=2e-2)
    norms = [
        {x["iteration"]: x["gradient_norm"] for x in read_log(tmp_path / name) if "loss" in x}
        for name in ("one", "more")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=5e-2)
    before, after = (labels_of(tmp_path / name) for name in ("one", "more"))
    assert (before == after).float().mean() > 0.97  # features of the second differ by rounding
    first = [assignments(tmp_path / name)[0] for name in ("one", "more")]
    assert first[0]["nmi_labels"] == pytest.approx(first[1]["nmi_labels"], abs=1e-9)


@pytest.mark.slow
def test_another_number_of_processes_takes_over_classifiers_and_momentum(tmp_path):
    _, expected = train("deepercluster", tmp_path / "one", *NO_DRAWS)
    folder = tmp_path / "mixed"
    argv = arguments("deepercluster", *NO_DRAWS, "--batch_size", 32, "--checkpoint_iters", 1)
    mixed = start_mains("main_deepercluster", folder, argv, 4)
    wait_for_lines(folder, mixed[0], 6)
    kill_mains(mixed)
    assert train("deepercluster", folder, *NO_DRAWS)[0] == 0
    assert losses(folder) == pytest.approx(expected, rel=2e-2)


VGG = "--arch vgg16 --width 0.0625 --size_crops 32 --sobel --dropout 0.2"


OPTIONS = [
    ("deepercluster", "--rotnet false --super_classes 3 --warm_restart true --dim_pca 999"),
    ("deepcluster", "--arch alexnet --width 0.0625 --size_crops 64 --batch_size 256"),
    ("deepcluster", "--kmeans_backend faiss --sobel --nmb_crops 1 1 --size_crops 12 8 "
        "--min_scale_crops 0.4 0.2 --max_scale_crops 1 0.5"),
    ("deepercluster", VGG + " --k 9"),
    ("deepcluster", "--reassign 0.5 --precision bf16 --wd 1e-4 --momentum 0"),
    ("deepercluster", "--size_dataset 700 --nmb_crops 2 --wd 0 --workers 2"),
    ("deepcluster", VGG + " --sobel_padding 2 --niter 1"),
    ("deepercluster", "--super_classes 4 --use_faiss true --precision bf16"),
]  # fmt: skip


@slow
@pytest.mark.parametrize("method, argv", OPTIONS)
def test_every_option_trains(tmp_path, method, argv):
    if "faiss" in argv:
        pytest.importorskip("faiss")
    status, values = train(method, tmp_path, *argv.split())
    assert status == 0 and len(values) >= 10
    assert all(0 < loss < 20 for loss in values.values())


@pytest.mark.slow
def test_pic_finds_a_number_of_clusters_and_the_top_layer_follows_and_resumes(tmp_path):
    argv = ("--clustering", "PIC", "--log_freq", 100)
    train("deepcluster", tmp_path / "whole", *argv, "--epochs", 3)
    sizes = re.findall(r"clusters (\d+) of", (tmp_path / "whole" / "train.log").read_text())
    assert len(set(sizes)) > 1  # they do change
    assert state_of(tmp_path / "whole")["model"]["top_layer.weight"].shape[0] == int(sizes[-1])
    train("deepcluster", tmp_path / "parts", *argv, "--epochs", 2)
    train("deepcluster", tmp_path / "parts", *argv, "--epochs", 3)
    assert losses(tmp_path / "parts")[29] == losses(tmp_path / "whole")[29]


@pytest.mark.slow
def test_a_part_of_the_data_is_all_that_a_run_sees(tmp_path):
    train("deepercluster", tmp_path, "--size_dataset", 700, "--epochs", 1)
    labels = labels_of(tmp_path)
    assert (labels[0] >= 0).sum() == (labels[1] >= 0).sum() == 700
    assert len(losses(tmp_path)) == 700 // 128


@pytest.mark.slow
def test_the_published_lines_run(tmp_path):
    folder = images(tmp_path / "images", 80, size=40)
    line = f"{folder} --arch vgg16 --sobel --lr 0.05 --wd -5 --k 10 --verbose --workers 0 "
    line += f"--exp {tmp_path / 'dc'} --epochs 1 --batch 16 --clustering Kmeans --seed 31 "
    line += "--width 0.03 --size_crops 32"
    assert script("deepcluster").main(shlex.split(line)) == 0
    group = state_of(tmp_path / "dc")["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["lr"], group["momentum"]) == (1e-5, 0.05, 0.9)
    resumed = (
        f"{folder} --arch vgg16 --sobel --k 10 --resume {tmp_path / 'dc'} --epochs 2 --batch 16 "
    )
    resumed += f"--exp {tmp_path / 'more'} --width 0.03 --workers 0 --log_freq 1 --size_crops 32"
    assert script("deepcluster").main(shlex.split(resumed)) == 0
    assert min(losses(tmp_path / "more")) == 5  # the second epoch

    line = (
        f"--dump_path {tmp_path / 'ddc'} --data_path {folder} --size_dataset 100000000 --workers 0 "
    )
    line += "--sobel true --lr 0.1 --wd 0.00001 --nepochs 1 --batch_size 16 --reassignment 3 "
    line += (
        "--dim_pca 4096 --super_classes 16 --rotnet true --k 40 --warm_restart false --niter 10 "
    )
    line += f"--use_faiss false --size_crops 32 --width 0.03 --pretrained {tmp_path / 'dc'} --log_freq 1"
    assert script("deepercluster").main(shlex.split(line)) == 0
    text = (tmp_path / "ddc" / "train.log").read_text()
    assert "4 rotations x 4 clusters = 16 super-classes of 80 images, 10 sub-classes" in text


@pytest.mark.slow
def test_uncurated_images_come_from_flat_folders_and_from_tar_shards(tmp_path):
    folder = images(tmp_path / "images", 100, broken_every=40)
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for path in sorted(folder.iterdir())[shard::2]:
                tar.add(path, path.name)
    shards = str(tmp_path / "shard-{0..1}.tar")
    for name, data in (("flat", folder), ("tar", shards)):
        status, values = train(
            "deepercluster", tmp_path / name, "--data_path", data, *TINY, "--epochs", 1
        )
        assert status == 0 and len(values) == 2
        assert (labels_of(tmp_path / name) >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("method, flags", [
    ("deepcluster", ["--start_epoch", "1"]),
    ("deepercluster", ["--epoch", "1", "--start_iter", "4"]),
])  # fmt: skip
def test_a_new_run_begins_where_it_is_told(tmp_path, method, flags):
    train(method, tmp_path, *flags)
    assert min(losses(tmp_path)) == (14 if "--start_iter" in flags else 10)
    assert [line["epoch"] for line in assignments(tmp_path)] == [1]


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    "argv, words",
    [
        ("--k 3000", "3000"),
        ("--k 0", "--k"),
        ("--batch_size 5000", "--batch_size 5000"),
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--dump_path {file}", "--dump_path"),
        ("--dump_path {other}", "another method"),
        ("--init_from /nowhere.pth", "/nowhere.pth"),
        ("--sobel --in_chans 1", "--in_chans"),
        ("--sobel maybe", "--sobel"),
        ("--arch vgg17", "--arch vgg17"),
        ("--arch vgg16 --width 0.03", "too small"),
        ("--dropout 1.5", "--dropout"),
        ("--unknown 3", "--unknown"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(whole, tmp_path, capsys, method, argv, words):
    (tmp_path / "file").write_text("")
    other = whole[METHODS[METHODS[0] == method]][0]
    argv = argv.format(file=tmp_path / "file", other=other).split()
    argv = arguments(method, "--dump_path", tmp_path / "run", *argv)
    with pytest.raises(SystemExit) as stop:
        flags.run(lambda: script(method).main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.strip().count("\n") == 0, error


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, argv, words",
    [
        ("deepcluster", "--reassign 0.01", "use at least 0.0987"),
        ("deepcluster", "--reassign 0", "--reassign"),
        ("deepcluster", "--clustering DBSCAN", "--clustering"),
        ("deepcluster", "--resume /nowhere", "/nowhere"),
        ("deepcluster", "--resume {deeper}", "another method (deepercluster, not deepcluster)"),
        ("deepcluster", "--start_epoch 2", "--start_epoch 2 begins after epoch 2 of --epochs 2"),
        ("deepercluster", "--epoch 2", "--epoch 2 must be below --epochs 2"),
        ("deepercluster", "--super_classes 6", "use 8, or --rotnet false"),
        (
            "deepercluster",
            "--super_classes 256 --k 99",
            "--super_classes 256 is more than the 128 images",
        ),
        ("deepercluster", "--k 1", "--k 1 must be from 2"),
        ("deepercluster", "--size_dataset 100", "--batch_size 128"),
    ],
)
def test_bad_options_of_a_method_are_named(whole, tmp_path, capsys, method, argv, words):
    argv = argv.format(deeper=whole["deepercluster"][0])
    with pytest.raises(SystemExit) as stop:
        argv = arguments(method, "--dump_path", tmp_path, *argv.split())
        flags.run(lambda: script(method).main(argv))
    assert stop.value.code == 2 and words in capsys.readouterr().err


@both
def test_a_run_whose_loss_is_not_finite_keeps_its_last_good_state(tmp_path, capsys, method):
    with pytest.raises(SystemExit) as stop:
        argv = arguments(method, "--dump_path", tmp_path, "--lr", "1e30", "--checkpoint_iters", "1")
        flags.run(lambda: script(method).main(argv))
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().err
    weights = state_of(tmp_path)["model"].values()
    assert all(x.isfinite().all() for x in weights if x.is_floating_point())


@pytest.mark.slow
@both
def test_digits_are_learned_without_labels(tmp_path, method):
    """Half of the bare command's epochs, and an eighth."""
    epochs = {"deepcluster": 3, "deepercluster": 8}[method]
    trained, untrained = few_label_accuracy(script(method).main, tmp_path, "--epochs", epochs)
    assert trained > untrained + 10, (trained, untrained)
    if method == "deepcluster":  # clusters become classes, and settle
        nmi = [line["nmi_labels"] for line in assignments(tmp_path)]
        assert nmi[-1] > nmi[0] + 0.03


# ============ what is learned from ============
@pytest.mark.slow
def test_labels_follow_the_images_through_rotation_and_draws(tmp_path, monkeypatch):
    """A batch of deepercluster: its places have their super-class' cluster and rotation."""
    deeper, seen = script("deepercluster"), []
    loss, rotate = deeper.hierarchical_loss, deeper.rotate

    def spying_rotate(crops, rotations):
        turned = rotate(crops, rotations)
        for quarter_turns in range(4):
            rows = rotations == quarter_turns
            plain = torch.rot90(crops[rows], quarter_turns, (2, 3))
            assert rows.any() and torch.equal(turned[rows], plain)
        return turned

    def spying_loss(scores, supers, sub_scores, subs):
        seen.append((supers.tolist(), torch.cat(subs).tolist()))
        return loss(scores, supers, sub_scores, subs)

    monkeypatch.setattr(deeper, "rotate", spying_rotate)
    monkeypatch.setattr(deeper, "hierarchical_loss", spying_loss)
    drawn, of = [], deeper.PlannedSampler.set_epoch

    def spying_epoch(sampler, epoch, order, start=0):
        drawn.append(order)
        of(sampler, epoch, order, start)

    monkeypatch.setattr(deeper.PlannedSampler, "set_epoch", spying_epoch)
    train("deepercluster", tmp_path, "--epochs", 1)
    labels, order = labels_of(tmp_path), drawn[-1]  # the first is empty
    for (supers, subs), batch in zip(seen, order, strict=True):
        assert [s // 4 for s in supers] == labels[0, batch].tolist()
        assert subs == labels[1, batch].tolist()
    counts = np.bincount(np.concatenate([labels[1, i] for i in order]), minlength=6)
    assert counts.max() < 1.25 * counts.min()  # uniform over sub-classes, whatever their sizes


@pytest.mark.slow
def test_the_plan_names_what_uniform_predictions_cost(whole):
    first = whole["deepercluster"][1][0]
    assert first == pytest.approx(math.log(8) + math.log(6), rel=0.02)
    assert whole["deepcluster"][1][0] == pytest.approx(math.log(12), rel=0.05)
