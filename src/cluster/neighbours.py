"""Exact nearest neighbours by a chunked matrix product, across processes.

When a process group is up, training features stay sharded: each rank holds its own rows and its own
queries, and only small blocks of queries and neighbours travel.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import dist

logger = logging.getLogger(__name__)

BLOCK = (512, 2**16)  # queries x training rows of the product held at a time: 134 MB
GROUP = 8  # columns of which only the maximum is compared at first
LOW_BITS = 0xFFFFFFFF
NO_NEIGHBOUR = torch.iinfo(torch.int64).min


def nearest_neighbours(
    train: Tensor, queries: Tensor, k: int, backend: str = "torch", block: tuple[int, int] = BLOCK
) -> tuple[Tensor, Tensor]:
    """The k training rows with the largest inner product with each query, best first.

    train: (N, D) this rank's training features; the search runs on their device, in float32.
    queries: (M, D) this rank's queries. Either may have no rows on some ranks.
    Equal similarities are ordered by training index, so that the answer depends neither on the
    blocks nor on the number of processes beyond the rounding of the float32 product.
    backend: "torch", or "faiss" (IndexFlatIP, on the CPU), which may choose otherwise among rows
    that tie for the last place. block: queries and training rows in a block of the product.
    Returns similarities (M, k) float32 and indices (M, k) into the training rows of all ranks, in
    the order of the ranks. With fewer than k training rows in all, k is their number.
    Raises ValueError for k < 1, no training row at all, non-finite features or another backend.
    """
    counts = torch.tensor([[train.shape[0], queries.shape[0]]], device=train.device)
    num_train, num_queries = dist.all_gather_rows(counts).T.tolist()  # one value a rank
    k = _check(train, queries, k, backend, sum(num_train))
    rank, world_size = dist.rank(), dist.world_size()
    rows = max(1, block[0] // world_size)  # queries of one rank in a block
    if backend == "faiss":
        search = _faiss_search(train)
    else:
        search = _torch_search(train, rows * world_size, block[1])
    found = [torch.empty(0, k, dtype=torch.int64, device=train.device)]
    for start in range(0, max(num_queries), rows):
        batch = dist.all_gather_rows(queries[start : start + rows].to(train.device))
        keys = search(batch.float(), k, sum(num_train[:rank]))  # (B, k)
        sizes = [min(max(num - start, 0), rows) for num in num_queries]
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        shards = dist.all_gather_rows(keys[None])[:, mine]  # (W, m, k)
        found.append(_largest(shards.transpose(0, 1).flatten(1), k))  # (m, k)
    similarities, indices = _unpack(torch.cat(found))  # (M, k) both
    return similarities.to(queries.device), indices.to(queries.device)


def _check(train, queries, k, backend, num_train):
    if k < 1:
        raise ValueError(f"--nb_knn {k} must be at least 1; the usual values are 10 20 100 200")
    if backend not in ("torch", "faiss"):
        raise ValueError(f"--knn_backend {backend} must be torch or faiss")
    if train.shape[1] != queries.shape[1]:
        sizes = f"{train.shape[1]} and {queries.shape[1]}"
        raise ValueError(f"training and query features differ in size, {sizes}: use one network")
    if num_train == 0:
        raise ValueError("there is no training feature to search: the training split is empty")
    finite = train.isfinite().all() & queries.isfinite().all().to(train.device)
    if dist.all_reduce_max(1 - finite.long()).item():  # all ranks stop, or none
        raise ValueError("k-NN needs finite features, and some are NaN or infinite")
    if k > num_train:
        logger.info("k = %d is more than the %d training images: all of them vote", k, num_train)
    return min(k, num_train)


# A neighbour is one int64 key: the float32 similarity, made order-preserving, above the complement
# of the training index. The largest keys are then the nearest rows, the lowest index first in ties.


def _keys(similarities, indices):
    bits = (similarities + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 must tie
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (LOW_BITS - indices)


def _unpack(keys):
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), LOW_BITS - (keys & LOW_BITS)


def _largest(keys, k):
    """The k largest keys of each row, in order; rows that are too short are filled up."""
    keys = keys.topk(min(k, keys.shape[1])).values
    return torch.nn.functional.pad(keys, (0, k - keys.shape[1]), value=NO_NEIGHBOUR)


def _torch_search(train, rows, columns):
    """search(queries (B, D), k, offset) -> keys (B, k), for at most `rows` queries at a time."""
    buffer = train.new_empty(rows * min(len(train), columns), dtype=torch.float32)

    def search(queries, k, offset):
        keys = torch.empty(len(queries), 0, dtype=torch.int64, device=train.device)
        for start in range(0, len(train), columns):
            block = train[start : start + columns].float()
            product = buffer[: len(queries) * len(block)].view(len(queries), len(block))
            with torch.no_grad(), full_precision():
                torch.mm(queries, block.T, out=product)
            keys = torch.cat([keys, _block_keys(product, k, offset + start)], dim=1)
            keys = _largest(keys, k)
        return _largest(keys, k)

    return search


def _block_keys(product, k, first):
    """Keys of the best columns of `product` (B, C), at least the k best; column 0 is row `first`."""
    columns = torch.arange(product.shape[1], device=product.device)
    num_groups = product.shape[1] // GROUP
    if num_groups < 4 * k:
        return _keys(product, first + columns)
    # The k largest columns lie in the k groups with the largest maxima, where no maxima tie.
    grouped = num_groups * GROUP
    maxima = product[:, :grouped].unflatten(1, (GROUP, num_groups)).amax(1)  # (B, C / GROUP)
    maxima, groups = maxima.topk(k + 1)
    candidates = (groups[:, None, :k] + columns[:grouped:num_groups, None]).flatten(1)
    candidates = torch.cat([candidates, columns[grouped:].expand(len(product), -1)], dim=1)
    keys = _largest(_keys(product.gather(1, candidates), first + candidates), k)
    tied = (maxima[:, k - 1] == maxima[:, k]).nonzero()[:, 0]
    for block in tied.split(32):
        keys[block] = _largest(_keys(product[block], first + columns), k)
    return keys


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32, whatever torch.set_float32_matmul_precision was set to.

    Autocast needs no switching off: it leaves products with `out` alone.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by backend instead, and PyTorch refuses to mix the two ways
        yield
        return
    if before == "highest":  # setting it again would make compiled networks stale
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _faiss_search(train):
    try:
        logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells which build it tries
        import faiss
    except ImportError as error:  # it is not there, or does not go with this numpy
        raise ValueError(
            f"--knn_backend faiss needs the package faiss ({error}): pip install faiss-cpu"
        ) from None
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train.float().cpu().numpy())

    def search(queries, k, offset):
        found = index.search(queries.cpu().numpy(), max(1, min(k, len(train))))
        similarities, indices = (torch.from_numpy(x).to(train.device) for x in found)
        return _largest(_keys(similarities, offset + indices)[:, : len(train)], k)

    return search
