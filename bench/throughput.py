"""Images a second, memory and size of networks, in inference and in training, as the papers' tables have it.

Inference: the columns of the thesis' Table 5.1, and the peak memory of a forward pass. Blocks, dim,
heads and tokens are of transformers; dim is the dimension of the features of any network; parameters
are those of the network without a head.
Training: the columns of Table 4 of the SwAV paper, and of Tables 4.4 and 5.14 of the thesis: a whole
step of SwAV for convolutional networks, of DINO for transformers, as bench/train_step.py and
bench/dino_step.py have it, on crops in memory. The time of 100 epochs is that of ImageNet's 1,281,167
images on this one device; the papers' are on 64 V100 of 16 GB (SwAV), and on 16 GPUs (DINO). Memory
is that of tensors: networks, gradients, state of the optimizer, crops, and what a step holds at its peak.
Nothing is compiled unless --compile says so.

    python -m bench.throughput [--arch resnet18 vit_tiny/16 --batch 4]
    python -m bench.throughput --device cuda --batch 128 \\
        --arch resnet50 vit_small/16 vit_small/8 vit_base/16 vit_base/8 \\
        --train_arch resnet50 vit_small/16 --train_batch 64

A name may end in the side of a patch, as in vit_small/8. A batch that does not fit into the GPU's memory
is halved until it does.
"""

import argparse
import re

import torch

from bench import dino_step, train_step
from bench.dino_loss import build_criterion
from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from bench.step_profile import with_memory
from main_dino import NUM_GLOBAL
from src import dist
from src.nets.backbones import build_backbone, is_transformer, is_vit
from src.run.run import place_network

IMAGENET = 1_281_167  # images
EPOCHS = 100  # of the column of times
# The crops of Table 4 (4.4) and of Table 5.14.
CROPS = {
    "SwAV": ["2x224", "2x160+4x96", "2x224+6x96"],
    "DINO": ["2x224", "2x224+2x96", "2x224+6x96", "2x224+10x96"],
}
PATCH = 16  # where a name does not say it
SMOKE = {
    "arch": ["resnet10", "vit_micro/4"],
    "batch": 2,
    "size": 16,
    "crops": ["2x16", "2x16+2x8"],
    "prototypes": 30,
    "out_dim": 64,
}


def named_network(text):
    """An argparse type: (arch, patch_size) of resnet50 or vit_small/8."""
    arch, slash, patch = text.partition("/")
    if slash and not re.fullmatch(r"[1-9]\d*", patch):
        raise argparse.ArgumentTypeError(
            f"must be a network and a patch, as vit_small/8, not {text}"
        )
    return arch, int(patch) if slash else PATCH


def multi_crop(text):
    """An argparse type: [(number, side in pixels), ...] of 2x224+6x96, with 2 or more at first."""
    parts = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in text.split("+")]
    if not all(parts) or int(parts[0][1]) < NUM_GLOBAL:
        raise argparse.ArgumentTypeError(f"must be crops such as 2x224+6x96, not {text}")
    return [(int(part[1]), int(part[2])) for part in parts]


def title_of(arch, patch_size):
    return f"{arch}/{patch_size}" if is_vit(arch) else arch


def place(network, process, compiled):
    return place_network(
        network, process, sync_bn="none", syncbn_process_group_size=0, compiled=compiled
    )


def megabytes_of(tensors):
    return sum(x.numel() * x.element_size() for x in tensors) / 1e6


# ============ inference ============
def describe(network):
    """Blocks, dim, heads, tokens, millions of parameters; "-" for what a network has not."""
    blocks = heads = tokens = "-"
    if hasattr(network, "patch_embed") and hasattr(network, "grid"):
        blocks, heads = len(network.blocks), network.num_heads
        tokens = network.pos_embed.shape[1] + network.num_registers
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    return [blocks, network.num_features, heads, tokens, f"{parameters:.1f}"]


@torch.no_grad()
def inference_row(args, arch, patch_size, process, precision, batch):
    """A row of the first table, of forward passes of `batch` images."""
    network = build_backbone(arch, patch_size, args.size).eval()
    row = [title_of(arch, patch_size), *describe(network)]
    network = place(network, process, args.compile)
    images = torch.randn(batch, 3, args.size, args.size, device=process.device)
    images = images.contiguous(memory_format=torch.channels_last)

    def forward():
        with dist.autocast(process.device, precision):
            network.forward_backbone(images)

    (seconds,) = median_seconds([forward], args.repeats, device=process.device)
    held = megabytes_of([*network.parameters(), *network.buffers(), images])
    peak = held + peak_megabytes(forward, process.device)
    return [*row, batch, batch / seconds, peak / 1e3]


# ============ training ============
def swav_form(args, arch, patch_size, crops, process, precision):
    """A function that makes a step of SwAV, and one that gives the tensors held between two."""
    model = place(train_step.build_network(arch, args.prototypes), process, args.compile)
    optimizer = train_step.our_larc(model.parameters())
    scaler = dist.grad_scaler(process.device, precision)

    def step():
        train_step.our_step(
            model, crops, optimizer, scaler, device=process.device, precision=precision
        )

    return step, lambda: held_tensors([model], optimizer, crops)


def dino_form(args, arch, patch_size, crops, process, precision):
    """As swav_form."""
    networks = dino_step.build_networks(
        arch, patch_size, crops[0].shape[-1], args.out_dim, drop_path_rate=0.1
    )
    student, teacher = (place(network, process, args.compile) for network in networks)
    criterion = build_criterion(args.out_dim, len(crops), process.device)
    optimizer = dino_step.our_adamw(student)
    scaler = dist.grad_scaler(process.device, precision)

    def step():
        dino_step.our_step(
            student, teacher, crops, criterion, optimizer, scaler, precision=precision
        )

    return step, lambda: held_tensors([student, teacher, criterion], optimizer, crops)


def held_tensors(modules, optimizer, crops):
    """Parameters, gradients, buffers, the optimizer's state and the crops."""
    parameters = [p for module in modules for p in module.parameters()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    buffers = [x for module in modules for x in module.buffers()]
    states = [x for state in optimizer.state.values() for x in state.values()]
    state = [x for x in states if isinstance(x, torch.Tensor)]
    return [*parameters, *gradients, *buffers, *state, *crops]


def training_row(args, arch, patch_size, numbers, process, precision, batch):
    """A row of the second table, of steps on `batch` images; numbers: (number, side) of the crops."""
    method, form = ("DINO", dino_form) if is_transformer(arch) else ("SwAV", swav_form)
    crops = [
        torch.randn(batch, 3, size, size, device=process.device).contiguous(
            memory_format=torch.channels_last
        )
        for number, size in numbers
        for _ in range(number)
    ]
    step, held = form(args, arch, patch_size, crops, process, precision)
    (seconds,) = median_seconds([step], args.repeats, device=process.device)
    peak = peak_megabytes(step, process.device) + megabytes_of(held())
    hours = EPOCHS * IMAGENET / batch * seconds / 3600
    named = " + ".join(f"{number} x {size}" for number, size in numbers)
    return [method, title_of(arch, patch_size), named, batch, batch / seconds, hours, peak / 1e3]


def crops_of(args, arch):
    """The multi-crops that a network is trained on: --crops, or those of the papers' tables."""
    names = args.crops or CROPS["DINO" if is_transformer(arch) else "SwAV"]
    return [multi_crop(name) for name in names]


def main(argv=None):
    parser = get_parser(__doc__, repeats=5)
    add = parser.add_argument
    add(
        "--arch", nargs="+", default=["resnet18", "vit_tiny/16"], help="networks of the first table"
    )
    add("--batch", type=int, default=4, help="images of a forward pass (the paper: 128)")
    add("--size", type=int, default=224, help="their side in pixels")
    add("--train_arch", nargs="*", default=None, help="of the second table (default: --arch)")
    add(
        "--train_batch", type=int, default=None, help="images of a training step (default: --batch)"
    )
    add("--crops", nargs="+", default=None, help="multi-crops (default: those of the papers)")
    add("--prototypes", type=int, default=3000, help="of SwAV")
    add("--out_dim", type=int, default=65536, help="outputs of DINO")
    add("--compile", action="store_true")
    args = parse_args(parser, SMOKE, argv)
    try:
        networks = [named_network(name) for name in args.arch]
        trained = [
            named_network(name)
            for name in (args.arch if args.train_arch is None else args.train_arch)
        ]
        crops = [crops_of(args, arch) for arch, _ in trained]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    process = dist.init(args.device)
    precision = dist.default_precision(process.device)
    torch.manual_seed(0)
    rows = [
        with_memory(
            lambda batch, name=name: inference_row(args, *name, process, precision, batch),
            args.batch,
        )
        for name in networks
    ]
    form = f"{precision}, {process.device}{', compiled' if args.compile else ''}"
    header = ["model", "blocks", "dim", "heads", "tokens", "M params", "batch", "im/s", "peak GB"]
    print_table(f"Inference at {args.size} px, {form}", header, rows, args.json)
    rows = [
        with_memory(
            lambda batch, name=name, numbers=numbers: training_row(
                args, *name, numbers, process, precision, batch
            ),
            args.train_batch or args.batch,
        )
        for name, choices in zip(trained, crops, strict=True)
        for numbers in choices
    ]
    header = ["method", "model", "multi-crop", "batch", "im/s", f"h / {EPOCHS} epochs", "peak GB"]
    print_table(f"Training, {form}, one device", header, rows, args.json)


if __name__ == "__main__":
    main()
