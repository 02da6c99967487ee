"""A whole SwAV training step on crops in memory: forward, codes, loss, backward, LARC step.

Published form: contiguous tensors, a log-softmax per pair of crops, Sinkhorn on copies, LARC in a
Python loop over parameters (on a GPU with fp16 autocast, as the published runs). Ours: channels last,
fused loss, scaling vectors, foreach LARC (on a GPU bf16, and compiled with --compile).
Floor: the matrix products of the network, 3 x 4.1 GFLOP per 224 px crop of a ResNet-50, both alike.

    python -m bench.train_step [--device cuda --arch resnet50 --batch 64 --compile]
"""

import copy

import torch

from bench.larc_step import LR, MOMENTUM, WEIGHT_DECAY
from bench.larc_step import published_step as published_larc_step
from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from bench.sinkhorn import published as published_sinkhorn
from bench.swav_loss import published as published_loss
from main_swav import assign_codes, normalize_prototypes, swav_loss
from src import dist
from src.nets.resnet import build_model
from src.optim import build_optimizer
from src.run.run import place_network

CROPS, ASSIGN = [2, 6], [0, 1]
SMOKE = {"arch": "resnet10", "batch": 2, "sizes": [32, 16], "prototypes": 30}


class PublishedLARC:
    """LARC and SGD as one optimizer, so that a GradScaler leaves a step with infinite gradients out."""

    def __init__(self, parameters):
        self.optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)
        self.param_groups = self.optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        published_larc_step(self.optimizer)


def our_larc(parameters):
    optimizer = build_optimizer("larc", list(parameters), WEIGHT_DECAY)
    for group in optimizer.param_groups:
        group["lr"] = LR
    return optimizer


def published_precision(device):
    """fp16, as the published runs on a GPU; float32 on a CPU."""
    return "fp16" if device.type == "cuda" else "fp32"


def unmarked(part):
    """What a step calls at the end of each of its parts, where nobody looks at them."""


def published_step(model, crops, optimizer, scaler, device, mark=unmarked):
    batch_size = len(crops[0])
    with torch.no_grad():
        weight = torch.nn.functional.normalize(model.prototypes.weight, dim=1)
        model.prototypes.weight.copy_(weight)
    with dist.autocast(device, published_precision(device)):
        _, scores = model(crops)
        mark("forward")
        with torch.no_grad():
            split = scores.detach().float().split(batch_size)
            codes = [published_sinkhorn(split[i]) for i in ASSIGN]
        mark("codes")
        loss = published_loss(scores, codes)
        mark("loss")
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    mark("backward")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    mark("optimizer")
    return loss


def our_step(model, crops, optimizer, scaler, device, precision, mark=unmarked):
    normalize_prototypes([model.prototypes.weight])
    with dist.autocast(device, precision):
        _, scores = model(crops)
    mark("forward")
    views = scores.detach().unflatten(0, (len(crops), -1))
    codes = assign_codes(
        views, model.prototypes.weight, ASSIGN, None, False, epsilon=0.05, iterations=3
    )
    mark("codes")
    loss = swav_loss(scores, codes, [len(crops)], ASSIGN, 0.1)
    mark("loss")
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    mark("backward")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    mark("optimizer")
    return loss


def build_network(arch, num_prototypes):
    return build_model(
        arch, normalize=True, hidden_mlp=2048, output_dim=128, nmb_prototypes=num_prototypes
    )


def main(argv=None):
    parser = get_parser(__doc__, repeats=8)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs=2, default=[224, 96])
    parser.add_argument("--prototypes", type=int, default=3000)
    parser.add_argument("--compile", action="store_true")
    args = parse_args(parser, SMOKE, argv)
    process = dist.init(args.device)
    device = process.device
    torch.manual_seed(0)
    plain = build_network(args.arch, args.prototypes)
    ours = place_network(
        copy.deepcopy(plain),
        process,
        sync_bn="none",
        syncbn_process_group_size=0,
        compiled=args.compile,
    )
    plain = plain.to(device)
    crops = [
        torch.randn(args.batch, 3, size, size, device=device)
        for count, size in zip(CROPS, args.sizes, strict=True)
        for _ in range(count)
    ]
    our_crops = [crop.contiguous(memory_format=torch.channels_last) for crop in crops]
    precision = dist.default_precision(device)
    their_scaler = dist.grad_scaler(device, published_precision(device))
    our_scaler = dist.grad_scaler(device, precision)
    their_optimizer = PublishedLARC(plain.parameters())
    our_optimizer = our_larc(ours.parameters())
    forms = {
        "published": lambda: published_step(plain, crops, their_optimizer, their_scaler, device),
        "ours": lambda: our_step(
            ours, our_crops, our_optimizer, our_scaler, device=device, precision=precision
        ),
    }
    losses = [form().item() for form in forms.values()]
    seconds = median_seconds(list(forms.values()), args.repeats, device=device)
    rows = [
        [name, time * 1e3, seconds[0] / time, peak_megabytes(form, device), f"{loss:.5f}"]
        for (name, form), time, loss in zip(forms.items(), seconds, losses, strict=True)
    ]
    header = ["form", "ms", "times faster", "MB beyond model and crops", "first loss"]
    title = (
        f"{args.arch}, batch {args.batch}, 2 x {args.sizes[0]} + 6 x {args.sizes[1]} px, {device}"
    )
    compiled = ", compiled" if args.compile else ""
    print_table(f"SwAV training step, {title}{compiled}", header, rows, args.json)


if __name__ == "__main__":
    main()
