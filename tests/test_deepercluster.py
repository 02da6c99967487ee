"""main_deepercluster.py and src/labels/super_classes.py: Eq. 3.4, rotations, who holds which class."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import main_deepercluster as deeper
from src import dist
from src.labels.super_classes import Places, SubClassifiers, loss_of_nothing
from tests.gloo import run_ranks
from tests.test_scripts import ROOT

GOLDEN = np.load(ROOT / "tests" / "golden" / "deepercluster.npz")
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


def golden(name):
    return torch.from_numpy(GOLDEN[f"hl_{name}"])


# ============ loss ============
def test_the_hierarchical_loss_is_the_published_one():
    x = F.relu(golden("features_before_relu"))
    supers, subs = golden("super_target"), golden("sub_target")
    scores = x @ golden("super_weight").T + golden("super_bias")
    present = supers.unique().tolist()
    sub_scores = [
        x[supers == s] @ golden("sub_weight")[s].T + golden("sub_bias")[s] for s in present
    ]
    labels = [subs[supers == s] for s in present]
    loss = deeper.hierarchical_loss(scores, supers, sub_scores, labels)
    assert loss.item() == pytest.approx(GOLDEN["hl_loss_total"].item(), abs=1e-5)
    for i, s in enumerate(present):  # each group for itself, as the published code has them
        mine = supers == s
        alone = deeper.hierarchical_loss(scores[mine], supers[mine], [sub_scores[i]], [labels[i]])
        assert alone.item() == pytest.approx(GOLDEN["hl_loss_per_super_class"][s], abs=1e-5)


def test_several_crops_of_an_image_have_its_labels():
    torch.manual_seed(0)
    supers, subs = torch.tensor([0, 0, 1]), [torch.tensor([2, 0]), torch.tensor([1])]
    crops = [torch.randn(3, 2) for _ in range(2)]
    of_subs = [[torch.randn(2, 3), torch.randn(1, 3)] for _ in range(2)]
    together = [torch.cat([a, b]) for a, b in zip(*of_subs, strict=True)]
    loss = deeper.hierarchical_loss(torch.cat(crops), supers, together, subs)
    each = [
        deeper.hierarchical_loss(c, supers, s, subs) for c, s in zip(crops, of_subs, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(each).item() / 2)


def test_uniform_predictions_cost_what_the_plan_says_and_huge_scores_stay_finite():
    supers, subs = torch.tensor([0, 1]), [torch.tensor([3]), torch.tensor([4])]
    nothing = deeper.hierarchical_loss(torch.zeros(2, 8), supers, [torch.zeros(1, 30)] * 2, subs)
    assert nothing.item() == pytest.approx(loss_of_nothing(8, 30)) == math.log(8) + math.log(30)
    huge = torch.full((2, 8), 6e4, dtype=torch.float16)
    huge[:, 0] = -6e4
    assert deeper.hierarchical_loss(
        huge, supers, [huge[:1]] * 2, [torch.tensor([3])] * 2
    ).isfinite()


# ============ rotations ============
def test_each_image_is_turned_by_its_own_number_of_quarters():
    image = torch.from_numpy(GOLDEN["rot_image"]).permute(2, 0, 1).float()
    square = image[:, :4, :4]
    turned = deeper.rotate(square.expand(4, -1, -1, -1), torch.arange(4))
    for quarter_turns, angle in enumerate((0, 90, 180, 270)):
        whole = np.rot90(GOLDEN["rot_image"], quarter_turns)
        assert np.array_equal(whole, GOLDEN[f"rot_{angle}"])  # what is meant by a turn
        mine = np.rot90(square.permute(1, 2, 0).numpy(), quarter_turns)
        assert np.array_equal(turned[quarter_turns].permute(1, 2, 0).numpy(), mine)


# ============ who does what ============
@pytest.mark.parametrize("rotnet", [True, False])
def test_with_a_multiple_of_the_super_classes_processes_are_in_the_published_groups(rotnet):
    table, names = GOLDEN["groups_table"], GOLDEN["groups_columns"].tolist()
    world_size, num_super = (
        GOLDEN["groups_world_size"].item(),
        GOLDEN["groups_super_classes"].item(),
    )
    table = table[:world_size] if rotnet else table[world_size:]
    rotations = 4 if rotnet else 1
    for rank, row in enumerate(table):
        row = dict(zip(names, row.tolist(), strict=True))
        places = Places(num_super, rotations, 3, rank, world_size)
        (super_class,) = places.held
        holders = places.holders[super_class]
        assert super_class == row["super_class_id"]
        assert (holders.index(rank), len(holders)) == (
            row["training_local_rank"],
            row["training_group_size"],
        )
        assert places.cluster_of(super_class) == row["super_cluster_id"]
        assert places.rotations.unique().tolist() == [row["rotation_index"]]


@pytest.mark.parametrize("num_super, batch", [(4, 6), (8, 5), (3, 4), (16, 12)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_super_classes_of_a_batch_do_not_depend_on_the_number_of_processes(
    num_super, batch, world_size
):
    total = 12 * batch
    alone = Places(num_super, 1, total, 0, 1)
    ranks = [Places(num_super, 1, total // world_size, r, world_size) for r in range(world_size)]
    assert torch.cat([places.supers for places in ranks]).tolist() == alone.supers.tolist()
    assert max(alone.quota) - min(alone.quota) <= 1 and sum(alone.quota) == total
    for s in range(num_super):
        assert [r for r in range(world_size) if s in ranks[r].held] == alone_holders(ranks, s)
        columns = [i for p in ranks for i in range(total)[p.columns(s)]]
        assert columns == list(range(alone.quota[s]))  # each once, in the order of the processes
        for places in ranks:
            here = (places.supers == s).nonzero().flatten().tolist()
            assert here == list(range(len(places.supers))[places.local(s)])


def alone_holders(ranks, super_class):
    assert len({tuple(places.holders[super_class]) for places in ranks}) == 1
    return ranks[0].holders[super_class]


# ============ classifiers ============
BATCH, DIM, SUPER, SUB, STEPS = 12, 5, 4, 3, 3


def _steps(rank, world_size, resume_on=None):
    """Weights after some steps of Eq. 3.4 on the same global batches, and their saved state."""
    process = dist.Process(rank, world_size, rank, "single", torch.device("cpu"))
    places = Places(SUPER, 1, BATCH // world_size, rank, world_size)
    heads = SubClassifiers(places, DIM, SUB, process, **SGD)
    if resume_on is None:
        heads.reset(SUB, 31, 0)
    else:
        heads.load_state_dict({name: torch.from_numpy(x) for name, x in resume_on.items()})
    generator = torch.Generator().manual_seed(5)
    finite = []
    for _ in range(STEPS):
        features = torch.randn(2, BATCH, DIM, generator=generator)  # 2 crops
        labels = torch.randint(SUB, (BATCH,), generator=generator)
        mine = slice(places.own_places.start, places.own_places.stop)
        scores, targets = heads.scores(features[:, mine]), heads.targets(labels[mine])
        nothing = torch.zeros(2 * len(places.supers), SUPER)
        loss = deeper.hierarchical_loss(nothing, places.supers, scores, targets)
        heads.optimizer.zero_grad()
        (8 * loss).backward()
        heads.average_gradients(8.0)
        finite.append(not heads.overflowed())
        heads.optimizer.step()
    assert all(finite)
    return {name: x.numpy() for name, x in heads.state_dict().items()}


def plain_steps():
    """The same in float64 with autograd of the mean over each super-class, all in one place."""
    generator = torch.Generator().manual_seed(5)
    process = dist.Process(0, 1, 0, "single", torch.device("cpu"))
    heads = SubClassifiers(Places(SUPER, 1, BATCH, 0, 1), DIM, SUB, process, **SGD)
    heads.reset(SUB, 31, 0)
    layers = [heads.layers[s].double() for s in range(SUPER)]
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], **SGD)
    for _ in range(STEPS):
        features = torch.randn(2, BATCH, DIM, generator=generator).double()
        labels = torch.randint(SUB, (BATCH,), generator=generator)
        optimizer.zero_grad()
        for s, layer in enumerate(layers):
            some = slice(s * BATCH // SUPER, (s + 1) * BATCH // SUPER)
            F.cross_entropy(
                layer(features[:, some].flatten(0, 1)), labels[some].repeat(2)
            ).backward()
        optimizer.step()
    return [layer.weight.detach().numpy() for layer in layers]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_classifiers_learn_the_mean_of_their_super_class_on_any_number_of_processes(world_size):
    saved, *others = run_ranks(_steps, world_size)
    assert all(not other for other in others)  # the main process has all of them
    for s, weight in enumerate(plain_steps()):
        np.testing.assert_allclose(saved[f"{s}.weight"], weight, atol=1e-6)
        assert np.abs(saved[f"{s}.momentum_weight"]).max() > 0.01


@pytest.mark.slow
def test_saved_classifiers_go_on_with_their_momentum_on_another_number_of_processes():
    alone = run_ranks(_steps, 1)[0]
    twice = run_ranks(_steps, 1, alone)[0]
    elsewhere = run_ranks(_steps, 4, run_ranks(_steps, 2)[0])[0]
    for name, x in twice.items():
        np.testing.assert_allclose(elsewhere[name], x, atol=1e-6)


def _broken(rank, world_size):
    process = dist.Process(rank, world_size, rank, "single", torch.device("cpu"))
    heads = SubClassifiers(Places(2, 1, 2, rank, world_size), DIM, SUB, process, **SGD)
    for p in heads.parameters():
        p.grad = torch.full_like(p, math.inf if rank == 1 else 1.0)
    heads.average_gradients(1.0)
    return heads.overflowed()


def test_all_processes_hear_of_a_gradient_of_one_that_overflows():
    assert run_ranks(_broken, 2) == [True, True]
