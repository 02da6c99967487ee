"""A whole DINO training step on crops in memory: both networks, loss, backward, clipping, AdamW, teacher.

Published form: attention as a softmax over written-out scores, all tokens through the last block, a pass
of each size of crops, a log-softmax per pair of crops, the loss read by the host, gradients clipped and
the teacher updated parameter by parameter (on a GPU with fp16 autocast and loss scaling, as the published
runs). Ours: the operations of main_dino.train_one_epoch (on a GPU in bf16, and compiled with --compile).
Floor: the matrix products of both networks, forward and for the student twice that backward; those
of the last layer, (V B) x 256 x K, are alike on both sides.

    python -m bench.dino_step
    python -m bench.dino_step --device cuda --arch vit_small --batch 64 --local_crops 8 --compile
"""

import copy
from functools import partial

import torch

from bench.dino_loss import build_criterion
from bench.dino_loss import published as published_loss
from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from bench.teacher_update import published as published_update
from bench.train_step import published_precision, unmarked
from main_dino import NUM_GLOBAL, start_teacher, update_teacher
from src import dist
from src.nets.backbones import build_backbone
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.nets.vision_transformer import Attention
from src.optim import build_optimizer, clip_gradients, parameter_groups
from src.run.run import place_network

CLIP, MOMENTUM, LR, WEIGHT_DECAY = 3.0, 0.996, 1e-5, 0.04
SMOKE = {"arch": "vit_micro", "patch_size": 4, "batch": 2, "sizes": [16, 8], "out_dim": 64}


def attention(module, x, class_only, packed):
    queries, keys, values = module.split(module.qkv(x))
    scores = (queries @ keys.transpose(-2, -1)) * queries.shape[-1] ** -0.5  # (B, heads, T, T)
    return module.proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))


def all_tokens(backbone, x):
    if not isinstance(x, torch.Tensor):  # of several sizes: a pass of each
        return torch.cat([all_tokens(backbone, images) for images in x])
    shares = backbone.draw_branches(len(x), x.device)
    x = backbone.tokens(x)
    for block, share in zip(backbone.blocks, shares, strict=True):
        x = block(x, shares=share)
    return backbone.norm(x)[:, 0]


def write_out(network):
    """Give `network` the published operations in place of ours."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.forward = partial(attention, module)
    network.backbone.forward = partial(all_tokens, network.backbone)
    return network


def published_step(student, teacher, crops, center, optimizer, scaler, mark=unmarked):
    with dist.autocast(center.device, published_precision(center.device)):
        with torch.no_grad():
            teacher_output = teacher(crops[:NUM_GLOBAL])
        mark("teacher")
        student_output = student(crops)
        mark("forward")
        loss = published_loss(student_output, teacher_output, center)
    value = loss.item()  # the published loop stops when this is not finite
    mark("loss")
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    mark("backward")
    scaler.unscale_(optimizer)
    for p in student.parameters():
        if p.grad is not None:
            factor = CLIP / (p.grad.norm().item() + 1e-6)
            if factor < 1:
                p.grad.mul_(factor)
    scaler.step(optimizer)
    scaler.update()
    mark("optimizer")
    published_update(teacher.parameters(), student.parameters(), MOMENTUM)
    mark("teacher update")
    return value


def our_step(student, teacher, crops, criterion, optimizer, scaler, precision, mark=unmarked):
    with dist.autocast(criterion.center.device, precision):
        with torch.no_grad():
            features = teacher.forward_backbone(torch.cat(crops[:NUM_GLOBAL]))
            teacher_output = teacher.head(features)
        mark("teacher")
        student_output = student(crops)
    mark("forward")
    loss = criterion(student_output, teacher_output, 0)
    mark("loss")
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    mark("backward")
    scaler.unscale_(optimizer)
    clip_gradients(student.parameters(), CLIP)
    scaler.step(optimizer)
    scaler.update()
    mark("optimizer")
    update_teacher(list(teacher.parameters()), list(student.parameters()), MOMENTUM)
    mark("teacher update")
    return loss.detach()


def build_networks(arch, patch_size, img_size, out_dim, drop_path_rate):
    """Student and teacher that starts as the student, on the CPU."""

    def network(rate):
        backbone = build_backbone(arch, patch_size, img_size, drop_path_rate=rate)
        return MultiCropWrapper(backbone, DINOHead(backbone.num_features, out_dim))

    student, teacher = network(drop_path_rate), network(0.0)
    start_teacher(student, teacher, None)
    return student, teacher


def published_adamw(student):
    return torch.optim.AdamW(parameter_groups(student), lr=LR, weight_decay=WEIGHT_DECAY)


def our_adamw(student):
    optimizer = build_optimizer("adamw", parameter_groups(student), WEIGHT_DECAY)
    for group in optimizer.param_groups:
        group["lr"] = LR
    return optimizer


def main(argv=None):
    parser = get_parser(__doc__, repeats=8)
    parser.add_argument("--arch", default="vit_tiny")
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--local_crops", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs=2, default=[224, 96])
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--drop_path_rate", type=float, default=0.1)
    parser.add_argument(
        "--precision", default="auto", help="of ours; on a GPU the published is fp16"
    )
    parser.add_argument("--compile", action="store_true")
    args = parse_args(parser, SMOKE, argv)
    process = dist.init(args.device)
    device = process.device
    precision = dist.resolve_precision(args.precision, device)
    torch.manual_seed(0)
    student, teacher = build_networks(
        args.arch, args.patch_size, args.sizes[0], args.out_dim, args.drop_path_rate
    )
    their_student, their_teacher = (
        write_out(copy.deepcopy(x)).to(device) for x in (student, teacher)
    )
    student, teacher = (
        place_network(
            x, process, sync_bn="none", syncbn_process_group_size=0, compiled=args.compile
        )
        for x in (student, teacher)
    )
    numbers = [NUM_GLOBAL, args.local_crops]
    crops = [
        torch.randn(args.batch, 3, size, size, device=device)
        for number, size in zip(numbers, args.sizes, strict=True)
        for _ in range(number)
    ]
    center = torch.zeros(1, args.out_dim, device=device)
    criterion = build_criterion(args.out_dim, sum(numbers), device)
    their_optimizer, our_optimizer = published_adamw(their_student), our_adamw(student)
    half = published_precision(device)
    scalers = [dist.grad_scaler(device, name) for name in (half, precision)]
    forms = {
        "published": lambda: published_step(
            their_student, their_teacher, crops, center, their_optimizer, scalers[0]
        ),
        "ours": lambda: our_step(
            student, teacher, crops, criterion, our_optimizer, scalers[1], precision
        ),
    }

    def loss_of(form):
        torch.manual_seed(1)  # the same stochastic depth on both sides, unless compiled
        return float(form())

    first = [loss_of(form) for form in forms.values()]
    second = [loss_of(form) for form in forms.values()]
    seconds = median_seconds(list(forms.values()), args.repeats, device=device)
    rows = [
        [name, time * 1e3, seconds[0] / time, peak_megabytes(form, device)]
        for (name, form), time in zip(forms.items(), seconds, strict=True)
    ]
    for row, *losses in zip(rows, first, second, strict=True):
        row += [f"{loss:.5f}" for loss in losses]
    header = ["form", "ms", "times faster", "MB beyond networks and crops"]
    title = f"{args.arch}/{args.patch_size}, K {args.out_dim}, batch {args.batch}, " + " + ".join(
        f"{number} x {size}" for number, size in zip(numbers, args.sizes, strict=True)
    )
    compiled = ", compiled" if args.compile else ""
    print_table(
        f"DINO training step, {title} px, {device}, {half} against {precision}{compiled}",
        [*header, "first loss", "second loss"],
        rows,
        args.json,
    )


if __name__ == "__main__":
    main()
