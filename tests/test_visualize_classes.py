"""visualize.py classes: means, their image, points by PCA and t-SNE, whole runs, misuse."""

import csv
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from src.pictures.class_map import class_means, draw_class_map, place_by_pca, place_by_tsne

QUICK = shlex.split("--device cpu --workers 0 --arch resnet10 --stem small --width 0.125 --size 16")


def draw(folder, *argv):
    words = ["classes", *QUICK, "--dump_path", folder, *argv]
    assert visualize.main([str(word) for word in words]) == 0
    with open(folder / "classes.csv") as file:
        return list(csv.DictReader(file))


def groups(number=6):
    """Means of two groups of classes, far apart, in ten dimensions."""
    draws = torch.Generator().manual_seed(0)
    means = 0.3 * torch.randn(number, 10, generator=draws).double()
    means[number // 2 :, 3] += 9
    return means


def test_a_class_lies_at_its_mean_and_is_shown_by_the_image_nearest_to_it():
    draws = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 5, generator=draws), torch.arange(40) % 4 * 2  # 0, 2, 4, 6
    means, classes, rows = class_means(features, labels)
    assert classes.tolist() == [0, 2, 4, 6]
    for c, label in enumerate(classes.tolist()):
        own = (labels == label).nonzero()[:, 0]
        torch.testing.assert_close(means[c], features[own].double().mean(0))
        distances = (features[own].double() - means[c]).norm(dim=1)
        assert rows[c] == own[distances.argmin()]


def test_principal_components_keep_distances_and_come_in_order():
    means = groups()
    points = place_by_pca(means, 5)
    assert points.shape == (6, 5)
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(means, means))
    assert (points.var(0).diff() <= 0).all() and points.mean(0).abs().max() < 1e-9


def test_tsne_keeps_groups_together_and_is_the_same_for_the_same_seed():
    options = {"perplexity": 2.0, "learning_rate": 10.0, "iterations": 300}
    points = place_by_tsne(groups(12), 5, seed=3, **options)
    assert points.shape == (12, 2)
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert (distances.argmin(1) // 6 == torch.arange(12) // 6).all()
    assert torch.equal(points, place_by_tsne(groups(12), 5, seed=3, **options))
    with pytest.raises(ValueError, match="--perplexity 12 must be below the number of classes, 12"):
        place_by_tsne(groups(12), 5, seed=3, **{**options, "perplexity": 12.0})


def test_thumbnails_are_where_their_points_are(tmp_path):
    points = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]]).double()
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    pictures = [Image.new("RGB", (8, 8), colour) for colour in colours]
    draw_class_map(points, list("abcd"), pictures, tmp_path / "map.png", "title", ["a note"])
    pixels = np.asarray(Image.open(tmp_path / "map.png")).astype(int)
    centres = []
    for colour in colours:
        rows, columns = np.nonzero((pixels == colour).all(2))
        centres.append((columns.mean(), rows.mean()))
    left_below, right_above, left_above, right_below = centres
    assert abs(left_below[0] - left_above[0]) < 1 and abs(right_above[1] - left_above[1]) < 1
    assert right_above[0] > left_above[0] + 500 and right_below[1] > right_above[1] + 500


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_classes_of_the_data_are_drawn_with_a_table(tmp_path, method):
    rows = draw(tmp_path, "--method", method, "--iterations", 250)
    assert [row["class"] for row in rows] == [str(c) for c in range(10)]
    assert sum(int(row["images"]) for row in rows) == 500  # validation images
    assert len({(row["x"], row["y"]) for row in rows}) == 10
    assert Image.open(tmp_path / "classes.png").width > 1000


def test_data_without_labels_or_with_few_classes_is_refused(tmp_path):
    for kind in ("flat", "two/a", "two/b"):
        (tmp_path / kind).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 20), (50 * i, 0, 0)).save(tmp_path / kind / f"{i}.png")
    with pytest.raises(ValueError, match="--data_path"):
        draw(tmp_path / "out", "--data_path", tmp_path / "flat")
    with pytest.raises(ValueError, match="has 2 classes: a map needs four"):
        draw(tmp_path / "out", "--data_path", tmp_path / "two")
