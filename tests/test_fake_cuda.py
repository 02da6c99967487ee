"""What a GPU would be asked to do, found without one: device errors, waits of the host, launches.

Tensors on "cuda" are torch's fake ones here: shapes, types and devices without values. So an
operation on two devices fails, as does all that needs a value on the host (`.item()`, `bool()`,
`nonzero()`, a mask as an index), where the host would wait for a GPU. Tensors on the CPU are real.
Only forward passes and optimizer steps: a backward pass needs a GPU. Nothing is about numbers.
"""

import re
import sys
import traceback
import types
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.optim import optimizer as torch_optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main_clusterfit
import main_deepcluster
import main_deepclusterv2
import main_deepercluster
import main_dino
import main_rotnet
import main_selav2
import main_simclr
import main_swav
from src import dist as distributed
from src.cluster import exact_sums, kmeans, neighbours
from src.cluster.self_label import Plan, self_labels
from src.cluster.sinkhorn import sinkhorn
from src.data import augment
from src.data.augment import Augment
from src.dist import collectives, syncbn
from src.dist.syncbn import sync_batchnorm
from src.evaluate import knn
from src.labels.health import prediction_health
from src.labels.memory_bank import MemoryBank
from src.labels.pseudo_labels import PseudoLabels
from src.labels.super_classes import Places, SubClassifiers
from src.nets.convnets import build_convnet
from src.nets.resnet import build_model
from src.optim import build_optimizer, clip_gradients, grad_norm, parameter_groups
from src.run import convnet_flags, flags, health, image_flags
from src.run.nonfinite import FiniteSteps, Iteration

# The most that one call may ask of a GPU: launches, and copies from memory that is not pinned.
# A little above what was measured; who makes a call cheaper lowers its ceiling.
CEILINGS = {
    "photometry_swav": (500, 0),
    "photometry_dino": (505, 0),
    "swav_codes": (54, 0),
    "swav_codes_with_queue": (58, 0),
    "swav_codes_in_float64": (58, 0),
    "swav_hard_codes": (64, 0),
    "swav_queue": (2, 0),
    "swav_prototypes": (4, 0),
    "swav_loss": (15, 0),
    "dino_loss": (48, 0),
    "dino_teacher": (1, 0),
    "dino_clipped_gradients": (52, 0),
    "simclr_loss": (17, 0),
    "deepclusterv2_loss": (33, 1),
    "selav2_loss": (33, 1),
    "selav2_prototypes": (12, 0),
    "memory_bank": (8, 0),
    "deepcluster_loss": (6, 1),
    "clusterfit_loss": (6, 1),
    "rotnet_rotations": (4, 0),
    "rotnet_loss": (7, 0),
    "deepercluster_rotations": (14, 3),
    "deepercluster_loss": (30, 1),
    "deepercluster_step_of_classifiers": (12, 0),
    "larc_step": (44, 0),
    "lars_step": (43, 0),
    "sgd_step": (4, 0),
    "adamw_step": (4, 0),
    "adamw_step_in_fp16": (19, 0),
    "gradient_norm": (4, 0),
    "step_judged_later": (0, 0),
    "buffers_kept_before_a_step": (2, 0),
    "kmeans_spherical_e_step": (15, 0),
    "kmeans_euclidean_e_step": (14, 0),
    "sela_first_step": (106, 0),
    "knn_search": (118, 0),
    "knn_votes": (24, 0),
    "health_of_codes": (23, 0),
    "health_of_teacher": (27, 0),
    "health_of_predictions": (18, 0),
    "health_of_embeddings": (27, 0),  # and torch asks whether eigenvalues were found
    "network of main_swav": (540, 0),
    "network of main_deepclusterv2": (540, 0),
    "network of main_selav2": (540, 0),
    "network of main_simclr": (540, 0),
    "network of main_dino": (395, 0),
    "network of main_deepcluster": (50, 0),
    "network of main_deepercluster": (100, 0),
    "network of main_rotnet": (51, 0),
    "network of main_clusterfit": (292, 0),
}
# The same in one of two processes, of what exchanges something there.
CEILINGS_OF_TWO = {
    "swav_codes": (66, 0),
    "swav_codes_with_queue": (70, 0),
    "dino_loss": (50, 0),
    "simclr_loss": (25, 0),
    "deepclusterv2_loss": (35, 1),
    "selav2_loss": (35, 1),
    "sela_first_step": (110, 0),
    "batch_norm": (10, 0),
    "batch_norm_without_samples": (10, 0),
    "batch_norm_backward": (5, 0),
}
# Where the host does wait for a GPU, and why. The test of what no longer waits fails, until it is
# taken from this list and has a ceiling.
WAITS = {
    "step_judged_at_once": ("nonfinite.py: admits", "with --max_nonfinite: may it be taken?"),
    "larc_step_in_fp16": ("grad_scaler.py: _maybe_opt_step", "torch's: did a gradient overflow?"),
    "deepercluster_overflow": (
        "super_classes.py: overflowed",
        "the same; as norm.isfinite() in its loop",
    ),
    "dino_loss_with_sinkhorn": ("sinkhorn.py: _range", "the teacher's scores have no known bound"),
    "sinkhorn_without_a_bound": ("sinkhorn.py: _range", "float32 or float64, by the scores' range"),
    "kmeans_check": ("exact_sums.py: extent", "once a clustering, for bad features"),
    "kmeans_count": ("exact_sums.py: num_rows", "once a clustering"),
    "kmeans_m_step": ("exact_sums.py: member_sums", "bincount; as many bags as the sizes ask for"),
    "kmeans_reseed": ("kmeans.py: _reseed", "as many centroids as there are empty clusters"),
    "sela_check": ("self_label.py: _largest", "once an assignment, for bad embeddings"),
    "sela_next_step": ("self_label.py: step", "each iteration: does the kernel still serve?"),
    "knn_check": ("neighbours.py: nearest_neighbours", "once a search, for rows of all processes"),
    "knn_search_by_groups": ("neighbours.py: _block_keys", "queries whose neighbours tie"),
}

ROOT = Path(__file__).parent.parent
GPU = torch.device("cuda", 0)
BATCH, LARGE, SMALL = 16, 2, 6  # images, and crops of each
VIEWS = LARGE + SMALL
PROTOTYPES, DIM = 3000, 128
ROWS = 4096  # of a memory bank, or of features


# ============ a GPU of fake tensors ============
class HostWaits(Exception):
    """The host would wait here until the GPU has done all that it was asked for."""


class FakeGPU(TorchDispatchMode):
    """Runs operations on the CPU for real, those on a GPU with fake tensors, and counts the latter.

    launches: operations that are not views, collectives included. An operation on lists of tensors
    (foreach) counts once for each tensor where the tensors of a position differ in layout: CUDA has
    no one kernel for them then. unpinned_copies: copies to the GPU from memory that is not pinned.
    """

    def __init__(self):
        super().__init__()
        self.counting, self.pinned = False, []
        self.launches = self.unpinned_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(_is_on_gpu(x) for x in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if self.counting and func.namespace != "prim":
            moved = name in ("_to_copy", "copy_") and self.look_at_copy(name, *args, **kwargs)
            if name in ("index", "index_put", "index_put_"):
                self.look_at_indices(*args)
            if not (moved or func.is_view or name in NO_LAUNCH):
                self.launches += _launches(name, args)
        try:
            return STAND_INS.get(name, func)(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWaits(f"for the result of {func}") from error

    def look_at_copy(self, name, first, source=None, non_blocking=False, device=None, **_):
        """Whether a copy is one to the GPU."""
        source, device = (source, first.device) if name == "copy_" else (first, device)
        if device is None or source.device.type == device.type:
            return False
        if device.type != "cuda":
            raise HostWaits("for a copy from the GPU")
        if not non_blocking:
            raise HostWaits("for a copy to the GPU that is not non_blocking")
        storages = [x.untyped_storage().data_ptr() for x in self.pinned]
        self.unpinned_copies += source.untyped_storage().data_ptr() not in storages
        return True

    def look_at_indices(self, tensor, indices, value=None, *_):
        """Indices on the CPU are copied over first, and a mask must say how many rows it has."""
        for index in (x for x in indices if x is not None):
            if index.device.type != "cuda":
                raise HostWaits("for a copy of indices to the GPU")
            fills = value is not None and value.ndim == 0 and value.device.type == "cpu"
            if index.dtype in (torch.bool, torch.uint8) and not fills:
                raise HostWaits("for the number of rows of a mask")

    def pin(self, tensor):
        """Stands for tensor.pin_memory(), which needs a GPU."""
        self.pinned.append(tensor.clone())
        return self.pinned[-1]


def _is_on_gpu(x):
    return isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda")


def _launches(name, args):
    if not name.startswith("_foreach"):
        return 1
    lists = [x for x in args if isinstance(x, (list, tuple)) and isinstance(x[0], torch.Tensor)]
    one_layout = all(
        len({(t.shape, t.stride(), t.dtype) for t in tensors}) == 1
        for tensors in zip(*lists, strict=True)
    )
    return 1 if one_layout else len(lists[0])


def _of_channels(x):
    return x.new_empty(x.shape[1], dtype=torch.float32)


NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
}
# What torch has no fake of.
STAND_INS = {
    "batch_norm_stats": lambda x, eps: (_of_channels(x), _of_channels(x)),
    "batch_norm_gather_stats_with_counts": lambda x, *_: (_of_channels(x), _of_channels(x)),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda grad, x, *_: tuple(_of_channels(x) for _ in range(4)),
    "batch_norm_backward_elemt": lambda grad, *_: torch.empty_like(grad),
}


def flash_attention(queries, keys, values):
    """What a GPU runs in half precision; without a GPU torch would choose a slower way."""
    return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values)[0]


def works_without_a_gpu():
    """Whether fake tensors can be sliced: torch 2.6, or without CUDA, looks for a GPU then."""
    try:
        empty(2)[:1]
    except RuntimeError:
        return False
    return True


FAKES = FakeTensorMode(allow_non_fake_inputs=True)  # one, so that networks can be kept


@pytest.fixture
def gpu(monkeypatch):
    """A FakeGPU in use, not counting yet; autocast and the optimizers believe in it."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", flash_attention)
    monkeypatch.setattr(
        augment, "triton_kernels", lambda device: None
    )  # cannot run on fake tensors
    kinds = [*torch_optimizer._foreach_supported_types, FakeTensor]  # else tensor by tensor
    monkeypatch.setattr(torch_optimizer, "_foreach_supported_types", kinds)
    with torch.no_grad(), FAKES, FakeGPU() as fake:
        if not works_without_a_gpu():
            pytest.skip(f"torch {torch.__version__} has no fake tensors of a GPU that is not there")
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: fake.pin(tensor))
        yield fake


@contextmanager
def processes(world_size):
    """This process is one of several, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda *_: "nccl")  # which takes tensors of a GPU
    with processes(2):
        yield


def measure(gpu, call):
    gpu.launches = gpu.unpinned_copies = 0
    gpu.counting = True
    try:
        call()
    finally:
        gpu.counting = False
    return gpu.launches, gpu.unpinned_copies


# ============ what is measured ============
HEADS = (main_swav, main_deepclusterv2, main_selav2, main_simclr)
CLASSES = {
    main_deepcluster: lambda args: args.nmb_cluster,
    main_deepercluster: lambda args: args.super_classes,
    main_rotnet: lambda args: main_rotnet.NUM_ROTATIONS,
    main_clusterfit: lambda args: args.nmb_cluster,
}
CASES = {}


def case(build):
    """build() prepares what the call that it returns needs; only the call is measured."""
    CASES[build.__name__] = build
    return build


def empty(*shape, **options):
    return torch.empty(*shape, device=GPU, **options)


def process(world_size=1):
    return distributed.Process(0, world_size, 0, "none", GPU)


def arguments(script):
    """The published arguments, which are those of the preset imagenet."""
    return flags.parse_args(script.get_parser(), script.PRESETS, ["--preset", "imagenet"])


def crops(script):
    if script in (main_swav, main_selav2, main_deepclusterv2, main_simclr, main_dino):
        large, small = [empty(BATCH, 3, 224, 224)] * LARGE, [empty(BATCH, 3, 96, 96)] * SMALL
        return large + small
    crop = empty(BATCH, 3, 224, 224)
    return main_rotnet.rotations([crop]) if script is main_rotnet else [crop]


@cache
def network(script):
    """The network that the script trains, as it builds it, on the GPU in channels last."""
    args = arguments(script)
    with torch.device("meta"):
        if script is main_dino:
            module = main_dino.build_network(args, drop_path_rate=args.drop_path_rate)
        elif script in HEADS:
            prototypes = getattr(args, "nmb_prototypes", [0])
            prototypes = prototypes if len(prototypes) > 1 else prototypes[0]
            options = flags.model_options(args)
            module = build_model(args.arch, normalize=True, nmb_prototypes=prototypes, **options)
        else:
            num_classes = CLASSES[script](args)
            module = build_convnet(args.arch, num_classes, **convnet_flags.convnet_options(args))
    for part in module.modules():  # torch cannot move a module of fake tensors
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(like(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            part._buffers[name] = like(buffer)
    return module


def like(tensor):
    order = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return empty(tensor.shape, dtype=tensor.dtype, memory_format=order)


def with_gradients(module):
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    return module


NETWORKS = [main_swav, main_deepclusterv2, main_selav2, main_simclr, main_dino]
NETWORKS += [main_deepcluster, main_deepercluster, main_rotnet, main_clusterfit]


# ------------ photometry
def photometry(script):
    args = arguments(script)
    args.mean, args.std = [0.5] * 3, [0.2] * 3
    augment = Augment(**image_flags.augment_options(args, SimpleNamespace(), VIEWS))
    batch = [
        empty(BATCH, number, 3, size, size, dtype=torch.uint8)
        for number, size in ((LARGE, 224), (SMALL, 96))
    ]
    augment(
        [images[:1] for images in batch], torch.Generator().manual_seed(0)
    )  # moves the statistics
    return lambda: augment(batch, torch.Generator().manual_seed(1))


@case
def photometry_swav():
    return photometry(main_swav)


@case
def photometry_dino():
    return photometry(main_dino)


# ------------ SwAV
def codes(full, hard=False, dtype=torch.float32, max_score=1.0):
    queue = main_swav.Queue(2, 15 * BATCH, DIM, BATCH, GPU)
    queue.num_rows = 15 * BATCH if full else 0
    scores, prototypes = empty(VIEWS, BATCH, PROTOTYPES), empty(PROTOTYPES, DIM)
    return lambda: main_swav.assign_codes(scores, prototypes, [0, 1], queue, hard, dtype=dtype)


@case
def swav_codes():
    return codes(full=False)


@case
def swav_codes_with_queue():
    return codes(full=True)


@case
def swav_hard_codes():
    return codes(full=False, hard=True)


@case
def swav_codes_in_float64():
    return codes(full=True, dtype=torch.float64)


@case
def swav_queue():
    queue = main_swav.Queue(2, 15 * BATCH, DIM, BATCH, GPU)
    embeddings = empty(2, BATCH, DIM)
    return lambda: queue.push(embeddings)


@case
def swav_prototypes():
    prototypes = [empty(PROTOTYPES, DIM, requires_grad=True)]
    return lambda: main_swav.normalize_prototypes(prototypes)


@case
def swav_loss():
    scores = empty(VIEWS * BATCH, PROTOTYPES, requires_grad=True)
    assignments = [empty(BATCH, PROTOTYPES) for _ in range(2)]
    return lambda: main_swav.swav_loss(scores, assignments, [LARGE, SMALL], [0, 1], 0.1)


# ------------ DINO
def dino_loss_of(teacher_output, dtype=torch.bfloat16):
    args = arguments(main_dino)
    criterion = main_dino.DINOLoss(
        out_dim=args.out_dim, nmb_crops=VIEWS, warmup_teacher_temp=0.04, teacher_temp=0.04,
        warmup_teacher_temp_epochs=0, epochs=1, teacher_output=teacher_output,
    )  # fmt: skip
    criterion.to(GPU)
    student = empty(VIEWS * BATCH, args.out_dim, dtype=dtype, requires_grad=True)
    teacher = empty(LARGE * BATCH, args.out_dim, dtype=dtype)
    return lambda: criterion(student, teacher, 0)


@case
def dino_loss():
    return dino_loss_of("centering")


@case
def dino_loss_with_sinkhorn():
    return dino_loss_of("sinkhorn")


@case
def dino_teacher():
    student = list(network(main_dino).parameters())
    teacher = [torch.empty_like(parameter) for parameter in student]
    return lambda: main_dino.update_teacher(teacher, student, 0.996)


@case
def dino_clipped_gradients():
    parameters = list(with_gradients(network(main_dino)).parameters())
    return lambda: clip_gradients(parameters, 3.0)


# ------------ log lines
@case
def health_of_codes():
    codes, embedding = empty(BATCH, PROTOTYPES), empty(2 * BATCH, DIM)

    def call():
        health.code_entropy(codes)
        health.prototype_usage(codes)
        health.embedding_std(embedding)

    return call


@case
def health_of_teacher():
    probabilities = empty(LARGE * BATCH, 65536)

    def call():
        health.code_entropy(probabilities)
        health.prototype_usage(probabilities)
        main_dino.kl_to_uniform(probabilities)

    return call


@case
def health_of_predictions():
    logits, labels = empty(VIEWS * BATCH, 1000), empty(BATCH, dtype=torch.int64)
    return lambda: prediction_health(logits, labels, -1)


@case
def health_of_embeddings():
    embedding = empty(2 * BATCH, DIM)
    return lambda: health.rankme(embedding)


# ------------ the other methods
@case
def simclr_loss():
    embedding = empty(VIEWS * BATCH, DIM, dtype=torch.bfloat16, requires_grad=True)
    return lambda: main_simclr.nt_xent(embedding, VIEWS, 0.1)


def loss_of_heads(loss):
    scores = [empty(VIEWS * BATCH, PROTOTYPES, requires_grad=True) for _ in range(3)]
    labels, indices = PseudoLabels(3, 1000), torch.arange(BATCH)
    return lambda: loss(scores, labels.of(indices, GPU), 0.1)


@case
def deepclusterv2_loss():
    return loss_of_heads(main_deepclusterv2.deepcluster_loss)


@case
def selav2_loss():
    return loss_of_heads(main_selav2.sela_loss)


@case
def selav2_prototypes():
    prototypes = [empty(PROTOTYPES, DIM, requires_grad=True) for _ in range(3)]
    return lambda: main_selav2.normalize_prototypes(prototypes)


@case
def memory_bank():
    bank = MemoryBank(2, ROWS, BATCH, DIM, GPU)
    embeddings, indices = empty(2, BATCH, DIM), torch.arange(BATCH)
    return lambda: bank.push(indices, embeddings)


def loss_of_labels(loss):
    scores = empty(BATCH, 1000, dtype=torch.bfloat16, requires_grad=True)
    labels, indices = PseudoLabels(1, 1000), torch.arange(BATCH)
    return lambda: loss(scores, labels.of(indices, GPU)[0])


@case
def deepcluster_loss():
    return loss_of_labels(main_deepcluster.deepcluster_loss)


@case
def clusterfit_loss():
    return loss_of_labels(main_clusterfit.clusterfit_loss)


@case
def rotnet_rotations():
    images = [empty(BATCH, 3, 224, 224)]
    return lambda: main_rotnet.rotations(images)


@case
def rotnet_loss():
    scores = empty(4 * BATCH, 4, dtype=torch.bfloat16, requires_grad=True)
    return lambda: main_rotnet.rotation_loss(scores, BATCH)


@case
def deepercluster_rotations():
    places = Places(16, 4, BATCH, 0, 1)
    images = empty(BATCH, 3, 224, 224)
    return lambda: main_deepercluster.rotate(images, places.rotations)


def sub_classifiers():
    places = Places(4, 4, BATCH, 0, 1)
    return places, SubClassifiers(places, 4096, 1000, process(), lr=0.1, momentum=0.9)


@case
def deepercluster_loss():
    places, heads = sub_classifiers()
    features, scores = empty(1, BATCH, 4096), empty(BATCH, 4, dtype=torch.bfloat16)
    labels, indices = PseudoLabels(2, 1000), torch.arange(BATCH)
    supers = places.supers.to(GPU)

    def call():
        targets = heads.targets(labels.of(indices, GPU)[1])
        main_deepercluster.hierarchical_loss(scores, supers, heads.scores(features), targets)

    return call


@case
def deepercluster_step_of_classifiers():
    _, heads = sub_classifiers()
    for layer in heads.layers.values():
        with_gradients(layer)
    heads.optimizer.step()

    def call():
        heads.average_gradients(1.0)
        heads.optimizer.step()

    return call


@case
def deepercluster_overflow():
    _, heads = sub_classifiers()
    for layer in heads.layers.values():
        with_gradients(layer)
    return heads.overflowed


# ------------ optimizers
def step(name, script):
    module = with_gradients(network(script))
    adamw = name == "adamw"
    parameters = parameter_groups(module) if adamw else list(module.parameters())
    optimizer = build_optimizer(name, parameters, 1e-6)
    optimizer.step()  # the first one makes the state
    return optimizer


@case
def larc_step():
    return step("larc", main_swav).step


@case
def lars_step():
    return step("lars", main_swav).step


@case
def sgd_step():
    return step("sgd", main_swav).step


@case
def adamw_step():
    return step("adamw", main_dino).step


@case
def gradient_norm():
    parameters = list(with_gradients(network(main_swav)).parameters())
    return lambda: grad_norm(parameters)


def judged_step(limit):
    steps = FiniteSteps(limit, Path("nowhere"), modules=[network(main_swav)], scaled=False)
    iteration = Iteration(0, 0, torch.arange(BATCH), loss=empty(()), gradient_norm=empty(()))
    return steps, lambda: steps.admits(iteration)


@case
def step_judged_later():
    return judged_step(limit=0)[1]


@case
def step_judged_at_once():
    return judged_step(limit=1)[1]


@case
def buffers_kept_before_a_step():
    steps, _ = judged_step(limit=1)
    return lambda: steps.begin(changed=[])


def scaled_step(name, script):
    optimizer, scaler = step(name, script), distributed.grad_scaler(GPU, "fp16")
    loss = empty(())

    def call():
        scaler.scale(loss)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return call


@case
def larc_step_in_fp16():
    return scaled_step("larc", main_swav)


@case
def adamw_step_in_fp16():
    return scaled_step("adamw", main_dino)


# ------------ clusters and neighbours
def e_step(num_clusters, spherical):
    features, centroids = empty(ROWS, DIM), empty(num_clusters, DIM)
    return lambda: kmeans._nearest(features, centroids, spherical, 0, GPU)


@case
def kmeans_spherical_e_step():
    return e_step(PROTOTYPES, spherical=True)


@case
def kmeans_euclidean_e_step():
    return e_step(100, spherical=False)


@case
def kmeans_check():
    features = empty(ROWS, DIM)
    return lambda: exact_sums.extent(features)


@case
def kmeans_count():
    features = empty(ROWS, DIM)
    return lambda: exact_sums.num_rows(features, 100)


@case
def kmeans_m_step():
    features, assignments = empty(ROWS, DIM), empty(ROWS, dtype=torch.int64)
    exact = exact_sums.exact_rows(features, 0, 0)
    return lambda: exact_sums.member_sums(features, exact, assignments, 100)


@case
def kmeans_reseed():
    means, counts = empty(100, DIM, dtype=torch.float64), empty(100, dtype=torch.int64)
    return lambda: kmeans._reseed(means, counts, True, 0, 0)


@case
def sela_check():
    embeddings, prototypes = empty(ROWS, DIM), empty(PROTOTYPES, DIM)
    return lambda: self_labels(embeddings, prototypes)


@case
def sela_first_step():
    plan = Plan(empty(ROWS, DIM), empty(PROTOTYPES, DIM), 0.05, 2**30)
    return lambda: plan.step(plan.first_scales(ROWS, 0.1))


@case
def sela_next_step():
    plan = Plan(empty(ROWS, DIM), empty(PROTOTYPES, DIM), 0.05, 2**30)
    plan.at = scales = empty(PROTOTYPES, dtype=torch.float64)
    return lambda: plan.step(scales)


@case
def knn_check():
    train, queries = empty(ROWS, DIM), empty(BATCH, DIM)
    return lambda: neighbours.nearest_neighbours(train, queries, 20)


@case
def knn_search():
    train, queries = empty(ROWS, DIM), empty(BATCH, DIM)
    search = neighbours._torch_search(train, BATCH, 512)
    return lambda: search(queries, 20, 0)


@case
def knn_search_by_groups():
    train, queries = empty(ROWS, DIM), empty(BATCH, DIM)
    search = neighbours._torch_search(train, BATCH, ROWS)
    return lambda: search(queries, 20, 0)


@case
def knn_votes():
    similarities, labels = empty(BATCH, 20), empty(BATCH, 20, dtype=torch.int64)

    def call():
        votes = knn._votes(similarities, labels, 0.07, 1000)
        knn._target_ranks(votes, labels[:, 0])

    return call


@case
def sinkhorn_without_a_bound():
    scores = empty(BATCH, PROTOTYPES)
    return lambda: sinkhorn(scores)


def normalised(batch):
    """Arguments of what runs inside the operation, which fake tensors do not enter by themselves."""
    x, affine = empty(batch, 64, 56, 56), empty(64)
    return x, affine, affine, 1e-5, syncbn.ALL


@case
def batch_norm():
    arguments = normalised(BATCH)
    return lambda: syncbn._normalise_on_gpu(*arguments)


@case
def batch_norm_without_samples():
    arguments = normalised(0)
    return lambda: syncbn._normalise_on_gpu(*arguments)


@case
def batch_norm_backward():
    x, weight, *_ = normalised(BATCH)
    _, statistics, scale, counts = syncbn._shapes_of_normalise(*normalised(BATCH))
    return lambda: syncbn._normalise_backward_on_gpu(
        x, x, weight, statistics, scale, counts, syncbn.ALL
    )


# ============ tests ============
PLACES = [ROOT / "src", Path(nn.modules.__file__).parent, Path(torch.amp.__file__).parent]


def place_of(error):
    """Innermost file and function, of ours and of the modules of torch in PLACES, that waited."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if any(map(path.is_relative_to, PLACES)) and not frame.name.startswith("<"):
            return f"{path.name}: {frame.name}"
    return "nowhere"


def check(measured, ceiling):
    launches, unpinned_copies = measured
    assert launches <= ceiling[0], f"{launches} launches, and {ceiling[0]} were enough"
    assert unpinned_copies <= ceiling[1], f"{unpinned_copies} copies from memory that is not pinned"


@pytest.mark.parametrize("name", [name for name in CEILINGS if name in CASES])
def test_host_does_not_wait_and_asks_for_no_more_than(gpu, name):
    check(measure(gpu, CASES[name]()), CEILINGS[name])


@pytest.mark.parametrize("name", CEILINGS_OF_TWO)
def test_of_two_processes_the_host_does_not_wait_and_asks_for_no_more_than(
    gpu, two_processes, name
):
    check(measure(gpu, CASES[name]()), CEILINGS_OF_TWO[name])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("script", NETWORKS, ids=lambda script: script.__name__)
def test_network_makes_the_host_wait_for_nothing(gpu, script, precision):
    module, images = network(script), crops(script)

    def call():
        with distributed.autocast(GPU, precision):
            module(images)

    check(measure(gpu, call), CEILINGS[f"network of {script.__name__}"])


@pytest.mark.parametrize("name", WAITS)
def test_host_waits_in_known_places(gpu, name):
    call = CASES[name]()
    with pytest.raises(HostWaits) as error:
        measure(gpu, call)
    assert place_of(error.value) == WAITS[name][0]


def test_each_case_has_a_ceiling_or_is_known_to_wait():
    known = CEILINGS | CEILINGS_OF_TWO | WAITS
    networks = {f"network of {script.__name__}" for script in NETWORKS}
    assert set(known) == set(CASES) | networks
    assert not (set(CEILINGS) | set(CEILINGS_OF_TWO)) & set(WAITS)


def test_no_tensor_is_indexed_by_a_list_of_the_command_line():
    """A loop is not run here; such an index is copied to the GPU, for which the host waits."""
    for script in sorted(ROOT.glob("main_*.py")):
        assert not re.search(r"\w\[args\.", script.read_text()), script.name


def test_groups_of_batch_norm_wait_for_each_other_as_long_as_all_collectives(monkeypatch):
    made, new_group = [], dist.new_group

    def record(ranks, timeout=None, **options):
        made.append((list(ranks), timeout))
        return new_group(ranks, timeout, **options)

    monkeypatch.setattr(dist, "new_group", record)
    limit = timedelta(seconds=collectives.TIMEOUT)
    with processes(4):
        model = sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2)), "pytorch", 2, process(4))
        assert made == [([0, 1], limit), ([2, 3], limit)]
        assert dist.get_process_group_ranks(syncbn._groups[model[0].group]) == [0, 1]
        made.clear()
        sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2)), "pytorch", 0, process(4))
        assert not made  # the group of all is there already
        collectives.set_timeout(77)
        sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2)), "pytorch", 2, process(4))
        assert made == [([0, 1], timedelta(seconds=77)), ([2, 3], timedelta(seconds=77))]
        collectives.set_timeout(collectives.TIMEOUT)
        made.clear()
        apex = types.ModuleType("apex.parallel")
        apex.convert_syncbn_model = lambda model, process_group: process_group
        monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
        monkeypatch.setitem(sys.modules, "apex.parallel", apex)
        group = sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2)), "apex", 2, process(4))
        assert made == [([0, 1], limit), ([2, 3], limit)]
        assert dist.get_process_group_ranks(group) == [0, 1]


# ------------ of the FakeGPU itself
@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.zeros(4, 4).copy_(x),
        lambda x: x.copy_(torch.zeros(4, 4)),
        lambda x: torch.zeros(4, 4).to(GPU),
        lambda x: torch.tensor([1.0, 2.0], device=GPU),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.__setitem__(x > 0, x[0, 0]),
        lambda x: x.__setitem__(torch.tensor([0, 2]), 0.0),
        lambda x: x.long().unique(),
        lambda x: x[0].long().bincount(),
    ],
)
def test_what_makes_the_host_wait_is_refused(gpu, call):
    x = empty(4, 4)
    with pytest.raises(HostWaits):
        measure(gpu, lambda: call(x))


def test_two_devices_in_one_operation_are_refused(gpu):
    with pytest.raises(Exception, match="device"):
        measure(gpu, lambda: empty(4, 4) + torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("call", "launches", "unpinned_copies"),
    [
        (lambda x: x[:2].t().unsqueeze(0).detach(), 0, 0),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: x.mul_(2).add(1), 2, 0),
        (lambda x: x.half(), 1, 0),
        (lambda x: x.__setitem__(x > 0, 0.0), 2, 0),
        (lambda x: x[x.argmax(1)], 2, 0),
        (lambda x: torch.zeros(4, 4).to(GPU, non_blocking=True), 0, 1),
        (lambda x: x.copy_(torch.zeros(4, 4), non_blocking=True), 0, 1),
        (lambda x: torch.zeros(4, 4).pin_memory()[:2].to(GPU, non_blocking=True), 0, 0),
        (lambda x: torch._foreach_add_([x, x[:2]], 1.0), 1, 0),
        (lambda x: torch._foreach_add_([x, x[:2]], [x, x[:2]]), 1, 0),
        (lambda x: torch._foreach_mul_([x, x[:2]], [x[0, 0], x[1, 1]]), 2, 0),
        (lambda x: torch.zeros(3).nonzero(), 0, 0),
    ],
)
def test_launches_and_copies_are_counted(gpu, call, launches, unpinned_copies):
    x = empty(4, 4)
    assert measure(gpu, lambda: call(x)) == (launches, unpinned_copies)
