"""visualize.py curves: which panels, which lines, evaluations, and folders that are no runs."""

import json

import pytest
from PIL import Image

import visualize
from src.pictures import run_curves


def write_run(folder, keys=("loss", "knn"), epochs=4, linear=None, knn=None):
    folder.mkdir(parents=True)
    lines = [
        {"epoch": i, "epoch_float": i + 1.0, "iteration": i, **{key: i + 0.5 for key in keys}}
        for i in range(epochs)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "args.json").write_text(json.dumps({"arch": "resnet10", "data_path": "digits"}))
    if linear is not None:
        (folder / "eval_linear.json").write_text(json.dumps({"best_top1": linear}))
    if knn is not None:
        rows = [{"features": "backbone", "labels": "all", "k": k, "top1": knn - k} for k in (0, 5)]
        rows += [{"features": "raw pixels", "labels": "all", "k": 5, "top1": 99.0}]
        rows += [{"features": "backbone", "labels": 5, "k": 5, "top1": 98.0}]
        (folder / "eval_knn.json").write_text(json.dumps({"results": rows}))
    return str(folder)


def test_panels_are_what_two_runs_have_or_what_is_asked_for(tmp_path):
    paths = [
        write_run(tmp_path / "a", ("loss", "knn", "lr")),
        write_run(tmp_path / "b", ("loss", "knn_pets")),
        write_run(tmp_path / "c", ("loss", "knn", "knn_pets")),
    ]
    runs = run_curves.read_runs(paths)
    assert [key for key, _ in run_curves.choose_panels(runs, None)] == ["loss", "knn", "knn_pets"]
    assert [key for key, _ in run_curves.choose_panels(runs, ["lr", "loss"])] == ["lr", "loss"]
    alone = run_curves.read_runs(paths[:1])
    assert {key for key, _ in run_curves.choose_panels(alone, None)} == {"loss", "knn", "lr"}
    with pytest.raises(ValueError, match="--curves rankme is in no log of these runs, which have"):
        run_curves.choose_panels(runs, ["rankme"])


def test_evaluations_are_the_best_of_the_network_itself_with_all_labels(tmp_path):
    folder = write_run(tmp_path / "a", linear=71.5, knn=62.0)
    assert run_curves.results_of_run(folder) == {"linear": 71.5, "knn": 62.0}
    assert run_curves.results_of_run(write_run(tmp_path / "b")) == {}


@pytest.mark.slow
def test_every_run_is_a_line_of_every_panel_in_its_own_colour(tmp_path, monkeypatch):
    from matplotlib import pyplot

    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    paths = [
        write_run(tmp_path / "short", epochs=2, linear=60.0),
        write_run(tmp_path / "long", epochs=4, linear=70.0, knn=50.0),
    ]
    words = ["curves", "--runs", *paths, "--curves", "loss", "knn", "--dump_path", str(tmp_path)]
    assert visualize.main(words) == 0
    (figure,) = figures
    loss, knn, linear = figure.axes[:3]
    assert len(figure.axes) == 3  # one k-NN evaluation alone has no panel
    for axis in (loss, knn):
        first, second = axis.lines
        assert list(first.get_xdata()) == [1, 2] and list(second.get_xdata()) == [1, 2, 3, 4]
        assert list(second.get_ydata()) == [0.5, 1.5, 2.5, 3.5]
        assert first.get_color() != second.get_color()
    assert [(*x.get_xdata(), *x.get_ydata()) for x in linear.lines] == [(2, 60), (4, 70)]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"{x}: resnet10 on digits, epoch {n}" for x, n in (("short", 2), ("long", 4))]
    assert Image.open(tmp_path / "runs.png").width > 500
    close(figure)


def test_what_is_no_run_is_named(tmp_path):
    own = write_run(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="--runs .*none has no log.jsonl"):
        visualize.main(["curves", "--runs", own, str(tmp_path / "none")])
    with pytest.raises(ValueError, match="is named twice"):
        visualize.main(["curves", "--runs", own, own])
    empty = write_run(tmp_path / "empty", epochs=0)
    with pytest.raises(ValueError, match="empty: its log.jsonl has no line yet"):
        visualize.main(["curves", "--runs", own, empty])
