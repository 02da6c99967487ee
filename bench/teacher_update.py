"""Teacher update of ViT-S/16 with its head of K = 65,536: the published loop against ours.

"published" is the plain form: for each pair of parameters two operations, teacher.mul_(m) and
teacher.add_((1 - m) * student), the product being a tensor of its own. Ours is one foreach lerp.
Bytes, with n the size of the parameters (44 M of 4 bytes, 175 MB): the floor is 3n, reading teacher
and student and writing the teacher. The published form makes 7n: mul 2, product 2, add 3.

    python -m bench.teacher_update [--device cuda]
"""

import torch

from bench.measure import get_parser, median_seconds, parse_args, print_table
from main_dino import update_teacher
from src.nets.backbones import build_backbone
from src.nets.dino_head import DINOHead, MultiCropWrapper

MOMENTUM = 0.996


@torch.no_grad()
def published(teacher, student, momentum):
    for p, q in zip(teacher, student, strict=True):
        p.data.mul_(momentum).add_((1 - momentum) * q.detach().data)


def make_parameters(args):
    backbone = build_backbone(args.arch, patch_size=args.patch_size)
    network = MultiCropWrapper(backbone, DINOHead(backbone.num_features, args.out_dim))
    return [p.detach().to(args.device) for p in network.parameters()]


def main(argv=None):
    parser = get_parser(__doc__, repeats=20)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--out_dim", type=int, default=65536)
    args = parse_args(parser, smoke={"arch": "vit_micro", "out_dim": 64}, argv=argv)
    torch.manual_seed(0)
    student, theirs = make_parameters(args), make_parameters(args)
    ours = [p.clone() for p in theirs]
    published(theirs, student, MOMENTUM)
    update_teacher(ours, student, MOMENTUM)
    worst = max((a - b).abs().max().item() for a, b in zip(theirs, ours, strict=True))
    forms = {
        "published": lambda: published(theirs, student, MOMENTUM),
        "ours": lambda: update_teacher(ours, student, MOMENTUM),
    }
    times = median_seconds(list(forms.values()), args.repeats, warmup=3, device=args.device)
    size = sum(p.numel() * p.element_size() for p in student)
    rows = [
        [name, 1e3 * seconds, times[0] / seconds, passes, passes * size / seconds / 1e9]
        for name, seconds, passes in zip(forms, times, [7, 3], strict=True)
    ]
    title = (
        f"Teacher update, {args.arch}, {len(student)} tensors, {size / 1e6:.0f} MB, {args.device}"
    )
    header = ["form", "ms", "times faster", "passes", "GB/s"]
    print_table(title, header, rows, args.json)
    print(f"largest difference of a parameter after the first update: {worst:.0e}")


if __name__ == "__main__":
    main()
