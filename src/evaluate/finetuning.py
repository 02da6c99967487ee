"""Fine-tuning a network under a new linear classifier: steps, evaluation each epoch, saving, resuming.

The whole network is trained, with batch norm over all processes. What eval_semisup.py and
eval_finetune.py have in common; the batches are those of finetune_images.py.
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dist
from ..data.datasets import ImageDataset
from ..data.multicrop import generator
from ..errors import RunError
from ..labels.features import extract_features
from ..nets.heads import forward_crops
from ..nets.top_layer import PlainNetwork
from ..nets.vision_transformer import VisionTransformer
from ..optim import build_optimizer
from ..run import checkpoint
from ..run.log import RunLog, Stopwatch, duration, write_whole
from ..run.run import average_gradients, place_network, share_buffers
from ..run.stop import StopSignal
from .linear_classifiers import losses, top_hits
from .linear_files import begun
from .voc_classifier import BIAS, WEIGHT_STD

logger = logging.getLogger(__name__)

STOP_CHECK = 10  # iterations between agreeing on a signal, when there are several processes
TOKENS = ("cls_token", "pos_embed", "register_tokens")  # which are never decayed, nor are vectors
ROWS = 1024  # scores that are compared with labels at a time
# (epoch, iteration to begin at) -> crops (B, C, S_i, S_i) on the device, and their targets, see
# src.evaluate.finetune_images.
Batches = Callable[[int, int], Iterator[tuple[list[Tensor], Tensor]]]


# ============ the network ============
class FineTunedNetwork(nn.Module):
    """A tensor or a list of crops (B, C, S_i, S_i) -> scores (N, num_classes), crop-major.

    backbone: the model of src.nets.pretrained.open_pretrained. The linear layer starts as PyTorch
    makes one, by the seed. The linear layers of AlexNet and VGG-16 with batch norm start anew, too, as in
    DeeperCluster's fine-tuning: weights N(0, 0.01), biases 0.1.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, seed: int):
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.linear = nn.Linear(backbone.num_features, num_classes)
            if isinstance(backbone, PlainNetwork):
                for layer in backbone.classifier:
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=WEIGHT_STD)
                        nn.init.constant_(layer.bias, BIAS)

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        features = forward_crops(self.backbone.forward_backbone, crops)  # (N, num_features)
        before_top = getattr(self.backbone, "before_top", nn.Identity())  # a ReLU, or nothing
        return self.linear(before_top(features))


class WeightAverage:
    """The moving average of a network's weights and buffers: a <- decay a + (1 - decay) w.

    module: the average, a copy of the network before it is wrapped for several processes.
    """

    def __init__(self, network: nn.Module, decay: float, device: torch.device):
        self.module = copy.deepcopy(network).to(device, memory_format=torch.channels_last)
        self.module.eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take a step towards the weights of the network; what is no fraction is taken over."""
        own, latest = self.module.state_dict(), network.state_dict()
        names = [name for name in own if own[name].is_floating_point()]
        torch._foreach_lerp_(
            [own[name] for name in names], [latest[name] for name in names], 1 - self.decay
        )
        for name in own.keys() - set(names):
            own[name].copy_(latest[name])


# ============ what is saved ============
@dataclass(frozen=True)
class Plan:
    """How long and with what rates a network is fine-tuned.

    batch: images of an iteration over all processes. lr_factor: iteration, over all epochs -> what the
    base_lr of each group of the optimizer is multiplied by. max_norm: of the gradient, None: any.
    checkpoint_iters: iterations between saves inside an epoch, checkpoint_freq: epochs between the
    checkpoints that are kept; 0: none. val_freq: epochs between evaluations.
    """

    epochs: int
    iters_per_epoch: int
    batch: int
    lr_factor: Callable[[int], float]
    seed: int
    label_smoothing: float = 0.0
    max_norm: float | None = None
    log_freq: int = 50
    val_freq: int = 1
    checkpoint_iters: int = 0
    checkpoint_freq: int = 0


class FineTuning:
    """A network, its optimizer and results, and the folder that keeps them.

    module: the network without wrappers; network: the same, in DDP where there are several processes.
    groups: of the optimizer, each with its base_lr, of the module. settings: all that the result
    depends on; a folder with others is not continued. average_decay: see WeightAverage; None: there is
    none. history: results by epoch.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Callable[[nn.Module], list[dict]],
        *,
        optimizer: str,
        weight_decay: float,
        process: dist.Process,
        precision: str,
        folder: Path,
        settings: dict,
        average_decay: float | None = None,
    ):
        self.process, self.precision = process, precision
        self.folder, self.settings, self.history = folder, settings, []
        self.average = None
        if average_decay is not None:
            self.average = WeightAverage(module, average_decay, process.device)
        self.module = place_network(
            module, process, sync_bn="pytorch", syncbn_process_group_size=0, compiled=False
        )
        self.network = average_gradients(self.module, process)
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(optimizer, groups(self.module), weight_decay)
        self.scaler = dist.grad_scaler(process.device, precision)

    def save(self, epoch: int, samples_done: int, keep_as: str | None = None) -> None:
        """Save to the folder's checkpoint.pth; all processes call it, one writes."""
        state = {
            "model": self.module.state_dict(),
            "average": self.average.module.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "samples_done": samples_done,  # of the epoch
            "history": self.history,
            "settings": self.settings,
        }
        checkpoint.save_together(self.folder, state, keep_as)

    def resume(self, start: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Take over what the folder holds: (epoch, samples of it done) to go on from.

        start: the same where it holds nothing. Raises CheckpointError if that was made with other
        settings.
        """
        state = begun(self.folder, self.settings)
        if state is None:
            return start
        checkpoint.load_state(self.module, state["model"], self.folder)
        if self.average is not None:
            checkpoint.load_state(self.average.module, state["average"], self.folder)
        checkpoint.load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]
        epoch, samples_done = state["epoch"], state["samples_done"]
        logger.info(f"{self.folder}: {epoch} epochs and {samples_done} images of the next are done")
        return epoch, samples_done

    def evaluate(self, val: ImageDataset, extraction: dict) -> dict:
        """Top-1, top-5 (%) and loss on the centre crops of validation images; all processes call it.

        extraction: size, mean, std, device, ... of src.labels.features.extract_features. The average of the
        weights is evaluated where there is one.
        """
        share_buffers(self.module)
        module = self.module if self.average is None else self.average.module
        module.eval()
        scores, indices = extract_features(module, val, **extraction)
        return score_accuracies(scores, val.labels[indices])


def score_accuracies(scores: Tensor, labels: Tensor) -> dict:
    """Top-1, top-5 (%) and mean cross-entropy over the rows of all processes.

    scores (n, C), labels (n,): of this process, n may be 0. Fewer than 5 classes make a top-5 of 100.
    A score that is not a number is wrong.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for some, own in zip(scores.split(ROWS), labels.split(ROWS), strict=True):
        if len(some):
            some = some[None]  # (1, B, C)
            sums += torch.cat([top_hits(some, own)[:, 0], losses(some, own)]).double()
    count = dist.all_reduce_sum(torch.tensor(len(labels)))
    top1, top5, loss = (dist.all_reduce_sum(sums) / count).tolist()
    return {"top1": 100 * top1, "top5": 100 * top5, "loss": loss if math.isfinite(loss) else None}


# ============ training ============
def fit(
    state: FineTuning,
    batches: Batches,
    plan: Plan,
    *,
    start: tuple[int, int],
    evaluate: Callable[[], dict],
    stop: StopSignal,
    log: RunLog,
) -> bool:
    """Train to the last epoch; whether it was reached, and no signal asked to stop before.

    start: epoch and samples of it that are done. evaluate: what FineTuning.evaluate returns.
    """
    first_epoch, samples_done = start
    first_iteration = samples_done // plan.batch
    for epoch in range(first_epoch, plan.epochs):
        done = train_one_epoch(state, batches, plan, epoch, first_iteration, stop, log)
        is_last, first_iteration = epoch + 1 == plan.epochs, 0
        if done < plan.iters_per_epoch:
            return False
        if is_last or (epoch + 1) % plan.val_freq == 0:
            state.history.append({"epoch": epoch + 1, **evaluate()})
            log_epoch(state, plan, epoch, log)
        kept = bool(plan.checkpoint_freq) and (epoch + 1) % plan.checkpoint_freq == 0
        state.save(epoch + 1, 0, keep_as=f"ckp-{epoch + 1}" if kept else None)
        if not is_last and stop.agreed():
            return False
    return True


def train_one_epoch(
    state: FineTuning,
    batches: Batches,
    plan: Plan,
    epoch: int,
    start: int,
    stop: StopSignal,
    log: RunLog,
) -> int:
    """Train for one epoch, from iteration `start`; returns the iterations done.

    Fewer than all are done when a signal asked to stop; then they are saved.
    """
    process, optimizer, scaler = state.process, state.optimizer, state.scaler
    stopwatch = Stopwatch()
    state.network.train()
    for it, (crops, targets) in enumerate(stopwatch.watch(batches(epoch, start)), start):
        iteration, done = epoch * plan.iters_per_epoch + it, it + 1
        # Dropout and stochastic depth.
        torch.manual_seed(generator(plan.seed, epoch, it, process.rank).initial_seed())
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * plan.lr_factor(iteration)

        # ============ cross-entropy of all crops ============
        with dist.autocast(process.device, state.precision):
            scores = state.network(crops)  # (number of crops * B, num_classes)
        loss = F.cross_entropy(scores.float(), targets, label_smoothing=plan.label_smoothing)

        # ============ backward and optim step ============
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(state.trained, plan.max_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        if state.average is not None:
            state.average.update(state.module)

        # ============ log, save, stop ============
        is_last = done == plan.iters_per_epoch
        stopping = (process.world_size == 1 or done % STOP_CHECK == 0) and stop.agreed()
        if stopping or is_last or done % plan.log_freq == 0:
            to_go = (plan.epochs - epoch) * plan.iters_per_epoch - done
            rates = stopwatch.rates(plan.batch, to_go)
            log_progress(state, plan, epoch, it, loss=loss, norm=norm, rates=rates, log=log)
        if is_last:  # evaluated and saved by fit, which then looks for signals
            return done
        if stopping or (plan.checkpoint_iters and done % plan.checkpoint_iters == 0):
            state.save(epoch, done * plan.batch)
        if stopping:
            return done
    return plan.iters_per_epoch


# ============ groups of parameters ============
def trunk_and_classifier(module: FineTunedNetwork, lr: float, lr_last_layer: float) -> list[dict]:
    """Two groups for the optimizer: the weights of the network, and those of the last layer."""
    trunk = [p for p in module.backbone.parameters() if p.requires_grad]
    return [
        {"params": trunk, "base_lr": lr},
        {"params": list(module.linear.parameters()), "base_lr": lr_last_layer},
    ]


def groups_by_layer(
    module: FineTunedNetwork,
    lr: float,
    lr_last_layer: float,
    *,
    layer_decay: float = 1.0,
    decays_vectors: bool = True,
) -> list[dict]:
    """The same two rates, smaller by layer_decay for each block further down from the classifier.

    A vision transformer's last LayerNorm has the whole rate, its last block layer_decay of it, and its
    tokens, positions and patches layer_decay^(depth + 1) (arXiv:2106.08254). decays_vectors false: biases,
    norms, tokens and positions have no weight decay. Raises ValueError for a layer_decay of another network.
    """
    if layer_decay != 1 and not isinstance(module.backbone, VisionTransformer):
        raise ValueError(f"--layer_decay {layer_decay} is for a vision transformer of ours: use 1")
    groups = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        rate = lr_last_layer
        if name.startswith("backbone."):
            rate = lr * layer_decay ** _layers_above(name, getattr(module.backbone, "depth", 0))
        is_vector = p.ndim == 1 or name.rpartition(".")[2] in TOKENS
        is_decayed = decays_vectors or not is_vector
        group = groups.setdefault((rate, is_decayed), {"params": [], "base_lr": rate})
        group["params"].append(p)
        if not is_decayed:
            group["weight_decay"] = 0.0
    last = (lr_last_layer, True)  # the last group is the classifier's, for the log
    return [*(group for key, group in groups.items() if key != last), groups[last]]


def _layers_above(name, depth):
    """How many blocks of a vision transformer come after a parameter, 0 for other networks."""
    if name.startswith("backbone.blocks."):
        return depth - int(name.split(".")[2])
    return 0 if name.startswith("backbone.norm.") else depth + bool(depth)


# ============ what is said ============
def log_progress(
    state: FineTuning,
    plan: Plan,
    epoch: int,
    it: int,
    *,
    loss: Tensor,
    norm: Tensor,
    rates: dict,
    log: RunLog,
) -> None:
    """Write a log line; RunError where the loss is not finite, what is saved stays as it is."""
    mean = (dist.all_reduce_sum(loss.detach()) / state.process.world_size).item()
    if not math.isfinite(mean):
        newest = state.folder / checkpoint.NEWEST
        raise RunError(
            f"the loss is not finite; {newest} holds the last good state, if one was saved; lower --lr"
        )
    iteration = epoch * plan.iters_per_epoch + it
    lrs = [group["lr"] for group in state.optimizer.param_groups]
    line = {
        "epoch": epoch,
        "epoch_float": epoch + (it + 1) / plan.iters_per_epoch,
        "iteration": iteration,
        "loss": mean,
        "lr": lrs[0],
        "lr_last_layer": lrs[-1],
        "gradient_norm": norm.item(),
    }
    log.write(iteration, {**line, **rates})
    logger.info(
        f"epoch {epoch + 1}/{plan.epochs} it {it + 1}/{plan.iters_per_epoch} loss {mean:.4f} "
        f"lr {lrs[0]:.4g} {lrs[-1]:.4g} grad {norm.item():.3g} | "
        f"{rates['images_per_second']:.0f} img/s data {100 * rates['data_share']:.0f}% "
        f"eta {duration(rates['eta_seconds'])}"
    )


def best_epoch(history: list[dict]) -> dict:
    """The results of the first epoch with the largest top-1."""
    return max(history, key=lambda line: line["top1"])


def log_epoch(state: FineTuning, plan: Plan, epoch: int, log: RunLog) -> None:
    """Write a line with the accuracies of an epoch."""
    latest, best = state.history[-1], best_epoch(state.history)
    iteration = (epoch + 1) * plan.iters_per_epoch - 1
    values = {name: latest[name] for name in ("top1", "top5")}
    values["val_loss"] = latest["loss"]
    log.write(
        iteration,
        {"epoch": epoch, "epoch_float": epoch + 1.0, "iteration": iteration, **values},
    )
    logger.info(
        f"epoch {epoch + 1}: top-1 {latest['top1']:.2f} top-5 {latest['top5']:.2f} "
        f"(best top-1 {best['top1']:.2f}, epoch {best['epoch']})"
    )


def report(history: list[dict], row: dict[str, str], settings: dict, path: Path) -> None:
    """Write the results to `path` as one line of JSON, and log them as a table; one process does.

    row: what the table says besides, by the name of its column.
    """
    if not dist.is_main():
        return
    last, best = history[-1], best_epoch(history)
    result = {name: last[name] for name in ("top1", "top5", "loss", "epoch")}
    result |= {f"best_{name}": best[name] for name in ("top1", "top5", "epoch")}
    write_whole(path, json.dumps({**result, "history": history, "settings": settings}) + "\n")
    columns = {
        **row,
        "top-1": f"{last['top1']:.2f}",
        "top-5": f"{last['top5']:.2f}",
        "best top-1": f"{best['top1']:.2f}",
        "epoch": str(best["epoch"]),
    }
    for cells in (columns, ["---"] * len(columns), columns.values()):
        logger.info(f"| {' | '.join(cells)} |")
    logger.info(f"written to {path}")
