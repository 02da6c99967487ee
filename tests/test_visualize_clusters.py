"""visualize.py clusters: the cluster of each image, its files and folders, and the pictures."""

import csv
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import visualize
from src.data.datasets import open_dataset
from src.labels.agreement import Overlaps
from src.nets.backbones import build_backbone
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.nets.resnet import build_model
from src.pictures import cluster_contents, cluster_tables, clusters, sheets
from src.pictures.cluster_tables import Clusters
from src.run import checkpoint
from src.run import flags as cli
from tests.reference import assert_best

ROOT = Path(__file__).parent.parent
QUICK = ["--device", "cpu", "--workers", "0", "--num_shown", "3", "--num_images", "2"]
NETWORK = {"arch": "resnet10", "stem": "small", "width": 0.125, "hidden_mlp": 16, "feat_dim": 8}
NETWORK |= {"head_dims": None, "head_bn": True, "zero_init_residual": False, "in_chans": 3}


def cluster(*argv):
    assert visualize.main(["clusters", *QUICK, *map(str, argv)]) == 0


def make_run(folder, data, nmb_prototypes=(12,), **changes):
    """A run of SwAV that was never trained; without prototypes it is one of SimCLR."""
    arguments = {**NETWORK, "size_crops": [8], "data_path": str(data), "seed": 3, "mean": [0.3] * 3}
    arguments |= {"std": [0.4] * 3, **changes}
    if nmb_prototypes:
        arguments["nmb_prototypes"] = list(nmb_prototypes)
    names = {"feat_dim": "output_dim"}
    options = {names.get(name, name): x for name, x in {**NETWORK, **changes}.items()}
    torch.manual_seed(1)
    sets = list(nmb_prototypes) if len(nmb_prototypes) > 1 else sum(nmb_prototypes)
    model = build_model(options.pop("arch"), normalize=True, nmb_prototypes=sets, **options)
    for name, weight in model.named_parameters():
        if name.startswith("prototypes"):  # not of length 1, as after the last step of a run
            weight.data.mul_(torch.linspace(0.5, 2, len(weight))[:, None])
    checkpoint.save_checkpoint(folder, {"model": model.state_dict(), "epoch": 1})
    (folder / "args.json").write_text(json.dumps(arguments))
    return model.eval()


def make_images(folder, count=60, classes=5, size=8):
    """Class folders of images whose names are the same in each."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class {i % classes}" if classes else folder
        path.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size, size, 3), np.uint8) // (1 + i % 4)
        pixels[:, : i % 7] = 255
        Image.fromarray(pixels).save(path / f"im,age{i // max(1, classes)}.png")
    return folder


def load(folder):
    """Lines of clusters.csv, the arrays and the summary."""
    with open(folder / "clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    return rows, arrays, json.loads((folder / "clusters.json").read_text())


@torch.no_grad()
def plain_embedding(model, data, forward=None, split="train"):
    dataset = open_dataset(str(data), split)
    images = torch.stack([dataset.load(i) for i in range(len(dataset))])
    return (forward or model)((images.float() / 255 - 0.3) / 0.4)


@pytest.fixture
def run(tmp_path):
    make_images(tmp_path / "images")
    return tmp_path / "run", make_run(tmp_path / "run", tmp_path / "images")


# ============ assignments ============
@pytest.mark.slow
def test_every_image_is_in_the_cluster_of_its_nearest_prototype(run, tmp_path):
    folder, model = run
    cluster("--pretrained", folder)
    rows, arrays, summary = load(folder / "plots" / "clusters")  # beside the run
    embedding, _ = plain_embedding(model, tmp_path / "images")
    cosines = F.normalize(embedding) @ F.normalize(model.prototypes.weight.detach()).t()  # (N, K)
    assert_best(arrays["assignments"], cosines, 1e-5)
    assert len(set(arrays["assignments"].tolist())) > 3  # the test tells something
    assert arrays["assignments"].dtype == np.int64 and arrays["similarities"].dtype == np.float32
    np.testing.assert_allclose(arrays["similarities"], cosines.amax(1), atol=1e-5)
    expected = F.normalize(model.prototypes.weight.detach())
    np.testing.assert_allclose(arrays["centroids"], expected, atol=1e-6)
    assert set(arrays) == {"assignments", "similarities", "centroids"}
    assert summary["images"] == 60 and summary["num_clusters"] == 12


@pytest.mark.slow
def test_the_csv_has_each_image_once_in_the_order_of_the_data(run, tmp_path):
    folder, _ = run
    cluster("--pretrained", folder)
    rows, arrays, summary = load(folder / "plots" / "clusters")
    files = sorted((tmp_path / "images").rglob("*.png"), key=lambda path: os.fsencode(path))
    assert [row["file"] for row in rows] == [str(path) for path in files]
    assert [int(row["index"]) for row in rows] == list(range(60))
    assert [int(row["cluster"]) for row in rows] == arrays["assignments"].tolist()
    cosines = [float(row["cosine"]) for row in rows]
    np.testing.assert_allclose(cosines, arrays["similarities"], atol=1e-6)
    assert [row["class"] for row in rows] == [path.parent.name for path in files]
    assert [f"class {row['label']}" for row in rows] == [row["class"] for row in rows]
    sizes = np.bincount(arrays["assignments"], minlength=12)
    assert {x["cluster"]: x["size"] for x in summary["clusters"]} == {
        number: size for number, size in enumerate(sizes.tolist()) if size
    }
    used = sizes[sizes > 0]
    assert summary["empty"] == 12 - len(used)
    expected = [used.min(), np.median(used), used.max()]
    assert [summary[f"size_{name}"] for name in ("min", "median", "max")] == expected


@pytest.mark.slow
def test_each_of_several_heads_has_its_clusters(tmp_path):
    make_images(tmp_path / "images")
    model = make_run(tmp_path / "run", tmp_path / "images", (6, 9))
    cluster("--pretrained", tmp_path / "run", "--head", "1")
    _, arrays, summary = load(tmp_path / "run" / "plots" / "clusters")
    embedding, _ = plain_embedding(model, tmp_path / "images")
    heads = [model.prototypes.prototypes0, model.prototypes.prototypes1]
    for head, assignments in zip(heads, arrays["assignments_heads"], strict=True):
        assert_best(assignments, embedding @ F.normalize(head.weight.detach()).t(), 1e-5)
    assert np.array_equal(arrays["assignments"], arrays["assignments_heads"][1])
    assert arrays["centroids"].shape == (9, 8)
    assert summary["num_clusters"] == 9 and summary["settings"]["head"] == 1
    make_run(tmp_path / "run", tmp_path / "images")  # a later call leaves none of another network
    cluster("--pretrained", tmp_path / "run")
    assert "assignments_heads" not in load(tmp_path / "run" / "plots" / "clusters")[1]


@pytest.mark.slow
def test_a_file_without_a_run_is_known_by_its_prototypes(run, tmp_path):
    folder, model = run
    weights = {f"module.{name}": x for name, x in model.state_dict().items()}
    torch.save(weights, tmp_path / "released.pth.tar")
    cluster("--pretrained", folder)
    flags = ["--arch", "resnet10", "--stem", "small", "--width", ".125", "--hidden_mlp", "16"]
    flags += ["--feat_dim", "8", "--size", "8", "--mean", *[0.3] * 3, "--std", *[0.4] * 3]
    flags += ["--data_path", tmp_path / "images", "--dump_path", tmp_path / "out"]
    cluster("--pretrained", tmp_path / "released.pth.tar", *flags)
    there, here = (load(x)[1] for x in (folder / "plots" / "clusters", tmp_path / "out"))
    assert np.array_equal(there["assignments"], here["assignments"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "head",
    [
        {},
        {"nlayers": 1},
        {"use_bn": True, "norm_last_layer": False},
        {"l2_bottleneck": False, "nlayers": 2},
        {"l2_bottleneck": False, "nlayers": 1},
    ],
)
def test_the_cluster_of_dino_is_the_largest_output_of_the_teacher(tmp_path, head):
    make_images(tmp_path / "images", count=30)
    networks = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        backbone = build_backbone("vit_tiny", patch_size=4, img_size=8, depth=1, width=0.34)
        network = MultiCropWrapper(
            backbone, DINOHead(backbone.num_features, 16, hidden_dim=20, bottleneck_dim=6, **head)
        )
        for parameter in network.head.parameters():  # all of it matters
            torch.nn.init.normal_(parameter)
        networks[name] = network.eval()
        mean = plain_embedding(network, tmp_path / "images", backbone).mean(0)
        linear = [x for x in network.head.modules() if isinstance(x, torch.nn.Linear)]
        first = next(x for x in linear if x.in_features == backbone.num_features)
        first.bias.data = -first.weight.data @ mean  # or all images would be in one cluster
    states = {name: network.state_dict() for name, network in networks.items()}
    checkpoint.save_checkpoint(tmp_path / "run", {**states, "epoch": 1})
    arguments = {"arch": "vit_tiny", "patch_size": 4, "depth": 1, "width": 0.34, "seed": 1}
    arguments |= {"global_crops_size": 8, "data_path": str(tmp_path / "images"), "img_size": None}
    arguments |= {"mean": [0.3] * 3, "std": [0.4] * 3}
    (tmp_path / "run" / "args.json").write_text(json.dumps(arguments))
    for key in ("teacher", "student"):
        flags = ["--checkpoint_key", key] if key == "student" else []
        cluster("--pretrained", tmp_path / "run", *flags)
        _, arrays, _ = load(tmp_path / "run" / "plots" / "clusters")
        outputs = plain_embedding(networks[key], tmp_path / "images")
        assert_best(arrays["assignments"], outputs, 1e-4 * outputs.abs().max().item())
        assert len(set(arrays["assignments"].tolist())) > 1
    last = networks["student"].head.last_layer
    bottleneck = head.get("l2_bottleneck", True)
    weight = last.weight_v * last.weight_g.sign() if bottleneck else last.weight
    np.testing.assert_allclose(arrays["centroids"], F.normalize(weight.detach()), atol=1e-6)
    inputs = []
    last.register_forward_pre_hook(lambda _, given: inputs.append(F.normalize(given[0])))
    plain_embedding(networks["student"], tmp_path / "images")
    nearest = torch.from_numpy(arrays["centroids"][arrays["assignments"]])
    cosines = (inputs[0] * nearest).sum(1)
    np.testing.assert_allclose(arrays["similarities"], cosines, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["backbone", "embedding"])
def test_features_without_prototypes_are_clustered_by_k_means(tmp_path, feature):
    make_images(tmp_path / "images")
    model = make_run(tmp_path / "run", tmp_path / "images", ())
    cluster("--pretrained", tmp_path / "run", "--num_clusters", 5, "--feature", feature)
    _, arrays, summary = load(tmp_path / "run" / "plots" / "clusters")
    forward = model.forward_backbone if feature == "backbone" else model
    features = F.normalize(plain_embedding(model, tmp_path / "images", forward)).numpy()
    cosines = features @ arrays["centroids"].T
    assert_best(arrays["assignments"], cosines, 1e-5)
    np.testing.assert_allclose(arrays["similarities"], cosines.max(1), atol=1e-5)
    for number in range(5):  # each centroid is the direction of the sum of its images
        total = features[arrays["assignments"] == number].sum(0)
        np.testing.assert_allclose(
            arrays["centroids"][number], total / np.linalg.norm(total), atol=1e-3
        )
    assert summary["empty"] == 0 and summary["settings"]["num_clusters"] == 5
    cluster("--pretrained", tmp_path / "run", "--num_clusters", 5, "--feature", feature)
    assert np.array_equal(
        load(tmp_path / "run" / "plots" / "clusters")[1]["assignments"], arrays["assignments"]
    )


@pytest.mark.slow
def test_the_digits_of_an_untrained_network_are_clustered_with_a_warning(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    cluster("--num_clusters", 7, "--split", "val", "--width", "0.125", "--folders")
    rows, arrays, summary = load(tmp_path / "plots" / "clusters")
    assert len(rows) == 500 and rows[3]["file"] == "image 3"
    said = capsys.readouterr().out
    assert "UNTRAINED" in said and said.splitlines()[-1].endswith("plots/clusters/clusters.png")
    dataset = open_dataset("digits", "val")
    for index in (0, 123):  # they are no files: the images themselves
        (path,) = (tmp_path / "plots/clusters/folders").glob(f"*/{index:06}_*.png")
        assert path.parent.name == str(arrays["assignments"][index])
        assert path.stem == f"{index:06}_{dataset.labels[index]}"
        picture = np.asarray(Image.open(path)).transpose(2, 0, 1)
        assert np.array_equal(picture, dataset.load(index).numpy())


def test_assignments_do_not_depend_on_how_many_scores_are_computed_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator)
    weight = torch.randn(9, 6, generator=generator)
    whole = cluster_tables.nearest(features, weight, torch.zeros(9))
    monkeypatch.setattr(cluster_tables, "SCORES_AT_ONCE", 30)
    parts = cluster_tables.nearest(features, weight)
    for labels, *_ in (whole, parts):
        assert_best(labels, features.double() @ weight.double().t(), 1e-5)
    assert torch.allclose(whole[1], parts[1])
    assert (cluster_tables.nearest(features, weight, torch.eye(9)[4] * 99)[0] == 4).all()


# ============ labels ============
def test_purity_and_nmi_of_a_hand_made_case():
    assignments = torch.tensor([0, 0, 0, 2, 2, 2, 2, -1])
    labels = torch.tensor([1, 1, 0, 0, 0, 1, 1, 2])
    found = Clusters(assignments, torch.rand(8), torch.eye(3), labels, ["a", "b", "c"])
    assert found.sizes.tolist() == [3, 0, 4] and found.matching.tolist() == [2, 0, 2]
    assert found.majority[[0, 2]].tolist() == [1, 0]  # of equal ones the lowest
    numbers = found.summary()
    assert numbers["purity"] == pytest.approx(4 / 7) and numbers["unreadable"] == 1
    p = np.array([[1, 2], [2, 2]]) / 7  # clusters 0 and 2, labels 0 and 1
    rows, columns = p.sum(1, keepdims=True), p.sum(0, keepdims=True)
    information = (p * np.log(p / rows / columns)).sum()
    entropies = [-(x * np.log(x)).sum() for x in (rows, columns)]
    assert numbers["nmi"] == pytest.approx(information / np.sqrt(np.prod(entropies)))
    assert (numbers["empty"], numbers["size_min"], numbers["size_max"]) == (1, 3, 4)
    assert found.cosines.isnan().tolist() == [False] * 7 + [True]


@pytest.mark.slow
def test_purity_is_counted_as_it_is_said(run, capsys):
    folder, _ = run
    cluster("--pretrained", folder)
    rows, _, summary = load(folder / "plots" / "clusters")
    for each in summary["clusters"]:
        names = [row["class"] for row in rows if int(row["cluster"]) == each["cluster"]]
        assert each["purity"] == pytest.approx(names.count(each["class"]) / len(names))
        assert names.count(each["class"]) == max(names.count(name) for name in names)
    share = sum(each["purity"] * each["size"] for each in summary["clusters"]) / 60
    assert summary["purity"] == pytest.approx(share)
    said = " ".join(capsys.readouterr().out.split())  # lines are divided
    assert f"purity {summary['purity']:.1%}, NMI {summary['nmi']:.3f}" in said


@pytest.mark.slow
def test_images_without_labels_have_neither_label_nor_purity(tmp_path, capsys):
    make_images(tmp_path / "images", classes=0)
    make_run(tmp_path / "run", tmp_path / "images")
    cluster("--pretrained", tmp_path / "run", "--folders")
    out = tmp_path / "run" / "plots" / "clusters"
    rows, _, summary = load(out)
    assert list(rows[0]) == ["index", "file", "cluster", "cosine"] and len(rows) == 60
    assert "purity" not in summary and "nmi" not in summary
    assert set(summary["clusters"][0]) == {"cluster", "size", "colour_spread"}
    assert "purity" not in capsys.readouterr().out
    assert (out / "sizes.png").is_file() and (out / "clusters.png").is_file()
    assert len(list(out.glob("folders/*/000007_im_age*.png"))) == 1


# ============ what clusters know ============
@pytest.mark.slow
def test_measures_of_agreement_are_in_the_summary_and_are_said(run, tmp_path, capsys):
    folder, model = run
    cluster("--pretrained", folder, "--neighbours", 3)
    _, arrays, summary = load(folder / "plots" / "clusters")
    dataset = open_dataset(str(tmp_path / "images"))
    found = Overlaps(torch.from_numpy(arrays["assignments"]), dataset.labels).summary()
    assert {name: summary[name] for name in found} == pytest.approx(found)
    embedding, _ = plain_embedding(model, tmp_path / "images")
    edges = cluster_contents.same_class_edges(embedding, dataset.labels, 3, 0)
    assert summary["same_class_edges"] == pytest.approx(edges, abs=0.01)  # two may be equally near
    images = torch.stack([dataset.load(i) for i in range(len(dataset))])
    colours = images.double().mean((2, 3))
    of_all = colours.var(0, correction=0).mean().sqrt()
    assert summary["colour_spread_of_all"] == pytest.approx(of_all.item(), rel=1e-4)
    assert 0 < summary["colour_spread"] < summary["colour_spread_of_all"]
    spread, _, _ = cluster_contents.colour_spread(colours, torch.tensor(arrays["assignments"]), 12)
    for each in summary["clusters"]:
        assert each["colour_spread"] == pytest.approx(spread[each["cluster"]].item(), abs=1e-2)
    said = " ".join(capsys.readouterr().out.split())
    assert f"AMI {summary['ami']:.3f}, ARI {summary['ari']:.3f}" in said
    assert "of 3-NN edges in one class" in said and "colours spread by" in said
    assert Image.open(folder / "plots/clusters/colours.png").size[0] > 400
    cluster("--pretrained", folder, "--neighbours", 0)
    assert "same_class_edges" not in load(folder / "plots" / "clusters")[2]


@pytest.mark.slow
def test_metadata_of_a_list_are_compared_with_clusters_and_shown(
    run, tmp_path, capsys, monkeypatch
):
    folder, _ = run
    lines = ["path,who,place"]
    for path in sorted((tmp_path / "images").rglob("*.png")):
        number = int(re.search(r"age(\d+)", path.name)[1])
        lines.append(
            f'"{path.relative_to(tmp_path)}",{"ann" if number % 2 else "bob"},{number % 5 or ""}'
        )
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    described = []
    describe = clusters._describe
    monkeypatch.setattr(
        clusters, "_describe", lambda *a: described.append(describe(*a)) or describe(*a)
    )
    cluster("--pretrained", folder, "--data_path", tmp_path / "list.csv")
    rows, _, summary = load(folder / "plots" / "clusters")
    assert list(summary["metadata"]) == ["who", "place"] and "purity" not in summary
    assert summary["metadata"]["place"]["values"] == 4 and 0 < summary["metadata"]["who"]["nmi"] < 1
    for each in summary["clusters"]:
        members = [int(row["index"]) for row in rows if int(row["cluster"]) == each["cluster"]]
        who = [lines[1 + i].split(",")[-2] for i in members]
        found = each["dominant"]["who"]
        assert found["share"] == pytest.approx(who.count(found["value"]) / len(who))
        assert who.count(found["value"]) >= len(who) / 2
    texts = [text for cluster_lines in described for text in cluster_lines]
    assert any(re.fullmatch(r"who: (ann|bob) \d+ %", text) for text in texts)
    assert "with place: NMI" in capsys.readouterr().out
    cluster("--pretrained", folder, "--data_path", tmp_path / "list.csv", "--columns", "who")
    assert list(load(folder / "plots" / "clusters")[2]["metadata"]) == ["who"]


@pytest.mark.slow
def test_prototypes_that_repeat_each_other_are_counted_with_a_warning(run, capsys):
    folder, model = run
    weight = model.prototypes.weight.data
    assert weight.shape == (12, 8)
    cluster("--pretrained", folder)
    assert load(folder / "plots" / "clusters")[2]["unique"] == 12
    assert "WARNING" not in capsys.readouterr().out
    weight[3:] = weight[:3].repeat(3, 1) * torch.rand(9, 1)
    checkpoint.save_checkpoint(folder, {"model": model.state_dict(), "epoch": 1})
    cluster("--pretrained", folder)
    assert load(folder / "plots" / "clusters")[2]["unique"] == 3
    assert "WARNING: only 3 of 12 centroids are unique" in capsys.readouterr().out


# ============ folders ============
@pytest.mark.slow
def test_the_links_are_the_files_of_each_cluster(run, tmp_path, monkeypatch):
    folder, _ = run
    monkeypatch.chdir(tmp_path)  # links are absolute, --data_path is not
    cluster("--pretrained", folder, "--data_path", "images", "--folders", "--dump_path", "out")
    rows, _, _ = load(tmp_path / "out")
    links = list((tmp_path / "out" / "folders").glob("*/*"))
    assert len(links) == len({os.path.realpath(link) for link in links}) == 60
    for link in links:
        row = rows[int(link.name.split("_")[0])]
        assert link.is_symlink() and link.resolve() == (tmp_path / row["file"]).resolve()
        assert int(link.parent.name) == int(row["cluster"]) and len(link.parent.name) == 2
        assert link.name == f"{int(row['index']):06}_class_{row['label']}_{link.name[15:]}"
        assert Image.open(link).size == (8, 8)


@pytest.mark.slow
def test_folders_of_an_earlier_call_are_not_mixed_with_new_ones(run, capsys):
    folder, _ = run
    cluster("--pretrained", folder, "--folders")
    before = sorted((folder / "plots/clusters/folders").rglob("*"))
    with pytest.raises(ValueError, match="--folders: .*folders is there already"):
        cluster("--pretrained", folder, "--folders")
    cluster("--pretrained", folder)
    assert "is of an earlier call" in capsys.readouterr().out
    assert sorted((folder / "plots/clusters/folders").rglob("*")) == before


@pytest.mark.slow
def test_a_broken_file_is_in_no_cluster(run, tmp_path):
    folder, _ = run
    (tmp_path / "images" / "class 2" / "broken.png").write_bytes(b"no image")
    cluster("--pretrained", folder, "--folders")
    rows, arrays, summary = load(folder / "plots" / "clusters")
    (row,) = [row for row in rows if row["file"].endswith("broken.png")]
    assert (row["cluster"], row["cosine"], row["class"]) == ("-1", "nan", "class 2")
    assert arrays["assignments"][int(row["index"])] == -1
    assert np.isnan(arrays["similarities"]).sum() == summary["unreadable"] == 1
    assert sum(each["size"] for each in summary["clusters"]) == 60 == len(rows) - 1
    assert not list((folder / "plots/clusters/folders").glob("*/*broken*"))


@pytest.mark.slow
def test_images_of_tar_shards_are_written_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for path in sorted(make_images(tmp_path / "images", count=9, classes=0).iterdir()):
            for name, data in ((path.name, path.read_bytes()), (f"{path.stem}.cls", b"x/y")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    cluster("--pretrained", tmp_path / "run", "--folders")
    out = tmp_path / "run" / "plots" / "clusters"
    rows, _, _ = load(out)
    assert rows[4]["file"] == f"{tmp_path}/a.tar:im,age4" and rows[4]["class"] == "x/y"
    (path,) = out.glob("folders/*/000004_x_y.png")
    expected = np.asarray(Image.open(tmp_path / "images" / "im,age4.png"))
    assert np.array_equal(np.asarray(Image.open(path)), expected)


# ============ pictures ============
@pytest.mark.slow
def test_the_sheet_has_a_row_for_each_cluster_and_its_images(run, tmp_path, drawn):
    folder, _ = run
    out = folder / "plots" / "clusters"
    cluster("--pretrained", folder, "--num_shown", "4", "--num_images", "3")
    rows = drawn["clusters.png"].boxes
    assert len(rows) == 4 and all(len(nearest) <= 3 >= len(others) for nearest, others in rows)
    assert Image.open(out / "sizes.png").size[0] > 400
    rows, arrays, _ = load(out)
    number = int(np.bincount(arrays["assignments"]).argmax())
    cluster("--pretrained", folder, "--show", number, "--num_images", "2")
    sheet = np.asarray(Image.open(out / "clusters.png"))
    ((boxes, _),) = drawn["clusters.png"].boxes
    assert len(boxes) == 2
    members = np.flatnonzero(arrays["assignments"] == number)
    nearest = members[arrays["similarities"][members].argmax()]
    picture = open_dataset(str(tmp_path / "images")).load(int(nearest)).permute(1, 2, 0).numpy()
    left, top, right, bottom = boxes[0]
    assert (right - left, bottom - top) == (72, 72)
    tile = sheet[top:bottom, left:right][4::9, 4::9]
    assert np.array_equal(tile, picture)


def test_the_images_of_a_row_are_the_nearest_and_others():
    assignments = torch.tensor([0, 1, 0, 0, 0, 0, 1, 0, -1])
    cosines = torch.tensor([0.1, 0.9, 0.5, 0.8, 0.8, 0.2, 0.3, 0.4, 0.0])
    found = Clusters(assignments, cosines, torch.eye(3))
    nearest, others = clusters.choose_images(found, 0, 2, seed=1)
    assert nearest == [3, 4] and len(others) == 2 and set(others) < {0, 2, 5, 7}
    assert (nearest, others) == clusters.choose_images(found, 0, 2, seed=1)
    drawn = [clusters.choose_images(found, 0, 2, seed=seed)[1] for seed in range(9)]
    assert set().union(*drawn) == {0, 2, 5, 7}
    assert clusters.choose_images(found, 1, 5, seed=1) == ([1, 6], [])
    assert clusters.choose_images(found, 2, 5, seed=1) == ([], [])


def test_the_clusters_that_are_shown_are_of_all_sizes():
    sizes = torch.tensor([5, 0, 9, 1, 7, 0, 3])
    assert clusters.choose_clusters(sizes, 20) == [2, 4, 0, 6, 3]
    assert clusters.choose_clusters(sizes, 3) == [2, 0, 3]
    assert clusters.choose_clusters(sizes, 1) == [2]


def test_an_image_of_another_class_has_a_red_frame(run, tmp_path, drawn):
    dataset = open_dataset(str(make_images(tmp_path / "more", count=4, classes=2)))
    dataset.labels = torch.tensor([0, 0, 0, 1])
    found = Clusters(
        torch.zeros(4).long(), torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.eye(1), dataset.labels
    )
    clusters.draw_clusters(found, dataset, [0], 4, 0, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    ((boxes, _),) = drawn["sheet.png"].boxes
    corners = [sheet[top - 1, left - 1] for left, top, _, _ in boxes]
    assert [(corner == clusters.OTHER).all() for corner in corners] == [False] * 3 + [True]


@pytest.mark.slow
def test_an_empty_cluster_a_long_name_and_an_old_pillow_are_drawn(
    run, tmp_path, monkeypatch, drawn
):
    folder, _ = run
    cluster("--pretrained", folder)
    empty = sorted(set(range(12)) - set(load(folder / "plots/clusters")[1]["assignments"]))[0]
    names = [f"a very long name that has no end é \udcff {i}" for i in range(5)]
    old = sheets.ImageFont.load_default()

    def load_default():  # before Pillow 10.1 it took no size
        return old

    dataset = open_dataset(str(tmp_path / "images"))
    assignments = torch.from_numpy(np.load(folder / "plots/clusters/assignments.npy"))
    found = Clusters(assignments, torch.rand(60), torch.eye(12), dataset.labels, names)
    clusters.draw_clusters(found, dataset, [empty, 0], 2, 0, tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # whose font is taken else
    monkeypatch.setattr(sheets.ImageFont, "load_default", load_default)
    sheets.font_of.cache_clear()
    clusters.draw_clusters(found, dataset, [empty, 0], 2, 0, tmp_path / "b.png")
    sheets.font_of.cache_clear()
    for name in ("a.png", "b.png"):
        assert [list(map(len, row)) for row in drawn[name].boxes][0] == [0, 0]


def test_without_matplotlib_all_else_is_written(run, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cluster("--pretrained", folder)
    out = folder / "plots" / "clusters"
    assert "no sizes.png, no colours.png: pip install matplotlib" in capsys.readouterr().out
    assert (out / "clusters.png").is_file() and not (out / "sizes.png").exists()


# ============ the command line ============
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pretrained", "{simclr}"], "--pretrained {simclr} has no prototypes"),
        ([], "an untrained network has no prototypes"),
        (["--pretrained", "{run}", "--head", "1"], "--head 1 is not one of the 1 of"),
        (
            ["--pretrained", "{run}", "--num_clusters", "61"],
            "--num_clusters 61 is more than the 60",
        ),
        (["--pretrained", "{run}", "--num_clusters", "3", "--head", "1"], "leave it out"),
        (["--pretrained", "{run}", "--show", "2", "12"], "--show 12 is not there"),
        (["--pretrained", "{run}", "--num_clusters", "3", "--show", "3"], "numbered 0 to 2"),
        (["--pretrained", "nowhere"], "no weights file nowhere"),
        (["--pretrained", "{run}", "--data_path", "nowhere"], "--data_path nowhere does not exist"),
        (["--pretrained", "{run}", "--train_path", "nowhere"], "--train_path nowhere does not"),
        (["--pretrained", "{run}", "--mean", "1"], "--mean has 1 values"),
        (["--pretrained", "{run}", "--columns", "who"], "they have no metadata"),
        (["--num_clusters", "0"], "must be above 0"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, run, capsys, flags, sentence):
    paths = {"run": tmp_path / "run", "simclr": tmp_path / "simclr"}
    make_run(paths["simclr"], tmp_path / "images", ())
    flags = [flag.format(**paths) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: visualize.main(["clusters", *QUICK, *flags]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert sentence.format(**paths) in error
    assert not (tmp_path / "run" / "plots").exists()  # before anything is written


def test_weights_that_are_not_finite_stop_the_script(run):
    folder, model = run
    torch.nn.init.constant_(model.conv1.weight, torch.nan)
    checkpoint.save_checkpoint(folder, {"model": model.state_dict()})
    with pytest.raises(ValueError, match="makes features that are not finite"):
        cluster("--pretrained", folder)


def test_every_flag_is_read_and_explained():
    commands = next(x for x in visualize.get_parser()._actions if x.dest == "picture")
    text = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for action in commands.choices["clusters"]._actions:
        if action.dest in ("help", "dist_url", "world_size", "rank", "local_rank", "debug_slurm"):
            continue
        assert action.help, action.dest
        assert re.search(rf'args\.{action.dest}\b|"{action.dest}"[,\])]', text), action.dest
