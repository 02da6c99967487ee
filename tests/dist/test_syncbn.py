"""Batch normalisation over processes equals that of one process on the whole batch."""

import importlib
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

from src import dist
from src.dist import Process, syncbn
from src.dist.syncbn import CrossProcessBatchNorm, sync_batchnorm
from tests.gloo import run_ranks
from tests.runs import ROOT

CPU = torch.device("cpu")


def process_of(rank, world_size, device=CPU):
    return Process(rank, world_size, rank, "single", device)


def network(momentum=0.1, affine=True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=momentum, affine=affine), nn.ReLU(),
        nn.Flatten(), nn.Linear(80, 6), nn.BatchNorm1d(6, eps=1e-3, momentum=momentum),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name in ("1.weight", "1.bias", "5.weight", "5.bias"):
            nn.init.normal_(parameter, 1.0, 0.5)
    return model.double()


def steps(model, shares):
    """Outputs and gradients of two steps, buffers after them, and the output in evaluation."""
    found = []
    for images, weights in shares:
        images = images.clone().requires_grad_()
        out = model(images)
        (out**3 * weights).sum().backward()
        found += [out.detach().numpy(), images.grad.numpy()]
    gradients = [dist.all_reduce_sum(parameter.grad).numpy() for parameter in model.parameters()]
    buffers = [buffer.numpy() for buffer in model.buffers()]
    evaluated = model.eval()(shares[0][0]).detach().numpy()
    return found, gradients, buffers, evaluated


def batches(sizes):
    """Two batches of sum(sizes) images far from zero, cut into shares, and a weight per output."""
    generator = torch.Generator().manual_seed(1)
    cut = []
    for _ in range(2):
        images = torch.randn(sum(sizes), 3, 6, 6, generator=generator, dtype=torch.float64) + 7
        weights = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64)
        cut.append((images, weights))
    bounds = np.cumsum([0, *sizes])
    pairs = list(zip(bounds, bounds[1:], strict=False))
    return cut, [[(x[a:b], w[a:b]) for x, w in cut] for a, b in pairs]


def _rank_steps(rank, world_size, sizes, momentum, affine, group_size):
    model = network(momentum, affine)
    converted = sync_batchnorm(model, "pytorch", group_size, process_of(rank, world_size))
    assert sum(isinstance(m, CrossProcessBatchNorm) for m in converted.modules()) == 2
    assert list(converted.state_dict()) == list(network(momentum, affine).state_dict())
    return steps(converted, batches(sizes)[1][rank])


def check_equal_to_one_process(results, sizes, momentum=0.1, affine=True):
    whole, _ = batches(sizes)
    found, gradients, buffers, evaluated = steps(network(momentum, affine), whole)
    for step in range(4):
        together = np.concatenate([result[0][step] for result in results])
        np.testing.assert_allclose(together, found[step], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.concatenate([r[3] for r in results]), evaluated, rtol=1e-9)
    for result in results:
        for mine, theirs in zip(result[1] + result[2], gradients + buffers, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [[4, 4], [5, 1], [6, 0], [2, 3, 1, 4], [0, 3, 0, 5]])
def test_processes_equal_one_process(sizes):
    results = run_ranks(_rank_steps, len(sizes), sizes, 0.1, True, 0)
    check_equal_to_one_process(results, sizes)


def test_cumulative_average_and_no_affine_parameters():
    results = run_ranks(_rank_steps, 2, [3, 4], None, False, 0)
    check_equal_to_one_process(results, [3, 4], None, False)


def _ddp_gradients(rank, world_size):
    model = sync_batchnorm(network(), "pytorch", 0, process_of(rank, world_size))
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-4)
    for _ in range(2):
        images, weights = batches([4, 4])[1][rank][0]
        model.zero_grad()
        (wrapped(images) ** 3 * weights).sum().backward()
    return [parameter.grad.numpy() * world_size for parameter in model.parameters()]


def test_gradients_under_distributed_data_parallel():
    model = network()
    (images, weights), _ = batches([4, 4])[0]
    (model(images) ** 3 * weights).sum().backward()
    for gradients in run_ranks(_ddp_gradients, 2):
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            np.testing.assert_allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-9)


def _group_outputs(rank, world_size, sizes):
    model = sync_batchnorm(network(), "pytorch", 2, process_of(rank, world_size))
    images, _ = batches(sizes)[1][rank][0]
    return model(images).detach().numpy(), model[1].running_mean.numpy()


@pytest.mark.slow
def test_groups_of_two_normalise_apart():
    sizes = [3, 2, 1, 4]
    results = run_ranks(_group_outputs, 4, sizes)
    (images, _), _ = batches(sizes)[0]
    for ranks, part in (([0, 1], images[:5]), ([2, 3], images[5:])):
        alone = network()
        expected = alone(part).detach().numpy()
        together = np.concatenate([results[rank][0] for rank in ranks])
        np.testing.assert_allclose(together, expected, rtol=1e-9, atol=1e-9)
        for rank in ranks:
            np.testing.assert_allclose(results[rank][1], alone[1].running_mean, rtol=1e-9)


# ------------ on a GPU, by kernels that torch has for it: what they do, in plain operations
def _stats(x, eps):
    var, mean = torch.var_mean(x.float(), syncbn._all_but_channels(x), correction=0)
    return mean, (var + eps).rsqrt()


def _gather_stats_with_counts(x, means, scales, running_mean, running_var, momentum, eps, counts):
    mean, squares, total = torch.zeros_like(means[0]), torch.zeros_like(means[0]), 0
    for other, scale, count in zip(means, scales, counts, strict=True):
        factor = 1 / (total + count)  # not finite where the first processes have no values
        own = (1 / scale**2 - eps) * count
        squares = squares + own + (mean - other) ** 2 * total * count * factor
        mean = total * factor * mean + count * factor * other
        total = int(total + count)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(squares / (total - 1), momentum)
    return mean, (squares / total + eps).rsqrt()


def _elemt(x, weight, bias, mean, scale, eps):
    normal = (x - syncbn._beside(mean, x)) * syncbn._beside(scale, x)
    y = normal if weight is None else normal * syncbn._beside(weight, x) + syncbn._beside(bias, x)
    return y.to(x.dtype)


def _backward_reduce(grad, x, mean, scale, weight, *wanted):
    dims = syncbn._all_but_channels(x)
    sum_dy = grad.sum(dims)
    sum_dy_xmu = (grad * (x - syncbn._beside(mean, x))).sum(dims)
    assert wanted == (True, weight is not None, weight is not None)
    affine = weight is not None
    return sum_dy, sum_dy_xmu, sum_dy_xmu * scale if affine else None, sum_dy if affine else None


def _backward_elemt(grad, x, mean, scale, weight, sum_dy, sum_dy_xmu, counts):
    assert counts.dtype == torch.int32
    beside, total = partial(syncbn._beside, x=x), counts.sum()
    from_mean = (x - beside(mean)) * beside(scale**2 * sum_dy_xmu / total)
    factor = scale if weight is None else scale * weight
    return (grad - beside(sum_dy / total) - from_mean) * beside(factor)


def _all_gather_into(whole, own, group):
    torch.distributed.all_gather(list(whole.unbind(0)), own, group=group)


KERNELS = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather_stats_with_counts,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _backward_reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}


def _both_ways(rank, world_size, sizes, affine, shape):
    """What the two ways to normalise return for the same samples, and their gradients."""
    generator = torch.Generator().manual_seed(rank)
    x, grad = (torch.randn(sizes[rank], 3, *shape, generator=generator) + 2 for _ in range(2))
    weight, bias = (torch.tensor([1.5, -0.5, 1.0]) if affine else None for _ in range(2))
    y, statistics, scale, count = syncbn.normalise(x, weight, bias, 1e-5, syncbn.ALL)
    plain = [y, statistics, scale, count]
    plain += syncbn.normalise_backward(grad, x, weight, statistics, scale, count, syncbn.ALL)
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in KERNELS.items():
            patch.setattr(torch, name, kernel)
        patch.setattr(syncbn, "all_gather_into", _all_gather_into)
        found = list(syncbn._normalise_on_gpu(x, weight, bias, 1e-5, syncbn.ALL))
        y, statistics, scale, counts = found
        found += syncbn._normalise_backward_on_gpu(
            grad, x, weight, statistics, scale, counts, syncbn.ALL
        )
    found[3] = counts.sum()
    if not affine:  # gradients of what is not there
        plain, found = plain[:5], found[:5]
    return [value.numpy() for value in plain], [value.numpy() for value in found]


@pytest.mark.parametrize(
    ("sizes", "affine", "shape"),
    [
        ([4, 3], True, (5, 4)),
        ([0, 6], True, (2, 2)),
        ([3, 0], False, ()),
        ([0, 2, 0, 1], True, (3,)),
    ],
)
def test_kernels_of_a_gpu_are_put_together_as_on_a_cpu(sizes, affine, shape):
    for plain, found in run_ranks(_both_ways, len(sizes), sizes, affine, shape):
        for expected, value in zip(plain, found, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def _with_a_copy(rank, world_size, folder):
    """Output of a layer over processes, before and after a copy of its module was imported."""
    layer = sync_batchnorm(nn.BatchNorm1d(2), "pytorch", 0, process_of(rank, world_size))
    layer.group = syncbn._key_of(torch.distributed.new_group(list(range(world_size))))
    x = torch.arange(6.0).view(3, 2) + rank
    before = layer(x)
    sys.path.insert(0, str(folder))
    copied = importlib.import_module("mine.dist.syncbn")
    assert copied.normalise is not syncbn.normalise
    assert torch.equal(layer(x), before)
    return 1


def test_a_copy_of_the_module_in_the_same_process_leaves_this_one_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    shutil.copytree(ROOT / "src" / "dist", tmp_path / "mine" / "dist")
    shutil.copy(ROOT / "src" / "errors.py", tmp_path / "mine")
    assert run_ranks(_with_a_copy, 2, tmp_path) == [1, 1]


def _graphs(rank, world_size):
    """Graphs that torch.compile divides a training step of three layers into, and the output."""
    model = sync_batchnorm(network().float(), "pytorch", 0, process_of(rank, world_size))
    images = batches([4, 4])[1][rank][0][0].float()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)(images)
    compiled.sum().backward()
    gradient, mean = model[0].weight.grad, model[1].running_mean
    plain = sync_batchnorm(network().float(), "pytorch", 0, process_of(rank, world_size))
    expected = plain(images)
    expected.sum().backward()
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient, plain[0].weight.grad)
    torch.testing.assert_close(mean, plain[1].running_mean)
    return len(graphs)


@pytest.mark.slow
def test_torch_compile_makes_one_graph_of_a_network_over_processes():
    assert run_ranks(_graphs, 2) == [1, 1]


def _half_precision(rank, world_size):
    model = sync_batchnorm(nn.BatchNorm2d(2), "pytorch", 8, process_of(rank, world_size))
    x = (torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(rank)) + 30).bfloat16()
    x.requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="needs"):
        model(torch.zeros(3))
    return y.float().detach().numpy(), [model.running_var.dtype == torch.float32]


def test_half_precision_is_normalised_in_float32():
    results = run_ranks(_half_precision, 2)  # a group of 8 with 2 processes: both
    y = np.concatenate([result[0] for result in results])
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=5e-3)
    np.testing.assert_allclose(y.std((0, 2, 3)), 1, atol=1e-2)
    assert all(result[1] == [True] for result in results)


def _one_value(rank, world_size):
    layer = sync_batchnorm(nn.BatchNorm1d(2), "pytorch", 0, process_of(rank, world_size))
    assert layer(torch.randn(1, 2)).shape == (1, 2)  # alone, torch refuses one row
    with pytest.raises(ValueError, match="more than one value"):
        layer(torch.zeros(1 - rank, 2))
    return 1


def test_one_row_in_each_process_is_a_batch():
    assert run_ranks(_one_value, 2) == [1, 1]


@pytest.mark.parametrize(
    ("kind", "group_size", "world_size"),
    [("pytorch", 8, 1), ("apex", 8, 1), ("none", 8, 4), ("pytorch", 1, 4)],
)
def test_nothing_is_converted_where_nothing_is_shared(kind, group_size, world_size):
    model = network()
    assert sync_batchnorm(model, kind, group_size, process_of(0, world_size)) is model
    assert type(model[1]) is nn.BatchNorm2d


def _apex_where_there_is_none(rank, world_size):
    model = sync_batchnorm(network(), "apex", 0, process_of(rank, world_size))
    return type(model[1]).__name__


def test_published_command_lines_with_apex_run_without_it():
    assert run_ranks(_apex_where_there_is_none, 2) == ["CrossProcessBatchNorm"] * 2


@pytest.mark.parametrize(
    ("kind", "group_size", "world_size", "words"),
    [
        ("apx", 8, 1, "--sync_bn must be pytorch, apex or none, not 'apx'"),
        (
            "pytorch",
            8,
            12,
            "--syncbn_process_group_size 8 does not divide 12 processes; use 1, 2, 3",
        ),
        ("pytorch", -2, 4, "--syncbn_process_group_size -2"),
    ],
)
def test_what_does_not_work_is_one_sentence(kind, group_size, world_size, words):
    with pytest.raises(ValueError, match=".") as error:
        sync_batchnorm(network(), kind, group_size, process_of(0, world_size))
    assert words in str(error.value)
