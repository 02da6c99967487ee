"""A whole SwAV training step on crops in memory: forward, codes, loss, backward, LARC step.

Published form: contiguous tensors, a log-softmax per pair of crops, Sinkhorn on copies, LARC in a
Python loop over parameters (on a GPU with fp16 autocast, as the published runs). Ours: channels last,
fused loss, scaling vectors, foreach LARC (on a GPU bf16, and compiled with --compile).
Floor: the matrix products of the network, 3 x 4.1 GFLOP per 224 px crop of a ResNet-50, both alike.

    python -m bench.train_step [--device cuda --arch resnet50 --batch 64 --compile]
"""

import argparse
import copy

import torch

from bench.larc_step import LR, MOMENTUM, WEIGHT_DECAY
from bench.larc_step import published_step as published_larc_step
from bench.measure import median_seconds, peak_megabytes, print_table
from bench.sinkhorn import published as published_sinkhorn
from bench.swav_loss import published as published_loss
from main_swav import assign_codes, normalize_prototypes, swav_loss
from src import distributed
from src.resnet import build_model
from src.setup import build_optimizer

CROPS, ASSIGN = [2, 6], [0, 1]


def published_step(model, crops, optimizer, scaler, device):
    batch_size = len(crops[0])
    with torch.no_grad():
        weight = torch.nn.functional.normalize(model.prototypes.weight, dim=1)
        model.prototypes.weight.copy_(weight)
    with distributed.autocast(device, "fp16" if scaler.is_enabled() else "fp32"):
        _, scores = model(crops)
        with torch.no_grad():
            split = scores.detach().float().split(batch_size)
            codes = [published_sinkhorn(split[i]) for i in ASSIGN]
        loss = published_loss(scores, codes)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    published_larc_step(optimizer)
    scaler.update()
    return loss


def our_step(model, crops, optimizer, precision, device):
    normalize_prototypes([model.prototypes.weight])
    with distributed.autocast(device, precision):
        _, scores = model(crops)
    views = scores.detach().unflatten(0, (sum(CROPS), -1))
    codes = assign_codes(
        views, model.prototypes.weight, ASSIGN, None, False, epsilon=0.05, iterations=3
    )
    loss = swav_loss(scores, codes, CROPS, ASSIGN, 0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs=2, default=[224, 96])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    device = distributed.resolve_device(args.device)
    torch.manual_seed(0)
    plain = build_model(
        args.arch, normalize=True, hidden_mlp=2048, output_dim=128, nmb_prototypes=3000
    ).to(device)
    ours = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    if args.compile:
        ours.compile()
    crops = [
        torch.randn(args.batch, 3, size, size, device=device)
        for count, size in zip(CROPS, args.sizes, strict=True)
        for _ in range(count)
    ]
    our_crops = [crop.contiguous(memory_format=torch.channels_last) for crop in crops]
    precision = distributed.default_precision(device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision != "fp32")
    their_optimizer = torch.optim.SGD(plain.parameters(), lr=LR, momentum=MOMENTUM)
    our_optimizer = build_optimizer("larc", list(ours.parameters()), WEIGHT_DECAY)
    for group in our_optimizer.param_groups:
        group["lr"] = LR
    forms = {
        "published": lambda: published_step(plain, crops, their_optimizer, scaler, device),
        "ours": lambda: our_step(ours, our_crops, our_optimizer, precision, device),
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
    print_table(f"Training step, {title}", header, rows)


if __name__ == "__main__":
    main()
