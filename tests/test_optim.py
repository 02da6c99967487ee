"""LARC, LARS, schedule and gradient norm against golden values and a plain per-tensor loop."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch

from src import optim
from src.nets.resnet import resnet18
from src.optim import LARC, LARS, cosine_schedule, grad_norm, parameter_groups


def make_params(arrays, dtype=torch.float32):
    return [torch.nn.Parameter(torch.as_tensor(a).to(dtype).clone()) for a in arrays]


def plain_larc_sgd(params, grads, buffers, lr, momentum, wd, trust, eps, clip):
    """One step of the formula in float64, parameter by parameter; updates the lists in place."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        p_norm, g_norm = np.linalg.norm(p), np.linalg.norm(g)
        if p_norm != 0 and g_norm != 0:
            a = trust * p_norm / (g_norm + wd * p_norm + eps)
            if clip:
                a = min(a / lr, 1)
            g = a * (g + wd * p)
        buffers[i] = g if buffers[i] is None else momentum * buffers[i] + g
        params[i] = p - lr * buffers[i]


def close(actual, expected, rel=1e-5):
    actual = actual.detach().double().numpy() if torch.is_tensor(actual) else actual
    scale = np.abs(expected).max()
    return np.abs(actual - expected).max() <= rel * max(scale, 1e-300)


# ============ LARC ============


@pytest.mark.parametrize("kernel", ["default", "foreach", "fused"])
@pytest.mark.parametrize("weight_decay", ["1e-6", "1e-2"])
@pytest.mark.parametrize("mode", ["noclip", "clip"])
def test_larc_follows_the_golden_trajectory(golden, mode, weight_decay, kernel):
    g = golden("larc")
    params = make_params([g[f"param{i}_init"] for i in range(5)])
    options = {} if kernel == "default" else {kernel: True}
    sgd = torch.optim.SGD(
        params, lr=1.0, momentum=float(g["momentum"]), weight_decay=float(weight_decay), **options
    )
    trust, eps = float(g["trust_coefficient"]), float(g["eps"])
    optimizer = LARC(sgd, trust_coefficient=trust, clip=mode == "clip", eps=eps)
    for step, lr in enumerate(g["clip_lr" if mode == "clip" else "lr"]):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        for i, p in enumerate(params):
            p.grad = torch.from_numpy(g[f"param{i}_grad"][step]).clone()
        optimizer.step()
        for i, p in enumerate(params):
            expected = g[f"{mode}_wd{weight_decay}_param{i}"][step]
            assert close(p, expected), (step, i)
        assert optimizer.param_groups[0]["weight_decay"] == float(weight_decay)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return resnet18(output_dim=16, hidden_mlp=32, nmb_prototypes=20, stem="small")


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_larc_on_a_resnet_equals_the_plain_loop(network, channels_last):
    model = copy.deepcopy(network)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    params = list(model.parameters())
    sgd = torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.2)
    optimizer = LARC(sgd, eps=10.0)
    expected = [p.detach().double().numpy() for p in params]
    buffers = [None] * len(params)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()  # contiguous: in channels_last its layout is not that of p
        grads = [g.double().numpy() for g in grads]
        plain_larc_sgd(expected, grads, buffers, 0.5, 0.9, 0.2, 1e-3, 10.0, False)
        optimizer.step()
    moved = 0
    for p, e in zip(params, expected, strict=True):
        assert close(p, e)
        moved += not torch.equal(p, torch.zeros_like(p))
    assert moved > 60


def test_larc_goes_on_from_the_state_of_sgd_which_is_all_that_it_saves():
    def run(saves):
        torch.manual_seed(0)
        params = make_params([torch.randn(4, 3), torch.randn(5)])
        optimizer = LARC(torch.optim.SGD(params, lr=0.3, momentum=0.9, weight_decay=1e-2))
        for step in range(4):
            for p in params:
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            optimizer.step()
            if saves:
                state = copy.deepcopy(optimizer.state_dict())
                assert set(state["state"][0]) == {"momentum_buffer"}
                optimizer = LARC(torch.optim.SGD(params, lr=9.0))
                optimizer.load_state_dict(state)
        return params

    for saved, expected in zip(run(saves=True), run(saves=False), strict=True):
        assert torch.equal(saved, expected)


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.0}, {"nesterov": True}, {"dampening": 0.5}, {"maximize": True}],
    ids=str,
)
def test_larc_honours_every_option_of_sgd(options):
    """The same as SGD without weight decay, given the gradients of LARC's formula."""
    ours, plain = (make_params([torch.linspace(1, 2, 6), torch.linspace(-1, 3, 6)]) for _ in "ab")
    settings = {"lr": 0.5, "momentum": 0.9, **options}
    larc = LARC(torch.optim.SGD(ours, weight_decay=0.1, **settings), trust_coefficient=0.1)
    sgd = torch.optim.SGD(plain, **settings)
    for step in range(3):
        for p, q in zip(ours, plain, strict=True):
            p.grad = torch.linspace(-1, step, 6)
            q_norm, g_norm = q.detach().norm(), p.grad.norm()
            ratio = 0.1 * q_norm / (g_norm + 0.1 * q_norm + 1e-8)
            q.grad = ratio * (p.grad + 0.1 * q.detach())
        larc.step()
        sgd.step()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(larc.state_dict()["state"], sgd.state_dict()["state"])


def test_a_scheduler_of_the_wrapped_optimizer_sees_its_steps():
    (p,) = make_params([torch.ones(3)])
    sgd = torch.optim.SGD([p], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1)
    p.grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler warns if no step went before its own
        LARC(sgd).step()
        scheduler.step()
    assert p[0].item() == pytest.approx(0.999)


def test_larc_leaves_zero_norms_neither_scaled_nor_decayed():
    zero_p, zero_g, none = make_params([torch.zeros(4), torch.ones(4), torch.ones(4)])
    zero_p.grad, zero_g.grad = torch.full((4,), 2.0), torch.zeros(4)
    sgd = torch.optim.SGD([zero_p, zero_g, none], lr=0.5, momentum=0.9, weight_decay=0.1)
    LARC(sgd).step()
    assert torch.equal(zero_p.detach(), torch.full((4,), -1.0))
    assert torch.equal(zero_g.detach(), torch.ones(4))
    assert torch.equal(none.detach(), torch.ones(4)) and none.grad is None


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("size", [1e30, 1e15, 1e10, 1e-8, 1e-30, 1e-42])
@pytest.mark.parametrize("weight", [1.0, 1e-20, 1e-42])
def test_larc_stays_finite_at_extreme_sizes(size, weight, clip):
    (p,) = make_params([torch.linspace(0.5, 1, 8) * weight])
    p.grad = torch.linspace(-1, 1, 8) * size
    before = p.detach().clone()
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=1e-2)
    LARC(sgd, clip=clip).step()
    assert torch.isfinite(p).all()
    if size in (1e15, 1e10) and weight == 1:  # float32 holds these norms: the step is trust * |p|
        step = (p.detach() - before).norm() / before.norm()
        expected = 1e-3 if clip else 0.1 * 1e-3
        assert abs(step / expected - 1) < 1e-3
    if size == 1e30 and weight > 1e-42:  # the norm overflows: the parameter stands still
        assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("clip", [False, True])
def test_larc_at_learning_rate_zero_moves_nothing_and_divides_nothing_by_zero(clip):
    params = make_params([torch.ones(3), torch.ones(3), torch.zeros(3)])
    for p, g in zip(params, (1.0, 1e30, 1.0), strict=True):
        p.grad = torch.full((3,), g)
    sgd = torch.optim.SGD(params, lr=0.0, momentum=0.9, weight_decay=1e-2)
    optimizer = LARC(sgd, clip=clip)
    optimizer.step()
    for p, value in zip(params, (1.0, 1.0, 0.0), strict=True):
        assert torch.equal(p.detach(), torch.full((3,), value))
        assert torch.isfinite(optimizer.state[p]["momentum_buffer"]).all()


def test_a_nan_gradient_reaches_its_parameter_and_no_other():
    bad, good = make_params([torch.ones(3), torch.ones(3)])
    bad.grad, good.grad = torch.tensor([1.0, float("nan"), 1.0]), torch.ones(3)
    sgd = torch.optim.SGD([bad, good], lr=0.1, momentum=0.9, weight_decay=1e-2)
    LARC(sgd).step()
    assert torch.isnan(bad).all() and torch.isfinite(good).all()


def test_larc_takes_mixed_dtypes_with_norms_in_float32():
    # In float16 300 squared overflows and 2e-4 squared is 0.
    arrays = [torch.full((100,), 300.0), torch.full((100,), 2e-4), torch.ones(3), torch.ones(3)]
    dtypes = [torch.float16, torch.float16, torch.bfloat16, torch.float64]
    params = [make_params([a], d)[0] for a, d in zip(arrays, dtypes, strict=True)]
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().double().numpy().copy() for p in params]
    sgd = torch.optim.SGD(params, lr=1.0, momentum=0.9)
    LARC(sgd, trust_coefficient=0.1).step()
    for p, b in zip(params, before, strict=True):
        # For constant tensors the step is trust * |p| / |g| g = 0.1 p.
        assert close(p, 0.9 * b, rel=torch.finfo(p.dtype).eps + 1e-6)


def test_larc_around_adamw_folds_its_weight_decay_into_the_gradient():
    p, q = make_params([torch.linspace(1, 2, 5)] * 2)
    larc = LARC(torch.optim.AdamW([p], lr=1e-2, weight_decay=0.3), trust_coefficient=0.02)
    adamw = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        g = torch.linspace(-1, 1 + step, 5)
        p.grad = g.clone()
        q_norm, g_norm = q.detach().norm(), g.norm()
        q.grad = 0.02 * q_norm / (g_norm + 0.3 * q_norm + 1e-8) * (g + 0.3 * q.detach())
        larc.step()
        adamw.step()
    torch.testing.assert_close(p, q)
    assert larc.param_groups[0]["weight_decay"] == 0.3


def test_weight_decay_comes_back_when_the_step_raises():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            assert self.param_groups[0]["weight_decay"] == 0
            raise RuntimeError("broken")

    (p,) = make_params([torch.ones(3)])
    p.grad = torch.ones(3)
    optimizer = LARC(Broken([p], lr=0.1, momentum=0.9, weight_decay=0.2))
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize("clip", [False, True])
def test_off_the_cpu_the_host_reads_nothing(clip):
    # A tensor on the meta device has no value: reading one raises.
    params = [torch.nn.Parameter(torch.empty(n, 3, device="meta")) for n in (2, 5)]
    for p in params:
        p.grad = torch.empty_like(p)
    for optimizer in (
        LARC(torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1), clip=clip),
        LARS(params, lr=0.1, weight_decay=0.1),
    ):
        optimizer.step()
        optimizer.step()
    norm = grad_norm(params)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        norm.item()


@pytest.mark.parametrize("fused", [False, True])
def test_larc_under_a_grad_scaler_equals_larc_without(fused):
    def run(scaler):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        sgd = torch.optim.SGD(model.parameters(), 0.5, 0.9, weight_decay=1e-2, fused=fused)
        optimizer = LARC(sgd)
        for step in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 6)).square().mean() * (1e36 if step == 1 else 1)
            if scaler is None:
                loss.backward()
                if step != 1:
                    optimizer.step()
                continue
            scaler.scale(loss).backward()
            if step == 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)  # leaves step 1 out: its scaled gradients overflow
            scaler.update()
        return [p.detach() for p in model.parameters()]

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for a, b in zip(run(scaler), run(None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert scaler.get_scale() == 2.0**15


def test_larc_stands_wherever_an_optimizer_can():
    model = torch.nn.Linear(3, 2)
    optimizer = LARC(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9))
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    optimizer.step()  # no gradient yet
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.optim.param_groups[0]["lr"] == pytest.approx(0.5)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    extra = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    optimizer.add_param_group({"params": []})
    assert len(optimizer.optim.param_groups) == 3

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).sum() + extra.sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad and extra[0] < 1
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):  # noqa: S301
        assert copied.trust_coefficient == 1e-3
        assert copied.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
        assert copied.param_groups is not optimizer.param_groups
        assert "Parameter Group" in repr(copied)
        copied.step()


def test_a_hook_of_the_wrapped_optimizer_runs_and_sees_scaled_gradients():
    (p,) = make_params([torch.ones(4)])
    p.grad = torch.full((4,), 7.0)
    seen = []
    optimizer = LARC(torch.optim.SGD([p], lr=0.1, momentum=0.9))
    optimizer.register_step_pre_hook(lambda *_: seen.append(p.grad.norm().item()))
    optimizer.step()
    assert seen == [pytest.approx(1e-3 * 2)]


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_larc_refuses_a_trust_coefficient_that_is_not_positive(value):
    with pytest.raises(ValueError, match="trust coefficient"):
        LARC(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), trust_coefficient=value)


# ============ LARS ============


def test_lars_follows_the_golden_trajectory(golden):
    g = golden("dino_lars")
    params = make_params([g[f"param{i}_init"] for i in range(4)])
    constants = {name: float(g[name]) for name in ("weight_decay", "momentum", "eta")}
    optimizer = LARS(params, **constants)
    for step, lr in enumerate(g["lr"]):
        optimizer.param_groups[0]["lr"] = float(lr)
        for i, p in enumerate(params):
            p.grad = torch.from_numpy(g[f"param{i}_grad"][step]).clone()
        optimizer.step()
        for i, p in enumerate(params):
            assert close(p, g[f"param{i}_after"][step]), (step, i)
            assert torch.equal(p.grad, torch.from_numpy(g[f"param{i}_grad"][step]))
    assert set(optimizer.state_dict()["state"][0]) == {"mu"}


def test_lars_skips_missing_gradients_and_passes_nan_on():
    bad, good, none, scalar = make_params([torch.ones(2, 2), torch.ones(3), torch.ones(2, 2), 2.0])
    bad.grad, good.grad = torch.full((2, 2), float("nan")), torch.ones(3)
    scalar.grad = torch.tensor(4.0)
    optimizer = LARS([bad, good, none, scalar], lr=0.5, eta=0.1)
    loss = optimizer.step(lambda: torch.tensor(3.0))
    assert loss == 3
    assert torch.isnan(bad).all() and torch.equal(none.detach(), torch.ones(2, 2))
    assert torch.equal(good.detach(), torch.full((3,), 0.5))
    assert scalar.item() == pytest.approx(2 - 0.5 * 0.1 * 2)  # scaled as every p.ndim != 1


def test_lars_refuses_a_negative_learning_rate():
    with pytest.raises(ValueError, match="learning rate"):
        LARS([torch.nn.Parameter(torch.ones(1))], lr=-0.1)


# ============ schedule ============


def test_schedule_equals_that_of_swav(golden):
    g = golden("swav_schedule")
    base, final, start = (float(g[k]) for k in ("base_lr", "final_lr", "start_warmup"))
    epochs, iters, warmup = (int(g[k]) for k in ("epochs", "iters_per_epoch", "warmup_epochs"))
    lr = cosine_schedule(base, final, epochs, iters, warmup, start)
    assert lr.dtype == np.float64
    np.testing.assert_allclose(lr, g["lr"], rtol=0, atol=1e-12)
    without = cosine_schedule(base, final, epochs, iters)
    np.testing.assert_allclose(without, g["lr_no_warmup"], rtol=0, atol=1e-12)


def test_schedule_equals_those_of_dino(golden):
    g = golden("dino_schedules")
    epochs, iters, warmup = (int(g[k]) for k in ("epochs", "iters_per_epoch", "warmup_epochs"))
    peak = float(g["base_lr"]) * int(g["total_batch_size"]) / 256
    for name, values in {
        "lr": cosine_schedule(peak, float(g["min_lr"]), epochs, iters, warmup),
        "wd": cosine_schedule(float(g["wd_start"]), float(g["wd_end"]), epochs, iters),
        "momentum": cosine_schedule(
            float(g["momentum_start"]), float(g["momentum_end"]), epochs, iters
        ),
    }.items():
        np.testing.assert_allclose(values, g[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("epochs, iters, warmup", [(1, 1, 0), (3, 5, 3), (2, 1, 1), (7, 3, 0.5)])
def test_schedule_has_one_finite_value_an_iteration(epochs, iters, warmup):
    values = cosine_schedule(2.0, 0.5, epochs, iters, warmup, 1.0)
    assert len(values) == epochs * iters
    assert np.isfinite(values).all() and values.min() >= 0.5 and values.max() == 2.0


@pytest.mark.parametrize(
    "arguments, flag",
    [
        ({"epochs": 0}, "--epochs"),
        ({"iters_per_epoch": 0}, "--batch_size"),
        ({"warmup_epochs": 11}, "--warmup_epochs"),
        ({"warmup_epochs": -1}, "--warmup_epochs"),
    ],
)
def test_schedule_names_the_flag_that_is_wrong(arguments, flag):
    with pytest.raises(ValueError, match=flag):
        cosine_schedule(1.0, 0.0, **({"epochs": 10, "iters_per_epoch": 5} | arguments))


# ============ gradient norm ============


def test_groups_of_parameters_leave_biases_and_norms_without_weight_decay():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)
    )
    module[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups(module)
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert [p.shape for p in plain["params"]] == [(4,), (4,), (4,), (2,)]
    optimizer = torch.optim.AdamW([decayed, plain], weight_decay=0.04)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.04, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_scaled_together_are_those_scaled_one_by_one(dtype, monkeypatch):
    monkeypatch.setattr(optim, "SMALL", 64)
    shapes = [(3, 4, 2, 2), (5,), (10, 10), (), (2, 3, 4, 4), (7, 9)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    tensors[5] = torch.randn(9, 7).to(dtype).t()  # in no layout that is scaled in a copy
    factors = torch.tensor([2.0, 0.3, 1.7, -1, 0, 0.9])
    expected = [x.clone() for x in tensors]
    torch._foreach_mul_(expected, factors.unbind())
    layouts = [x.stride() for x in tensors]
    optim.scale_in_few_launches(tensors, factors)
    assert [x.stride() for x in tensors] == layouts
    for x, y in zip(tensors, expected, strict=True):
        assert torch.equal(x, y) and x.dtype == dtype
