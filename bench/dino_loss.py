"""DINO loss, forward and backward, center included: 10 crops x 16 images, K = 65,536.

Floor: the student's scores are read once and their gradient is written once, 42 MB each, the
teacher's 8 MB are read and their softmax is written; on a CPU the time is that of one exponential
per score, and of the pages of the gradient when they are new to the process. The published form
computes a log-softmax for each of the 18 pairs, and keeps it and a negated copy of the target.

    python -m bench.dino_loss [--device cuda --batch 64]
"""

import torch
import torch.nn.functional as F

from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from main_dino import NUM_GLOBAL, DINOLoss

STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM = 0.1, 0.04, 0.9


def published(student, teacher, center):
    """Eq. 5.3 pair by pair, each with its own log-softmax; then `center` (1, K) moves."""
    batch_size = len(teacher) // NUM_GLOBAL
    logits = (student / STUDENT_TEMP).split(batch_size)
    targets = F.softmax((teacher - center) / TEACHER_TEMP, dim=-1).detach().split(batch_size)
    loss = num_pairs = 0
    for i, q in enumerate(targets):
        for v, x in enumerate(logits):
            if v != i:
                loss = loss + torch.sum(-q * F.log_softmax(x, dim=-1), dim=-1).mean()
                num_pairs += 1
    mean = teacher.detach().sum(0, keepdim=True) / len(teacher)
    center.copy_(center * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM))
    return loss / num_pairs


def build_criterion(out_dim, num_crops, device="cpu"):
    loss = DINOLoss(
        out_dim,
        num_crops,
        warmup_teacher_temp=TEACHER_TEMP,
        teacher_temp=TEACHER_TEMP,
        warmup_teacher_temp_epochs=0,
        epochs=1,
        student_temp=STUDENT_TEMP,
        center_momentum=CENTER_MOMENTUM,
    )
    return loss.to(device)


def main(argv=None):
    parser = get_parser(__doc__, repeats=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--local_crops", type=int, default=8)
    parser.add_argument("--dtype", default="float32", help="of the scores: float32, bfloat16")
    args = parse_args(parser, smoke={"batch": 2, "out_dim": 64, "local_crops": 2}, argv=argv)
    torch.manual_seed(0)
    num_crops = NUM_GLOBAL + args.local_crops

    def scores(num_rows):  # cosines, as the head's are
        x = torch.rand(num_rows, args.out_dim, device=args.device) * 2 - 1
        return x.to(getattr(torch, args.dtype))

    student = scores(num_crops * args.batch).requires_grad_()
    teacher = scores(NUM_GLOBAL * args.batch)
    start = 0.1 * torch.rand(1, args.out_dim, device=args.device)
    center = start.clone()
    criterion = build_criterion(args.out_dim, num_crops, args.device)

    def step(loss, center):
        def run():
            center.copy_(start)
            value = loss()
            value.backward()
            gradient, student.grad = student.grad, None
            return value.detach(), gradient, center

        return run

    forms = {
        "published": step(lambda: published(student, teacher, center), center),
        "ours": step(lambda: criterion(student, teacher, 0), criterion.center),
    }
    seconds = median_seconds(list(forms.values()), args.repeats, device=args.device)
    megabytes = [peak_megabytes(form, args.device) for form in forms.values()]
    expected = forms["published"]()
    rows = []
    for i, (name, form) in enumerate(forms.items()):
        errors = [
            (x - y).abs().max().item() / y.abs().max().item()
            for x, y in zip(form(), expected, strict=True)
        ]
        ratio, share = seconds[0] / seconds[i], megabytes[i] / megabytes[0]
        measured = [seconds[i] * 1e3, ratio, megabytes[i], share]
        rows.append([name, *measured, *(f"{error:.0e}" for error in errors)])
    header = ["form", "ms", "times faster", "MB", "share of memory"]
    header += ["error of loss", "of gradient", "of center"]
    title = f"DINO loss forward + backward, {num_crops} x {args.batch} x {args.out_dim}"
    print_table(f"{title}, {args.dtype}, {args.device}", header, rows, args.json)


if __name__ == "__main__":
    main()
