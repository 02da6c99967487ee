"""Images, queries and ground truth of the Oxford and Paris buildings, revisited and first, as distributed.

Revisited (Radenovic et al. 2018, arXiv:1803.11285): roxford5k/gnd_roxford5k.pkl and roxford5k/jpg/, the
same for rparis6k. First (Philbin et al. 2007 and 2008): jpg/ and, in lab/ or beside it, text files for each
query, all_souls_1_query.txt, _good.txt, _ok.txt and _junk.txt.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.datasets import ImageDataset
from ..data.folders import FileSource, list_images
from .plain_pickle import read_plain_pickle
from .ranking import Relevance

REVISITED = ("roxford5k", "rparis6k")
# The set whose images the whitening of another is learnt on.
OTHER = {"roxford5k": "rparis6k", "rparis6k": "roxford5k", "Oxford": "Paris", "Paris": "Oxford"}
KINDS = ("easy", "hard", "junk")
LABEL_FOLDERS = ("lab", "gt_files_170407", "paris_120310", "gt", "labels", ".")
QUERY = "_query.txt"
OF_OXFORD = "oxc1_"  # before the names of images in Oxford's queries
# Images of the first Paris set that are damaged as distributed, and that evaluations leave out.
DAMAGED = frozenset(
    f"paris_{name}"
    for name in """louvre_000136 louvre_000146 moulinrouge_000422 museedorsay_001059 notredame_000188
    pantheon_000284 pantheon_000960 pantheon_000974 pompidou_000195 pompidou_000196 pompidou_000201
    pompidou_000467 pompidou_000640 sacrecoeur_000299 sacrecoeur_000330 sacrecoeur_000353 triomphe_000662
    triomphe_000833 triomphe_000863 triomphe_000867""".split()
)


@dataclass
class RetrievalSet:
    """A database of images, queries, and what each query should find.

    images, queries: paths relative to `folder`; boxes (Q, 4), in pixels of the query's image: left, top,
    right, bottom. relevance: of each query, by the name of an evaluation, such as Medium. query_files: of
    the first sets, where the text files of each query begin; else none. flag: that the set is given by.
    """

    name: str
    folder: Path
    images: list[str]
    queries: list[str]
    boxes: np.ndarray
    relevance: dict[str, list[Relevance]]
    query_files: list[str]
    flag: str

    def open_images(self, paths: list[str], what: str, in_chans: int, **reading) -> ImageDataset:
        """The images of some paths. what: they are, for people. reading: options of ImageDataset.

        Raises FileNotFoundError where one of them is not there.
        """
        for path in paths:
            if not (self.folder / path).exists():
                raise FileNotFoundError(
                    f"{self.flag}: there is no {self.folder / path}, which {self.name} names"
                )
        dataset = ImageDataset(
            ListedFiles(self.folder, paths),
            f"{self.name} {what}",
            in_chans,
            self.flag,
            **reading,
        )
        dataset.check_channels()
        return dataset


class ListedFiles(FileSource):
    """Image files of a folder, in the order of `paths`, which are relative to it."""

    def __init__(self, folder: Path, paths: list[str]):
        self.root = os.fsencode(folder)
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


# ============ revisited ============
def open_revisited(data_path: str, name: str) -> RetrievalSet:
    """roxford5k or rparis6k below `data_path`, or at it, with the evaluations Medium and Hard.

    Medium: easy and hard images are positive, junk is ignored. Hard: hard ones are positive, easy ones and
    junk are ignored (arXiv:1803.11285). Raises FileNotFoundError or ValueError.
    """
    file, folder = f"gnd_{name}.pkl", Path(data_path).expanduser()
    if (folder / name).is_dir():
        folder = folder / name
    if not (folder / file).is_file():
        raise FileNotFoundError(
            f"--data_path {data_path} has no {name}/{file}: give the folder that holds {name}/, with {file} "
            "and the images in jpg/"
        )
    path = folder / file
    truth = read_plain_pickle(path, "--data_path")
    try:
        images, queries = (_names(truth[kind], path) for kind in ("imlist", "qimlist"))
        found = truth["gnd"]
        judged = [[_indices(query[kind], len(images), path) for kind in KINDS] for query in found]
        boxes = [[float(x) for x in np.asarray(query["bbx"]).reshape(4)] for query in found]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"--data_path: {path} is no ground truth of {name}: it should hold gnd, imlist and qimlist, and "
            f"each query bbx, easy, hard and junk ({type(error).__name__}: {error})"
        ) from None
    if len(judged) != len(queries):
        raise ValueError(f"--data_path: {path} has {len(queries)} queries and judges {len(judged)}")
    relevance = {
        "Medium": [Relevance(np.concatenate([easy, hard]), junk) for easy, hard, junk in judged],
        "Hard": [Relevance(hard, np.concatenate([junk, easy])) for easy, hard, junk in judged],
    }
    return RetrievalSet(
        name=name,
        folder=folder / "jpg",
        images=[f"{image}.jpg" for image in images],
        queries=[f"{query}.jpg" for query in queries],
        boxes=np.array(boxes),
        relevance=relevance,
        query_files=[],
        flag="--data_path",
    )


def _names(values, path):
    """Names of images, each without a folder."""
    names = [str(value) for value in values]
    strange = next((x for x in names if x != os.path.basename(x) or x in ("", ".", "..")), None)
    if strange is not None:
        raise ValueError(
            f"--data_path: {path} names the image {strange!r}, which is no file's name"
        )
    return names


def _indices(values, num_images, path):
    """Indices into the database."""
    indices = np.asarray(values)
    if indices.size == 0:
        return np.empty(0, np.int64)
    if indices.dtype.kind not in "iu" or indices.ndim != 1:
        raise TypeError(f"indices of images are {indices.dtype} of shape {indices.shape}")
    if indices.min() < 0 or indices.max() >= num_images:
        raise ValueError(f"--data_path: {path} names an image beyond its {num_images}")
    return indices.astype(np.int64)


# ============ the first sets ============
def open_buildings(path: str, name: str) -> RetrievalSet:
    """The first Oxford or Paris buildings in a folder: jpg/ and the text files of the queries.

    name: Oxford or Paris. Good and ok images are positive, junk is ignored, and a query finds itself, as
    published. Paris' damaged images are left out of the database, and still count as missed where they are
    positive. Raises FileNotFoundError or ValueError.
    """
    folder = Path(path).expanduser()
    texts = next((folder / x for x in LABEL_FOLDERS if any((folder / x).glob(f"*{QUERY}"))), None)
    if texts is None:
        raise FileNotFoundError(
            f"--dataset {path} has no text files of queries, such as lab/all_souls_1{QUERY}: give "
            "roxford5k, rparis6k, or the folder of the first Oxford or Paris set, with jpg/ and lab/"
        )
    base = folder / "jpg" if (folder / "jpg").is_dir() else folder
    by_name = {Path(image).stem: image for image in list_images(str(base))}
    names = sorted(set(by_name) - DAMAGED)
    number = {image: index for index, image in enumerate(names)}
    queries, boxes, relevance, starts = [], [], [], []
    for file in sorted(texts.glob(f"*{QUERY}")):
        start = str(file).removesuffix(QUERY)
        image, box = _query(file)
        if image not in number:
            raise FileNotFoundError(
                f"--dataset {path}: there is no {image}.jpg, which {file} names"
            )
        positives = _listed(f"{start}_good.txt") | _listed(f"{start}_ok.txt")
        junk = _listed(f"{start}_junk.txt")
        queries.append(by_name[image])
        boxes.append(box)
        starts.append(start)
        relevance.append(
            Relevance(
                np.array(sorted(number[x] for x in positives & set(number)), np.int64),
                np.array(sorted(number[x] for x in junk & set(number)), np.int64),
                num_positives=len(positives),
            )
        )
    return RetrievalSet(
        name=name,
        folder=base,
        images=[by_name[image] for image in names],
        queries=queries,
        boxes=np.array(boxes),
        relevance={"all": relevance},
        query_files=starts,
        flag="--dataset",
    )


def _query(file):
    """The image and the box of a query: a line of its name and four numbers."""
    words = file.read_text().split()
    try:
        box = [float(word) for word in words[1:5]]
    except ValueError:
        box = []
    if len(box) != 4:
        raise ValueError(f"--dataset: {file} should hold the name of an image and four numbers")
    return words[0].removeprefix(OF_OXFORD), box


def _listed(file):
    """The names of images in a text file, one a line."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"--dataset: there is no {file}, which lists images of a query")
    return set(Path(file).read_text().split())
