"""main_deepclusterv2.py and main_selav2.py as their users run them: bare, resumed, killed, misused."""

import importlib
import math
import os
import re
import shlex
import signal

import pytest
import torch

from src.labels import memory_bank
from src.nets import resnet
from src.run import flags
from src.run.log import read_log
from tests.gloo import kill_mains, run_mains, start_mains
from tests.runs import images, losses, one_panel, signal_handlers, wait_for_lines
from tests.test_main_dino import few_label_accuracy

pytestmark = pytest.mark.usefixtures(signal_handlers.__name__, one_panel.__name__)

METHODS = ["deepclusterv2", "selav2"]
SMALL = shlex.split(
    "--arch resnet10 --width 0.125 --stem small --hidden_mlp 32 --feat_dim 16 --nmb_crops 2 1 "
    "--size_crops 12 8 --nmb_prototypes 10 12 --batch_size 128 --epochs 2 --warmup_epochs 0 "
    "--base_lr 0.2 --workers 0 --log_freq 1 --knn_freq 0 --no-tensorboard"
)
both = pytest.mark.parametrize("method", METHODS)


def script(method):
    return importlib.import_module(f"main_{method}")


def train(method, folder, *argv):
    """Run main in this process: its status and the log by iteration."""
    argv = [*SMALL, "--dump_path", str(folder), *map(str, argv)]
    return script(method).main(argv), losses(folder)


def assignments(folder):
    return [line for line in read_log(folder) if "assignment_seconds" in line]


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
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    bank, labels = (state["method_state"][name] for name in ("memory_bank", "pseudo_labels"))
    assert bank["embeddings"].shape == (1280, 2, 16) and len(bank["indices"].unique()) == 1280
    assert labels["labels"].shape == (2, 1297) and labels["epoch"] == 1
    assert ((labels["labels"] == -100).sum(1) == 17).all()  # what the last batch left out
    norms = bank["embeddings"].norm(dim=2)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    text = (folder / "train.log").read_text()
    assert "ln(K) = 2.394" in text and "memory bank: 10 of 10 batches" in text
    assert re.search(
        r"epoch 2/2 clusters 10 \+ 12 of 1,280 images in .* NMI 0\.\d\d with the", text
    )
    assert (folder / "plots" / "curves.png").exists() and (folder / "plots" / "crops.png").exists()


@pytest.mark.slow
def test_the_head_of_deepclusterv2_is_the_centroids(whole):
    state = torch.load(whole["deepclusterv2"][0] / "checkpoint.pth", weights_only=True)
    for head, size in enumerate((10, 12)):
        weight = state["model"][f"prototypes.prototypes{head}.weight"]
        assert weight.shape == (size, 16)
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(size))


@pytest.mark.slow
def test_selav2_gives_all_prototypes_equal_shares(whole):
    """Equal for the soft assignment; rounded to one prototype each, nearly so."""
    first, second = assignments(whole["selav2"][0])
    assert second["clusters_empty"] == 0 and second["cluster_max"] < 3 * 1280 / 10


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
            if next(iterations) in (12, 18, 26):  # 9 of the first pass; then 4, 10, 18 are done
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop(self, done)

        patch.setattr(run, "must_stop", send_a_signal_now_and_then)
        for _ in range(3):
            assert train(method, tmp_path)[0] == 128 + signal.SIGTERM
    status, values = train(method, tmp_path)
    assert status == 0 and values == whole[method][1]
    text = (tmp_path / "train.log").read_text()
    places = re.findall(r"continues from epoch (\d), iteration (\d)", text)
    assert places == [("1", "4"), ("2", "0"), ("2", "8")]
    expected = [{k: v for k, v in x.items() if "seconds" not in k} for x in assignments(tmp_path)]
    found = assignments(whole[method][0])
    assert expected == [{k: v for k, v in x.items() if "seconds" not in k} for x in found]


@pytest.mark.slow
@both
def test_a_signal_in_the_first_pass_leaves_at_once(tmp_path, monkeypatch, method):
    run = script(method).Run
    must_stop, calls = run.must_stop, []

    def in_the_third(self, done):
        calls.append(done)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return must_stop(self, done)

    monkeypatch.setattr(run, "must_stop", in_the_third)
    argv = [*SMALL, "--dump_path", str(tmp_path)]
    assert script(method).main(argv) == 128 + signal.SIGTERM and calls == [1, 2, 3]
    assert not (tmp_path / "checkpoint.pth").exists()


# Without photometry, whose draws depend on the process, and with small steps, which do not amplify
# the rounding of sums over processes: an image between two clusters may still change its label.
NO_DRAWS = (
    "--no_flip --color_jitter 0 --grayscale 0 --blur 0 --optimizer sgd --base_lr 0.001".split()
)


@pytest.mark.slow
@both
def test_two_processes_equal_one_and_another_number_takes_the_run_over(tmp_path, method):
    flags = [*NO_DRAWS, *(["--kmeans_iters", "1"] if method == "deepclusterv2" else [])]
    _, expected = train(method, tmp_path / "one", *flags)
    argv = (*SMALL, *flags, "--batch_size", 64, "--checkpoint_iters", 1)
    run_mains(f"main_{method}", tmp_path / "two", argv, 2)
    mixed = start_mains(f"main_{method}", tmp_path / "mixed", argv, 2)
    wait_for_lines(tmp_path / "mixed", mixed[0], 5)
    kill_mains(mixed)
    assert train(method, tmp_path / "mixed", *flags)[0] == 0
    text = (tmp_path / "mixed" / "train.log").read_text()
    assert re.search(r"continues from epoch \d, iteration [1-9]", text)

    labels = {}
    for name in ("one", "two", "mixed"):
        state = torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["method_state"]
        labels[name] = state["pseudo_labels"]["labels"]
        assert losses(tmp_path / name) == pytest.approx(expected, rel=2e-2)
        assert (labels[name] == labels["one"]).float().mean() > 0.9  # one in ten by chance


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, argv",
    [
        ("deepclusterv2", "--nmb_prototypes 10 --kmeans_start k-means++ --empty_clusters reseed"),
        ("deepclusterv2", "--nmb_crops 1 --size_crops 12 --crops_for_assign 0 --kmeans_iters 1"),
        ("deepclusterv2", "--freeze_prototypes_niters 3 --crops_for_assign 0 1 2 --in_chans 1"),
        ("deepclusterv2", "--kmeans_backend faiss --optimizer adamw --base_lr 0.001"),
        ("deepclusterv2", "--precision bf16 --optimizer larc --head_dims 24 16"),
        ("selav2", "--nmb_prototypes 10 --epsilon 0.01 --sinkhorn_tolerance 1"),
        ("selav2", "--nmb_reassignments 2 --precision bf16 --freeze_prototypes_niters 0"),
        ("selav2", "--nmb_crops 1 --size_crops 12 --crops_for_assign 0 --workers 2"),
    ],
)
def test_every_option_trains(tmp_path, method, argv):
    if "faiss" in argv:
        pytest.importorskip("faiss")
    status, values = train(method, tmp_path, "--epochs", "1", *argv.split())
    assert status == 0 and len(values) == 10
    assert all(0 < loss < 20 for loss in values.values())


@pytest.mark.slow
def test_selav2_keeps_its_labels_between_the_times_of_the_schedule(tmp_path):
    train("selav2", tmp_path, "--epochs", 5, "--nmb_reassignments", 2, "--log_freq", 100)
    epochs = [line["epoch"] for line in assignments(tmp_path)]
    assert epochs == script("selav2").reassignment_epochs(5, 2) and len(epochs) < 5
    text = (tmp_path / "train.log").read_text()
    assert f"assigned anew before {len(epochs)} of 5 epochs" in text


@pytest.mark.slow
@both
def test_data_without_labels_and_broken_files_train_through(tmp_path, method):
    folder, run = images(tmp_path / "images", 150, broken_every=50), tmp_path / "run"
    status, _ = train(
        method, run, "--data_path", folder, "--preset", "tiny", "--batch_size", 50, "--epochs", 2
    )
    assert status == 0
    assert all("nmi_labels" not in line for line in assignments(run))


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    "argv, words",
    [
        ("--nmb_prototypes 10 3000", "--nmb_prototypes 3000 is more"),
        ("--nmb_prototypes 0", "--nmb_prototypes"),
        ("--crops_for_assign 0 7", "--crops_for_assign"),
        ("--nmb_crops 1 --size_crops 12", "such as 0"),
        ("--temperature 0", "--temperature"),
        ("--batch_size 1", "--batch_size 1"),
        ("--batch_size 5000", "--batch_size 5000"),
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--dump_path {file}", "--dump_path"),
        ("--dump_path {other}", "another method ("),
        ("--unknown 3", "--unknown"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(whole, tmp_path, capsys, method, argv, words):
    (tmp_path / "file").write_text("")
    other = whole[METHODS[METHODS[0] == method]][0]
    argv = argv.format(file=tmp_path / "file", other=other).split()
    with pytest.raises(SystemExit) as stop:
        flags.run(
            lambda: script(method).main([*SMALL, "--dump_path", str(tmp_path / "run"), *argv])
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.strip().count("\n") == 0, error


@pytest.mark.parametrize(
    "method, argv",
    [("deepclusterv2", "--kmeans_iters 0"), ("selav2", "--epsilon 0"), ("selav2", "--nopts -1")],
)
def test_bad_options_of_a_method_are_named(capsys, method, argv):
    with pytest.raises(SystemExit) as stop:
        script(method).main(argv.split())
    assert stop.value.code == 2 and argv.split()[0] in capsys.readouterr().err


@pytest.mark.slow
@both
def test_digits_are_learned_without_labels(tmp_path, method):
    """A sixth of the bare command's epochs or more, of large crops alone, half the prototypes for two
    heads, and with twice the steps."""
    argv = shlex.split("--nmb_crops 2 --size_crops 16 --nmb_prototypes 30 30 --batch_size 64")
    argv += ["--epochs", {"deepclusterv2": 10, "selav2": 15}[method]]
    trained, untrained = few_label_accuracy(script(method).main, tmp_path, *argv)
    assert trained > untrained + 5, (trained, untrained)


# ============ what goes into the memory bank ============
class Spy:
    """Records what the network is given and gives, and what the memory bank is given."""

    def __init__(self, monkeypatch):
        self.forwards, self.pushes, self.norms, self.poisoned = [], [], [], None
        forward, push = resnet.ResNet.forward, memory_bank.MemoryBank.push

        def spying_forward(network, crops):
            output = forward(network, crops)
            if network.training:
                heads = [
                    p for name, p in network.named_parameters() if name.startswith("prototypes")
                ]
                self.norms.append(torch.cat([weight.norm(dim=1) for weight in heads]).detach())
                self.forwards.append((crops, output[0].detach()))
            return output

        def spying_push(bank, indices, embeddings):
            self.pushes.append(embeddings.clone())
            if len(self.pushes) == 15 and self.poisoned is None:
                embeddings[:, 3] = math.nan
                self.poisoned = int(indices[3])
            push(bank, indices, embeddings)

        monkeypatch.setattr(resnet.ResNet, "forward", spying_forward)
        monkeypatch.setattr(memory_bank.MemoryBank, "push", spying_push)


@pytest.mark.slow
@both
def test_the_bank_gets_the_embeddings_of_its_crops_and_leaves_out_what_is_not_finite(
    tmp_path, monkeypatch, method
):
    spy = Spy(monkeypatch)
    status, _ = train(method, tmp_path, "--crops_for_assign", 0, 2, "--freeze_prototypes_niters", 0)
    assert status == 0
    first_pass, training = spy.forwards[:20], spy.forwards[20:]
    for i, pushed in enumerate(spy.pushes[:10]):
        for (crop, embedding), side, row in zip(first_pass[2 * i :], (12, 8), pushed, strict=False):
            assert crop.shape == (128, 3, side, side) and torch.equal(embedding, row)
    for (crops, embedding), pushed in zip(training, spy.pushes[10:], strict=True):
        assert [len(crop) for crop in crops] == [128] * 3
        assert torch.equal(embedding.view(3, 128, 16)[[0, 2]], pushed)
    if method == "selav2":  # Eq. 8 compares with prototypes of norm 1, although they are trained
        norms = torch.stack(spy.norms[20:])
        torch.testing.assert_close(norms, torch.ones_like(norms))
    labels = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["method_state"]
    labels = labels["pseudo_labels"]["labels"]
    assert (labels[:, spy.poisoned] == -100).all() and ((labels == -100).sum(1) == 18).all()


@pytest.mark.slow
def test_selav2_trains_its_prototypes_only_after_they_were_frozen(tmp_path):
    def prototypes(name, *argv):
        train("selav2", tmp_path / name, "--epochs", 1, "--log_freq", 100, *argv)
        state = torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        return state["model"]["prototypes.prototypes0.weight"]

    frozen = prototypes("frozen", "--freeze_prototypes_niters", 10)
    assert torch.equal(
        frozen, prototypes("slow", "--freeze_prototypes_niters", 10, "--base_lr", 0.01)
    )
    assert (frozen - prototypes("free", "--freeze_prototypes_niters", 9)).abs().max() > 1e-6


@pytest.mark.slow
def test_another_schedule_does_not_assign_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        run = script("selav2").Run
        must_stop = run.must_stop

        def in_the_second_epoch(self, done):
            if next(calls) == 22:
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop(self, done)

        patch.setattr(run, "must_stop", in_the_second_epoch)
        train("selav2", tmp_path, "--epochs", 3, "--nmb_reassignments", 1)
    assert train("selav2", tmp_path, "--epochs", 3, "--nmb_reassignments", 0)[0] == 0
    text = (tmp_path / "train.log").read_text()
    assert "continues from epoch 2, iteration 4" in text
    assert re.findall(r"epoch (\d)/3 clusters 10 \+ 12 of ([\d,]+) images", text) == [
        *(("1", "1,280"), ("3", "1,280"))
    ]


@pytest.mark.slow
def test_heads_of_unequal_sizes_have_the_mean_of_their_ceilings(tmp_path, capsys):
    train("deepclusterv2", tmp_path, "--epochs", 1, "--nmb_prototypes", 2, 50)
    assert f"ln(K) = {(math.log(2) + math.log(50)) / 2:.3f}" in capsys.readouterr().out
