"""The sets of buildings: what their files say, and what is wrong with other files."""

import os
import pickle
import shutil

import numpy as np
import pytest

from src.evaluate.retrieval_sets import DAMAGED, open_buildings, open_revisited
from tests.building_images import NAMES, ground_truth, write_buildings, write_revisited


def listed(relevance):
    return [(x.positives.tolist(), x.junk.tolist(), x.count()) for x in relevance]


def test_medium_takes_easy_and_hard_and_hard_ignores_the_easy_ones(tmp_path):
    found = open_revisited(str(write_revisited(tmp_path)), "roxford5k")
    assert found.images == [f"{name}.jpg" for name in NAMES]
    assert found.queries == ["query_0.jpg", "query_1.jpg", "query_2.jpg"]
    assert listed(found.relevance["Medium"])[1] == ([1, 4, 10], [7], 3)
    assert listed(found.relevance["Hard"])[1] == ([10], [7, 1, 4], 1)
    assert found.boxes.tolist() == [[2, 3, 20, 21]] * 3
    database = found.open_images(found.images, "database", 3)
    assert len(database) == 12 and database.load(1).shape == (3, 24, 32)
    again = open_revisited(str(tmp_path / "roxford5k"), "roxford5k")  # the folder itself
    assert again.folder == found.folder


def test_a_ground_truth_that_asks_for_more_is_refused_and_not_executed(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    write_revisited(tmp_path)
    file = tmp_path / "roxford5k" / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps({**ground_truth(), "harm": Harm()}))
    with pytest.raises(ValueError, match="gnd_roxford5k.pkl asks for posix.mkdir"):
        open_revisited(str(tmp_path), "roxford5k")
    assert not (tmp_path / "harm").exists()


def change(path, value):
    truth = ground_truth()
    place = truth
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return truth


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("gnd", 0, "easy"), np.array([12]), "beyond its 12"),
        (("gnd", 0, "easy"), np.array([0.5]), "no ground truth of roxford5k"),
        (("gnd", 0), {"ok": [1]}, "no ground truth of roxford5k.*KeyError"),
        (("gnd",), ground_truth()["gnd"][:2], "has 3 queries and judges 2"),
        (("imlist",), ["../../etc/passwd", *NAMES[1:]], "no file's name"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_named(tmp_path, path, value, words):
    write_revisited(tmp_path)
    file = tmp_path / "roxford5k" / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(change(path, value)))
    with pytest.raises(ValueError, match=words):
        open_revisited(str(tmp_path), "roxford5k")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no rparis6k/gnd_rparis6k.pkl"):
        open_revisited(str(tmp_path), "rparis6k")
    found = open_revisited(str(write_revisited(tmp_path)), "roxford5k")
    (found.folder / "place_000004.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no .*place_000004.jpg, which roxford5k names"):
        found.open_images(found.images, "database", 3)


def test_good_and_ok_images_of_the_first_sets_are_positive(tmp_path):
    found = open_buildings(str(write_buildings(tmp_path / "oxford")), "Oxford")
    assert found.images == [f"{name}.jpg" for name in NAMES]
    assert found.queries == ["place_000000.jpg", "place_000001.jpg", "place_000002.jpg"]
    assert listed(found.relevance["all"])[2] == ([2, 5, 11], [8], 3)
    assert found.boxes.tolist() == [[2, 3, 20.5, 21]] * 3
    assert found.query_files[0] == str(tmp_path / "oxford" / "lab" / "place_1")


def test_damaged_images_of_paris_are_no_part_of_the_database_and_are_missed(tmp_path):
    folder = write_buildings(tmp_path / "paris", prefix="")
    damaged = "paris_louvre_000136"
    assert damaged in DAMAGED and len(DAMAGED) == 20
    # In folders of their buildings, as the archives have them; the text files lie beside those.
    (folder / "jpg" / "louvre").mkdir()
    os.rename(folder / "jpg" / "place_000003.jpg", folder / "jpg" / "louvre" / f"{damaged}.jpg")
    good = folder / "lab" / "place_1_good.txt"
    good.write_text(good.read_text().replace("place_000003", damaged))
    for file in (folder / "lab").iterdir():
        shutil.move(file, folder)
    found = open_buildings(str(folder), "Paris")
    assert len(found.images) == 11
    assert listed(found.relevance["all"])[0] == ([0, 8], [5], 3)


def test_other_folders_are_refused(tmp_path):
    folder = write_buildings(tmp_path / "oxford")
    with pytest.raises(FileNotFoundError, match="has no text files of queries"):
        open_buildings(str(tmp_path / "nothing"), "Oxford")
    (folder / "lab" / "place_1_query.txt").write_text("place_000001 1 2\n")
    with pytest.raises(ValueError, match="place_1_query.txt should hold"):
        open_buildings(str(folder), "Oxford")
    (folder / "lab" / "place_1_query.txt").write_text("gone 1 2 3 4\n")
    with pytest.raises(FileNotFoundError, match="no gone.jpg"):
        open_buildings(str(folder), "Oxford")
    (folder / "lab" / "place_1_query.txt").write_text("place_000001 1 2 3 4\n")
    (folder / "lab" / "place_1_junk.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no .*place_1_junk.txt"):
        open_buildings(str(folder), "Oxford")
