"""Who does what in DeeperCluster: super-classes of the places in a batch, and their classifiers.

Caron et al. 2019, arXiv:1905.01278; thesis, section 3.3.1. A super-class is a first-level cluster and
a rotation. The batch of all processes holds the super-classes one after the other, in equal parts:
place p of G belongs to super-class p * S // G, whatever the number of processes. With a multiple of
S processes each has one super-class, and those of one super-class are the thesis' groups.
"""

import math

import torch
from torch import Tensor, nn

from .. import dist
from ..data.multicrop import generator
from ..nets.top_layer import TopLayer
from .pseudo_labels import IGNORED

SUB_DRAW = 3  # sets the draws of the classifiers apart from others


class Places:
    """The super-classes of this process's places in a batch.

    num_super: S. num_rotations: 4, or 1 without rotations. supers: (B,), of this process's places;
    rotations: (B,), in quarter turns; held: the super-classes among them; quota: number of
    places of each super-class in the whole batch.
    """

    def __init__(
        self, num_super: int, num_rotations: int, batch_size: int, rank: int, world_size: int
    ):
        self.num_super, self.num_rotations = num_super, num_rotations
        total = batch_size * world_size
        supers = torch.arange(total) * num_super // total  # (G,)
        supers_of_ranks = supers.view(world_size, batch_size)
        self.quota = supers.bincount(minlength=num_super).tolist()
        self.supers = supers_of_ranks[rank]
        self.rotations = self.supers % num_rotations
        self.held = self.supers.unique().tolist()
        self.holders = [
            (supers_of_ranks == s).any(1).nonzero().flatten().tolist() for s in range(num_super)
        ]
        self.first_place = [int((supers < s).sum()) for s in range(num_super)]
        self.own_places = range(rank * batch_size, (rank + 1) * batch_size)

    def cluster_of(self, super_class: int) -> int:
        """Its first-level cluster."""
        return super_class // self.num_rotations

    def columns(self, super_class: int) -> slice:
        """Which of a super-class' places in the whole batch are this process's."""
        first = self.first_place[super_class]
        start = max(self.own_places.start - first, 0)
        stop = min(self.own_places.stop - first, self.quota[super_class])
        return slice(start, max(start, stop))

    def local(self, super_class: int) -> slice:
        """Where a super-class lies among this process's places."""
        columns = self.columns(super_class)
        offset = self.first_place[super_class] - self.own_places.start
        return slice(offset + columns.start, offset + columns.stop)


class SubClassifiers:
    """W_1 ... W_S of Eq. 3.4, each on the processes that have images of its super-class.

    Their step averages over the images of the super-class, as in a group of the published code.
    num_classes: of each. lr, momentum, weight_decay: of SGD; the momentum is part of the state.
    """

    def __init__(
        self,
        places: Places,
        num_features: int,
        num_classes: int,
        process: dist.Process,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ):
        self.places, self.process = places, process
        self.groups = dist.new_groups(places.holders)
        self.layers = {
            s: TopLayer(num_features, num_classes).to(process.device) for s in places.held
        }
        self.optimizer = torch.optim.SGD(
            self.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
        )

    def parameters(self) -> list[nn.Parameter]:
        """Those of all classifiers that this process holds."""
        return [p for layer in self.layers.values() for p in layer.parameters()]

    def prototypes(self) -> list[Tensor]:
        """The weights (k, F) of each classifier that this process holds."""
        return [layer.weight for layer in self.layers.values()]

    def num_holders(self) -> list[int]:
        """How many processes hold each of them."""
        return [len(self.places.holders[s]) for s in self.layers]

    def reset(self, num_classes: int, seed: int, epoch: int) -> None:
        """New weights, the same on all processes that hold a classifier, and no momentum."""
        for s, layer in self.layers.items():
            layer.reset(num_classes, generator(seed, epoch, s, 0, SUB_DRAW))
        self.optimizer.state.clear()

    def scores(self, features: Tensor) -> list[Tensor]:
        """features (V, B, F), after the ReLU -> for each super-class held (V * n_s, k)."""
        return [
            layer(features[:, self.places.local(s)].flatten(0, 1))
            for s, layer in self.layers.items()
        ]

    def targets(self, sub_classes: Tensor) -> list[Tensor]:
        """(B,), the sub-classes of a batch -> for each super-class held (n_s,)."""
        return [sub_classes[self.places.local(s)] for s in self.layers]

    @torch.no_grad()
    def average_gradients(self, scale: float) -> None:
        """Make them those of the mean over a super-class' images; scale: of the loss."""
        for s, layer in self.layers.items():
            share = len(self.places.supers) / self.places.quota[s] / scale
            if len(self.places.holders[s]) > 1:
                with dist.within(self.groups[s]):
                    for p in layer.parameters():
                        p.grad = dist.all_reduce_sum(p.grad)
            for p in layer.parameters():
                p.grad.mul_(share)

    def overflowed(self) -> bool:
        """Whether a gradient of any process is not finite."""
        bad = sum((~torch.isfinite(p.grad)).sum() for p in self.parameters())
        return bool(dist.all_reduce_max(bad).item())

    # ============ saving ============
    def state_dict(self) -> dict:
        """Weights and momentum of all super-classes, on the CPU of the main process."""
        state = {}
        for s, holders in enumerate(self.places.holders):
            layer = self.layers.get(s)
            shape = (layer.out_features, layer.in_features) if layer is not None else (0, 0)
            num_classes, num_features = dist.all_reduce_max(torch.tensor(shape)).tolist()
            for name, size in (("weight", (num_classes, num_features)), ("bias", (num_classes,))):
                p = None if layer is None else getattr(layer, name)
                momentum = self.optimizer.state.get(p, {}).get("momentum_buffer")
                blank = torch.zeros(size, device=self.process.device)
                for key, value in ((name, p), (f"momentum_{name}", momentum)):
                    value = dist.broadcast(blank if value is None else value.detach(), holders[0])
                    if dist.is_main():
                        state[f"{s}.{key}"] = value.cpu().clone()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Take this process's classifiers, for any number of processes."""
        for s, layer in self.layers.items():
            layer.load_state_dict({name: state[f"{s}.{name}"] for name in ("weight", "bias")})
            for name, p in layer.named_parameters():
                momentum = state[f"{s}.momentum_{name}"].to(p.device)
                self.optimizer.state[p] = {"momentum_buffer": momentum.clone()}


def loss_of_nothing(num_super: int, num_sub: int) -> float:
    """Eq. 3.4 of uniform predictions."""
    return math.log(num_super) + math.log(num_sub)


def cluster_groups(num_clusters: int) -> list | None:
    """Processes of each first-level cluster where they can be shared out evenly, else None."""
    size, rest = divmod(dist.world_size(), num_clusters)
    if num_clusters == 1 or size == 0 or rest:
        return None
    return dist.new_groups([range(i * size, (i + 1) * size) for i in range(num_clusters)])


def one_label(labels: Tensor, num_sub: int) -> Tensor:
    """(2, N) of both levels -> (1, N), a number for each second-level cluster of the data."""
    num_sub = max(num_sub, int(labels[1].max()) + 1)  # of before --k was changed
    return torch.where(labels[:1] >= 0, labels[:1] * num_sub + labels[1:], IGNORED)
