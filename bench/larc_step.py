"""LARC + SGD step on the parameters of SwAV's ResNet-50: the published formulation against ours.

    python -m bench.larc_step [--device cpu|cuda]

"published" is the plain form: a Python loop over parameters that takes both norms, branches on the
host, decays and scales the gradient in place, and then SGD without weight decay.
Bytes, with n the size of the parameters (28.4 M of 4 bytes, 113 MB). The published form makes 17n:
norms 2, decay 2 + 3, scaling 2, SGD 2 + 3 + 3. Ours makes 15n, many tensors a call: norms 2, decay 3,
scaling 2, SGD 8. On a GPU the published form waits for the host at every branch, twice a tensor, and
ours never.
"""

import torch

from bench.measure import get_parser, median_seconds, parse_args, print_table
from src.nets.resnet import build_model
from src.optim import LARC

LR, MOMENTUM, WEIGHT_DECAY, TRUST, EPS = 0.6, 0.9, 1e-6, 1e-3, 1e-8


def published_step(optimizer):
    """Scale every gradient in turn, then let `optimizer` (without weight decay) step."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                param_norm = torch.norm(p)
                grad_norm = torch.norm(p.grad)
                if param_norm != 0 and grad_norm != 0:
                    rate = TRUST * param_norm / (grad_norm + param_norm * WEIGHT_DECAY + EPS)
                    p.grad += WEIGHT_DECAY * p
                    p.grad *= rate
    optimizer.step()


def make_parameters(arch, device):
    with torch.device("meta"):
        model = build_model(
            arch, normalize=True, hidden_mlp=2048, output_dim=128, nmb_prototypes=3000
        )
    generator = torch.Generator().manual_seed(0)
    params = []
    for meta in model.parameters():
        p = (0.05 * torch.randn(meta.shape, generator=generator)).to(device).requires_grad_()
        p.grad = 0.01 * torch.randn(meta.shape, generator=generator).to(device)
        params.append(p)
    return params


def main(argv=None):
    parser = get_parser(__doc__, repeats=20)
    parser.add_argument("--arch", default="resnet50")
    args = parse_args(parser, smoke={"arch": "resnet10"}, argv=argv)

    theirs, ours, sgd = (make_parameters(args.arch, args.device) for _ in range(3))
    settings = {"lr": LR, "momentum": MOMENTUM}
    published = torch.optim.SGD(theirs, **settings)
    larc = LARC(torch.optim.SGD(ours, **settings, weight_decay=WEIGHT_DECAY), TRUST)
    plain = torch.optim.SGD(sgd, **settings)

    # The same gradients on both sides, once: afterwards the published form has scaled its own.
    published_step(published)
    larc.step()
    worst = max(
        ((a - b).abs().max() / a.abs().max()).item() for a, b in zip(theirs, ours, strict=True)
    )

    functions = [lambda: published_step(published), larc.step, plain.step]
    times = median_seconds(functions, repeats=args.repeats, warmup=3, device=args.device)
    size = sum(p.numel() * p.element_size() for p in ours)
    rows = [
        [name, 1e3 * seconds, times[0] / seconds, passes * size / seconds / 1e9]
        for name, seconds, passes in zip(
            ["published LARC + SGD", "ours", "SGD alone"], times, [17, 15, 8], strict=True
        )
    ]
    print_table(
        f"LARC step, {args.arch}, {len(ours)} tensors, {size / 1e6:.0f} MB, {args.device}",
        ["step", "ms", "times faster", "GB/s by passes"],
        rows,
        args.json,
    )
    print(f"largest relative difference of a parameter after the first step: {worst:.1e}")


if __name__ == "__main__":
    main()
