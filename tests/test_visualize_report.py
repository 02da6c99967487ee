"""visualize.py report: one page on several runs, what is on it, how large it is, and in a real browser."""

import html
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import visualize
from src.pictures import crops_command, report, report_curves, report_images, report_runs
from src.pictures.report import Picture
from src.run import flags as cli
from tests.browser import Browser
from tests.test_visualize_clusters import make_images, make_run

CROPS = {"nmb_crops": [2], "size_crops": [8], "min_scale_crops": [0.3], "max_scale_crops": [1.0]}
CROPS |= {"preset": "tiny"}


def write_run(folder, data, epochs=3, lr=0.1, **changes):
    """A run that was never trained, with a log, and the plan of one in train.log."""
    prototypes = changes.pop("nmb_prototypes", (6,))
    make_run(folder, data, prototypes)
    arguments = json.loads((folder / "args.json").read_text()) | CROPS | changes
    arguments |= {"epochs": epochs, "base_lr": lr, "dump_path": str(folder)}
    (folder / "args.json").write_text(json.dumps(arguments))
    lines = [
        {"epoch": i, "epoch_float": i + 1.0, "iteration": i, "loss": 2 - i * lr, "knn": 50.0 + i}
        for i in range(epochs)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    time = "2031-05-06 07:08:09,123 INFO src.run"
    (folder / "train.log").write_text(
        f"{time}.run: data        mine: 60 images\n{time}.run: optimizer   sgd, peak {lr}\n"
        f"{time}.log: command: main_swav.py --epochs {epochs}\n"
        f"{time}.run: epoch 1/3 it 1 loss 2.0\n"
    )
    return folder


def write_sheets(folder, side=40, files=("plots/crops.png", "plots/neighbours.png")):
    rng = np.random.default_rng(0)
    for name in (*files, "plots/clusters/clusters.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)


def read(folder, *runs, **flags):
    """The page of some runs; flags: with their values."""
    output = folder / "page.html"
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--device", "cpu", "--output", str(output)]
    assert visualize.main(["report", *map(str, runs), *words]) == 0
    return output.read_text(encoding="utf-8")


def rows(page, title):
    """(name, cells, whether it is marked) of the rows of a table, as people read them."""
    table = re.search(rf'aria-label="{title}".*?</table>', page, re.S)[0]
    found = []
    for mark, row in re.findall(r"<tr( class=\"differs\")?>(.*?)</tr>", table, re.S)[1:]:
        name, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        texts = [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in (name, *cells)]
        found.append((texts[0], texts[1:], bool(mark)))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images", count=24, classes=3)


# ============ in a browser ============
@pytest.mark.slow
def test_in_a_browser_the_page_asks_for_nothing_and_overflows_nowhere(tmp_path, data):
    runs = [
        write_run(tmp_path / "a_run_with_a_rather_long_name_for_a_telephone_in_a_hand", data),
        write_run(tmp_path / "b", data, epochs=4, lr=0.2, note="x" * 500),
    ]
    page = read(tmp_path, *runs)
    opened = "document.querySelectorAll('details').forEach(x => x.open = true)"
    zoomed = "document.querySelectorAll('input').forEach(x => x.checked = true)"
    with Browser(tmp_path) as browser:
        for width in (1280, 390):
            asked = browser.open(tmp_path / "page.html", width)
            others = [url for url in asked if not url.startswith("data:")]
            assert others == [(tmp_path / "page.html").as_uri()]
            assert len(asked) == 1 + page.count("<img ") == 7
            for change in ("0", opened, zoomed):
                browser.evaluate(change)
                size = browser.evaluate("[innerWidth, document.documentElement.scrollWidth]")
                assert size == [width, width], change
            drawn = "[...document.images].every(x => x.complete && x.naturalWidth > 0)"
            assert browser.evaluate(drawn)
            assert not browser.complaints()
        heads = browser.evaluate("[...document.querySelectorAll('h2')].map(x => x.innerText)")
    assert heads[:2] == ["Plan", "Curves"] and heads[-1] == "Evaluations"


def test_the_page_has_no_script_and_no_address(tmp_path, data):
    page = read(tmp_path, write_run(tmp_path / "a", data), draw_images=0)
    assert not re.search(r"<script|<link|<iframe|\bsrc=\"(?!data:)|url\(|@import|\son\w+=", page)
    assert re.findall(r'href="([^#][^"]*)"', page) == []
    assert "default-src 'none'" in page and '<html lang="en">' in page


# ============ sheets ============
@pytest.mark.slow
def test_what_a_run_has_no_sheet_of_is_drawn_and_what_it_has_is_kept(tmp_path, data):
    first, second = (write_run(tmp_path / name, data) for name in "ab")
    write_sheets(second)
    before = (second / "plots" / "crops.png").read_bytes()
    page = read(tmp_path, first, second)
    for name in ("multicrop.png", "neighbours/neighbours.png", "clusters/clusters.png"):
        assert (first / "plots" / name).is_file()
    assert (second / "plots" / "crops.png").read_bytes() == before
    assert not (second / "plots" / "multicrop.png").exists()
    alts = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(alts) == 6 and all(len(alt) > 20 for alt in alts)
    assert [name for name, _, _ in rows(page, "Clusters")][:2] == ["images", "clusters"]


@pytest.mark.slow
def test_what_cannot_be_drawn_is_a_sentence(tmp_path, data):
    gone = write_run(tmp_path / "gone", tmp_path / "no_images")
    shutil.rmtree(gone / "plots", ignore_errors=True)
    simclr = write_run(tmp_path / "simclr", data, nmb_prototypes=())
    page = html.unescape(read(tmp_path, gone, simclr))
    assert page.count(f"Not drawn: --data_path {tmp_path / 'no_images'} does not exist") == 3
    assert page.count("has no prototypes, which SwAV") == 1
    assert page.count("<img ") == 2  # crops and neighbours of simclr
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "args.json").write_text("{}")
    page = html.unescape(read(tmp_path, bare))
    assert "bare has no log.jsonl with a line" in page and "No evaluation has left a file" in page


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_costs_one_picture_and_not_the_page(
    tmp_path, data, monkeypatch
):
    def fail(*_):
        raise KeyError("of another age")

    monkeypatch.setattr(crops_command, "draw_crops", fail)
    run = write_run(tmp_path / "a", data)
    page = html.unescape(read(tmp_path, run))
    assert "Not drawn: KeyError: 'of another age'. By hand: python visualize.py crops" in page
    assert page.count("<img ") == 2


@pytest.mark.slow
def test_a_run_whose_arguments_lack_the_preset_has_a_sentence_and_no_traceback(
    tmp_path, data, capsys
):
    run = write_run(tmp_path / "a", data)
    arguments = json.loads((run / "args.json").read_text())
    whole = {name: value for name, value in arguments.items() if name != "preset"}
    (run / "args.json").write_text(json.dumps(whole))
    assert read(tmp_path, run).count("<img ") == 3  # all crops are said, the preset is not needed
    shutil.rmtree(run / "plots")
    del whole["size_crops"]
    (run / "args.json").write_text(json.dumps(whole))
    page = html.unescape(read(tmp_path, run))
    assert "Not drawn: --preset auto says no --size_crops" in page
    assert "Traceback" not in "".join(capsys.readouterr())


def test_more_images_than_asked_for_are_not_drawn_and_the_command_is_named(tmp_path, data):
    run = write_run(tmp_path / "a b", data)
    page = html.unescape(read(tmp_path, run, draw_images=10))
    command = f"python visualize.py clusters --pretrained '{run}'"
    assert f"Not drawn: 24 images are more than --draw_images 10. By hand: {command}" in page
    assert page.count("<img ") == 1  # the crops, which are of a few images only
    assert not (run / "plots" / "neighbours").exists()


def test_a_sheet_older_than_the_checkpoint_says_so(tmp_path, data):
    run = write_run(tmp_path / "a", data)
    write_sheets(run)
    assert "Drawn before the last checkpoint" not in read(tmp_path, run)
    os.utime(run / "plots" / "neighbours.png", (1, 1))
    assert read(tmp_path, run).count("Drawn before the last checkpoint") == 1


# ============ plans and figures ============
def test_settings_that_differ_are_marked(tmp_path, data):
    runs = [write_run(tmp_path / "a", data), write_run(tmp_path / "b", data, lr=0.25, queue=7)]
    page = read(tmp_path, *runs, draw_images=0)
    different = [(name, cells) for name, cells, _ in rows(page, "Settings that differ")]
    assert different == [("base_lr", ["0.1", "0.25"])]  # the queue is of one of them only
    everything = {name: (cells, marked) for name, cells, marked in rows(page, "All settings")}
    assert everything["≠ base_lr"] == (["0.1", "0.25"], True)
    assert everything["queue"] == (["–", "7"], False) and everything["seed"] == (["3", "3"], False)
    assert not any("dump_path" in name for name in everything)
    plan = {name: (cells, marked) for name, cells, marked in rows(page, "Plans of the runs")}
    assert plan["≠ optimizer"] == (["sgd, peak 0.1", "sgd, peak 0.25"], True)
    assert plan["data"] == (["mine: 60 images"] * 2, False)
    assert plan["command"] == (["main_swav.py --epochs 3"] * 2, False)
    assert plan["started"][0] == ["2031-05-06 07:08"] * 2 and "epoch" not in plan


def test_all_evaluations_are_one_table_and_the_best_of_each_row_is_marked(tmp_path, data):
    runs = [write_run(tmp_path / name, data) for name in "ab"]
    knn = [{"features": "backbone", "labels": "all", "k": k, "top1": 60.0 + k} for k in (10, 20)]
    few = {"features": "backbone", "labels": 5, "k": 20, "top1": 40.0, "std": 1.5}
    settings = {"data_path": "pets", "temperature": 0.07}
    for run, top1 in zip(runs, (71.5, 72.25), strict=True):
        linear = {"top1": top1, "best_top1": 73.0, "lr": 0.3, "results": [{"lr": 0.1, "top1": 1.0}]}
        (run / "eval_linear.json").write_text(json.dumps(linear | {"settings": settings}))
    contents = {"temperature": 0.07, "seconds": 3.5, "results": [*knn, few], "settings": settings}
    (runs[1] / "eval_knn.json").write_text(json.dumps(contents))
    masks = {"Medium": {"map": 33.0, "queries": 70, "mp@1": 80.5}}
    (runs[0] / "eval_image_retrieval_x.json").write_text(json.dumps({"results": masks}))
    (runs[0] / "eval_torn.json").write_text('{"top1": 3')
    os.utime(runs[0] / "eval_linear.json", (1, 1))
    page = read(tmp_path, *runs, draw_images=0)
    assert [(name, cells) for name, cells, _ in rows(page, "Evaluations")] == [
        ("image retrieval x: Medium, mAP (%)", ["33.00", "–"]),
        ("image retrieval x: Medium, mP@1 (%)", ["80.50", "–"]),
        ("k-NN on pets: backbone, labels all, k 10, top-1 (%)", ["–", "70.00"]),
        ("k-NN on pets: backbone, labels all, k 20, top-1 (%)", ["–", "80.00"]),
        ("k-NN on pets: backbone, labels 5, k 20, top-1 (%)", ["–", "40.00 ± 1.50"]),
        ("linear on pets: top-1 (%)", ["71.50 †", "72.25best"]),
        ("linear on pets: best top-1 (%)", ["73.00 †", "73.00"]),  # alike: none is better
        ("while training: k-NN, top-1 (%)", ["52.00", "52.00"]),
    ]
    assert "† its file is older" in page


def test_detection_is_in_per_cent_says_its_test_split_and_more_is_better(tmp_path, data):
    runs = [write_run(tmp_path / name, data) for name in "ab"]
    settings = {"data_path": "coco", "test_split": "val2017"}
    for run, value in zip(runs, (30.0, 31.5), strict=True):
        contents = {"ap": value, "ap50": 50.0, "ap_small": value, "mask_ap": value}
        contents |= {"ap50_11points": value, "by_class": {"cat": 1.0}, "settings": settings}
        (run / "eval_detection_mask_rcnn_fpn.json").write_text(json.dumps(contents))
    page = read(tmp_path, *runs, draw_images=0)
    title, cells = "detection mask rcnn fpn on coco, val2017: ", ["30.00", "31.50best"]
    assert [(name, cells) for name, cells, _ in rows(page, "Evaluations")][:5] == [
        (f"{title}AP (%)", cells),
        (f"{title}AP50 (%)", ["50.00", "50.00"]),
        (f"{title}AP, small objects (%)", cells),
        (f"{title}mask AP (%)", cells),
        (f"{title}11-point AP50 (%)", cells),
    ]


def test_a_number_of_400_digits_is_no_figure_and_no_traceback(tmp_path, data):
    run = write_run(tmp_path / "a", data)
    large = "9" * 400
    lines = [
        f'{{"epoch": 0, "epoch_float": 1.0, "loss": {large}, "knn": {large}}}',
        f'{{"epoch": 1, "epoch_float": {large}, "loss": 1.0}}',
        '{"epoch": 1, "epoch_float": NaN, "loss": 1.0}',
    ]
    (run / "log.jsonl").write_text("\n".join(lines))
    (run / "eval_linear.json").write_text(f'{{"top1": 1.5, "std": {large}}}')
    clusters = run / "plots" / "clusters"
    clusters.mkdir(parents=True)
    (clusters / "clusters.json").write_text(f'{{"purity": {large}}}')
    page = read(tmp_path, run, draw_images=0)
    assert [cells for _, cells, _ in rows(page, "Evaluations")] == [["1.50"]]
    assert not report_runs.is_number(10**400) and report_runs.is_number(10**300)


@pytest.mark.parametrize(
    "values", [(1.7e308, -1.7e308), (5e-324, 0.0), (1e-310, 1e-310), (1.7e308, 1.5e308), (1e300, 0)]
)
def test_the_largest_and_smallest_numbers_are_drawn_within_their_panel(values):
    series = [[(float(i), value) for i, value in enumerate(values)]]
    drawing = report_curves.draw_panel(series, "loss")
    assert "nan" not in drawing and "inf" not in drawing
    places = re.findall(r'<circle class="run-0" cx="([\d.-]+)" cy="([\d.-]+)"', drawing)
    assert len(places) == 2
    for _, y in places:
        assert 0 <= float(y) <= report_curves.HEIGHT


def test_curves_lie_where_their_figures_are():
    series = [[(1.0, 0.0), (2.0, 10.0)], [(4.0, 5.0)], []]
    drawing = report_curves.draw_panel(series, "loss")
    line = re.search(r'class="line run-0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', drawing)
    x1, y1, x2, y2 = map(float, line.groups())
    (dot,) = re.findall(r'<circle class="run-1" cx="([\d.]+)" cy="([\d.]+)"', drawing)
    x3, y3 = map(float, dot)
    assert x3 == report_curves.WIDTH - report_curves.RIGHT  # the last epoch is at the right end
    assert x2 - x1 == pytest.approx((x3 - x2) / 2, abs=0.1) and y2 < y3 < y1
    assert y3 == pytest.approx((y1 + y2) / 2, abs=0.1) and "run-2" not in drawing
    flat = report_curves.draw_panel([[(1.0, 3.0), (2.0, 3.0)]], "constant")
    assert "nan" not in flat and ">3<" in flat


def test_long_curves_are_thinned_from_end_to_end():
    lines = [{"epoch_float": i / 100, "loss": float(i)} for i in range(5000)]
    lines[7] = {"epoch_float": 0.07, "loss": None}
    points = report_curves.points_of(lines, "loss")
    assert len(points) == report_curves.MOST_POINTS
    assert points[0] == (0.0, 0.0) and points[-1] == (49.99, 4999.0)


# ============ what comes from files is text ============
def test_names_and_values_are_only_text(tmp_path, data):
    name = "<script>alert(1)</script> \"'& \x1b"
    run = write_run(
        tmp_path / name.replace("/", "∕"), data, **{"<b>flag": '"><img src=x onerror=y>'}
    )
    (run / "eval_<i>.json").write_text(json.dumps({"<u>x": 1.5}))
    log = (run / "train.log").read_text()
    (run / "train.log").write_text(log.replace("mine: 60", "<h1>mine: 60"))
    other = write_run(tmp_path / os.fsdecode(b"caf\xe9"), data)
    write_sheets(run)
    page = read(tmp_path, run, other, draw_images=0)
    assert page.count("<img ") == 3
    assert not re.search(r"<(script|b|i|u)>|<h1>mine|<img src=x|\x1b", page)
    for text in ("&lt;script&gt;alert(1)", "&lt;b&gt;flag", "&lt;i&gt;", "&lt;u&gt;x", r"caf\xe9"):
        assert text in page, text
    for value in re.findall(r'(?:alt|aria-label)="([^"]*)"', page):
        assert "<" not in value


# ============ size ============
def noise(folder, count, side):
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        paths.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(paths[-1])
    return paths


@pytest.mark.slow
def test_pictures_are_made_smaller_until_they_fit_the_largest_first(tmp_path):
    large, small = noise(tmp_path, 1, 500)[0], tmp_path / "small.png"
    Image.new("RGB", (50, 40), (9, 9, 9)).save(small)
    for most in (2_000_000, 400_000, 100_000, 30_000):
        pictures = report_images.embed_images([large, small], most)
        assert sum(len(x.uri) for x in pictures) <= most
        assert (pictures[1].width, pictures[1].height) == (50, 40)  # which is not in the way
        assert pictures[0].uri and pictures[0].width == pictures[0].height
    sides = [
        report_images.embed_images([large, small], most)[0].width for most in (2_000_000, 30_000)
    ]
    assert sides[0] == 500 > sides[1] >= 240
    first, second = report_images.embed_images([large, small], 2_000)
    assert not first.uri and "0.png is left out" in first.missing and second.uri


def test_a_file_that_is_no_picture_is_a_sentence(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.bmp").write_bytes(b"")
    Image.new("RGBA", (5, 4)).save(tmp_path / "c.webp")
    names = ("a.png", "b.bmp", "c.webp", "none.png")
    first, second, third, last = report_images.embed_images([tmp_path / x for x in names], 10**6)
    for one in (first, second, last):
        assert "cannot be read" in one.missing and not one.uri
    assert third.uri.startswith("data:image/png") and (third.width, third.height) == (5, 4)


def test_a_picture_that_is_gone_when_it_is_made_smaller_is_a_sentence(tmp_path, monkeypatch):
    (path,) = noise(tmp_path, 1, 300)
    as_it_is = report_images._as_it_is

    def read_and_remove(path):
        found = as_it_is(path)
        path.unlink()
        return found

    monkeypatch.setattr(report_images, "_as_it_is", read_and_remove)
    (picture,) = report_images.embed_images([path], 10_000)
    assert "0.png cannot be read" in picture.missing and not picture.uri


@pytest.mark.slow
def test_a_page_is_never_larger_than_it_may_be(tmp_path, data):
    folders = [write_run(tmp_path / name, data) for name in "abc"]
    runs = report_runs.open_runs([str(folder) for folder in folders])
    paths = noise(tmp_path, 3, 480)
    sheets = {kind.name: [Picture(path) for path in paths] for kind in report.SHEETS[:3]}
    assert 9 * paths[0].stat().st_size > report.MOST_BYTES
    for most in (report.MOST_BYTES, 100_000, 60_000):
        page = report.write_page(runs, sheets, "2031-05-06", most)
        assert len(page.encode()) <= most
        assert 0.5 * most < len(page.encode()) or "is left out" in page
    with pytest.raises(ValueError, match="larger than 0.005 MB without any picture: give fewer"):
        report.write_page(runs, sheets, "2031-05-06", 5_000)


# ============ runs ============
def test_names_of_runs_are_as_short_as_they_differ():
    assert report_runs.short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert report_runs.short_names(["x/a", "y/a"]) == ["x/a", "y/a"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "report needs the folders of runs"),
        (["a", "none"], "none is not the folder of a run: it has neither args.json nor log.jsonl"),
        (["a", "./a"], "./a is named twice"),
        (["a", "--output", "."], "--output . is a folder: give the name of a file"),
        (["a", "--output", "a/args.json"], "--output a/args.json is a file that is no HTML page"),
    ],
)
def test_what_is_no_run_is_one_sentence_and_status_2(
    tmp_path, monkeypatch, capsys, data, words, sentence
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", data)
    before = (tmp_path / "a" / "args.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: visualize.main(["report", *words]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))
    assert (tmp_path / "a" / "args.json").read_bytes() == before
