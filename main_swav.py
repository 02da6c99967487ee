"""SwAV: learn visual features by swapping cluster assignments between several crops of an image.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by
Contrasting Cluster Assignments, NeurIPS 2020, arXiv:2006.09882.
  Eq. 1, 2, 6  swapped prediction over crops       swav_loss
  Eq. 3-5      codes by Sinkhorn-Knopp             assign_codes, src/cluster/sinkhorn.py
  section 3.1  queue for small batches             Queue
  section 3.2  multi-crop                          src/data/multicrop.py, src/data/augment.py

  python main_swav.py                                    digits, a minute or two on two cores
  python main_swav.py --data_path cifar10 --epochs 100   one GPU
  torchrun --nproc_per_node 8 main_swav.py --data_path /imagenet/train --nmb_crops 2 6 \\
      --batch_size 32 --base_lr 0.6 --final_lr 0.0006 --warmup_epochs 0 --epochs 200 \\
      --freeze_prototypes_niters 5005 --queue_length 3840
  sbatch scripts/swav_800ep_pretrain.sh                  64 GPUs, 75.3 % linear in the paper
Starting the same command again continues where it stopped.

Deviations from the authors' code: Sinkhorn is finite for all finite scores (theirs overflows at
epsilon <= 0.011); photometry runs in batches on the device, in float, not on 8-bit images; images and
crops depend on (seed, epoch, index) only, photometry on (seed, epoch, iteration, rank).
Kept: normalisation with red std 0.228 (usually 0.229), so that features fit the released weights;
the schedule repeats its peak and stops short of its end; the queue is read before it is pushed, and
only once full; its length is rounded down to whole batches.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import logging
import math

import torch
import torch.nn.functional as F

from src import dist
from src.cluster.sinkhorn import sinkhorn_of_each
from src.data.augment import Augment
from src.data.datasets import EpochSampler
from src.data.multicrop import MultiCropDataset, multicrop_loader
from src.nets.resnet import build_model
from src.optim import build_optimizer, cosine_schedule
from src.run import checkpoint, flags, health, image_flags
from src.run.log import setup_logging
from src.run.run import Run, average_gradients, log_plan, place_network

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {"temperature": 0.2, "freeze_prototypes_niters": 100}


def photos(situation):
    """Defaults for photographs, beside those of src/run/presets.py; a queue where K is more than a batch."""
    num_prototypes, batch = situation.clusters(), situation.global_batch()
    return {
        **SMALL,
        "epsilon": 0.01,
        "nmb_prototypes": [num_prototypes],
        "queue_length": -(-num_prototypes // batch) * batch if num_prototypes > batch else 0,
        "epoch_queue_starts": 2,
    }


PRESETS = {
    "imagenet": {},
    "photos": photos,
    "cifar": {**SMALL, "epsilon": 0.01, "nmb_prototypes": [100]},
    "tiny": {**SMALL, "epsilon": 0.02, "nmb_prototypes": [60]},
}
MAX_SCORE = 1.0  # scores are cosines: embeddings and prototypes have norm 1


# ============ swav loss ============
def swav_loss(
    scores: torch.Tensor,
    assignments: list[torch.Tensor],
    nmb_crops: list[int],
    crops_for_assign: list[int],
    temperature: float,
) -> torch.Tensor:
    """Swapped prediction: the code of a crop is predicted from every other crop (Eq. 6).

    scores: (sum(nmb_crops) * B, K) = z^T c, crop-major, carries gradient. assignments: the codes q,
    (B, K) for each of crops_for_assign, constants. Returns the mean over images, over the assigned
    crops i and over the other crops v of - sum_k q_i^(k) log softmax(scores_v / temperature)^(k).
    """
    num_crops, num_prototypes = sum(nmb_crops), scores.shape[1]
    log_p = F.log_softmax(scores.float() / temperature, dim=1)
    log_p = log_p.view(num_crops, -1, num_prototypes)  # (V, B, K)
    every, loss = log_p.sum(dim=0), 0.0  # (B, K)
    for crop, q in zip(crops_for_assign, assignments, strict=True):
        others = every - log_p[crop]  # of the code's own crop nothing is predicted
        loss = loss - (q * others).sum(dim=1).mean()  # Eq. 2
    return loss / (len(crops_for_assign) * (num_crops - 1))


@torch.no_grad()
def assign_codes(scores, prototypes, crops_for_assign, queue, hard, **sinkhorn_args):
    """Codes of the crops in crops_for_assign, a list of (B, K): equal shares for all prototypes.

    scores: (V, B, K). prototypes: (K, D). A full queue adds its embeddings to the problem (section
    3.1). hard: round each code to its largest entry (appendix C.3).
    """
    batch_size, problems = scores.shape[1], [scores[crop] for crop in crops_for_assign]  # (B, K)
    if queue is not None and queue.full:
        problems = [
            torch.cat([embeddings @ prototypes.t(), problem])  # (L + B, K)
            for embeddings, problem in zip(queue.embeddings, problems, strict=True)
        ]
    total_rows = len(problems[0]) * dist.world_size()  # as many on each process
    solved = sinkhorn_of_each(problems, MAX_SCORE, total_rows, **sinkhorn_args)
    codes = [q[-batch_size:] for q in solved]  # (B, K) each
    if hard:
        codes = [F.one_hot(q.argmax(1), q.shape[1]).to(q.dtype) for q in codes]
    return codes


class Queue:
    """Embeddings of the last batches for each assigned crop, newest first (section 3.1).

    length: rows over all processes, a multiple of the global batch. Read before the batch is pushed.
    """

    def __init__(self, num_crops, length, dim, batch_size, device):
        self.batch_size = batch_size
        rows = length // dist.world_size()
        self.embeddings = torch.zeros(num_crops, rows, dim, device=device)  # (crops, L, D)
        self.num_rows = 0  # pushed so far

    @property
    def full(self):
        """Whether each row has been pushed, so that the queue may be read."""
        return self.num_rows >= self.embeddings.shape[1]

    def push(self, embeddings):
        """embeddings: (crops, B, D) of the batch; what is not finite becomes 0.

        Half precision overflows now and then, and one NaN would be in all codes as long as it is kept.
        """
        kept = self.embeddings[:, : -embeddings.shape[1]]
        finite = embeddings.to(kept.dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.embeddings = torch.cat([finite, kept], 1)
        self.num_rows += embeddings.shape[1]

    def state_dict(self):
        """All processes' rows, by age, so that any number of processes can take them over."""
        rows = dist.all_gather_rows(self.embeddings[None])  # (W, crops, L, D)
        rows = rows.unflatten(2, (-1, self.batch_size))  # (W, crops, L / B, B, D)
        rows = rows.permute(1, 2, 0, 3, 4)  # (crops, L / B, W, B, D)
        return {"embeddings": rows.flatten(1, 3).cpu(), "num_rows": self.num_rows * len(rows[0, 0])}

    def load_state_dict(self, state):
        """Take over this process's rows of what state_dict gave, on any number of processes."""
        batch_size, rank, world_size = self.batch_size, dist.rank(), dist.world_size()
        stored = state["embeddings"].to(self.embeddings.device)
        num_batches = self.embeddings.shape[1] // batch_size
        global_batch = world_size * batch_size
        missing = num_batches * global_batch - stored.shape[1]
        if missing > 0:
            # The queue was made longer: it keeps the newest whole batches, and fills up.
            kept = stored.shape[1] // global_batch * global_batch
            logger.info(
                f"the queue is longer than that of the checkpoint: {kept:,} rows of it are kept"
            )
            state = {"num_rows": min(state["num_rows"], kept)}
            stored = F.pad(stored[:, :kept], (0, 0, 0, num_batches * global_batch - kept))
        stored = stored[:, : num_batches * global_batch]
        stored = stored.unflatten(1, (num_batches, world_size, batch_size))[:, :, rank]
        self.embeddings = stored.flatten(1, 2).clone()
        self.num_rows = state["num_rows"] // world_size


@torch.no_grad()
def normalize_prototypes(prototypes):
    """Project the prototypes back to the unit sphere: each (K, D), rows to norm 1."""
    for weight in prototypes:
        weight.copy_(F.normalize(weight, dim=1))


# ============ one epoch ============
def train_one_epoch(run, loader, schedule, queue, epoch, start, args):
    """One pass over the loader, from iteration `start` of the epoch on."""
    num_crops = sum(args.nmb_crops)
    heads = prototypes_of(run.module)
    for iteration, crops, _ in run.iterate(loader, epoch, start, changed=heads):
        for group in run.optimizer.param_groups:
            group["lr"] = float(schedule[iteration])
        normalize_prototypes(heads)

        # ============ multi-crop forward ============
        with run.autocast():
            embedding, scores = run.network(crops)  # (V * B, D), (V * B, K) for each head
        embedding = embedding.detach().unflatten(0, (num_crops, -1))  # (V, B, D)
        scores = scores if len(heads) > 1 else [scores]

        # ============ swav loss ============
        loss, codes_of_heads = 0.0, []
        for prototypes, s in zip(heads, scores, strict=True):
            codes = assign_codes(
                s.detach().unflatten(0, (num_crops, -1)),
                prototypes,
                args.crops_for_assign,
                queue,
                hard=iteration < args.hard_assignment_iters,
                epsilon=args.epsilon,
                iterations=args.sinkhorn_iterations,
                dtype=torch.float64 if args.sinkhorn_float64 else torch.float32,
            )
            codes_of_heads.append(codes)
            swapped = swav_loss(s, codes, args.nmb_crops, args.crops_for_assign, args.temperature)
            loss = loss + swapped / len(heads)
        assigned = torch.stack([embedding[crop] for crop in args.crops_for_assign])  # (crops, B, D)

        # ============ backward and optim step ============
        run.backward(loss)
        if iteration < args.freeze_prototypes_niters:
            for prototypes in heads:
                prototypes.grad = None
        if run.step() and queue is not None:
            queue.push(assigned)

        # ============ log, save, stop ============
        if run.is_log_step():
            log_progress(run, codes_of_heads[0][0], assigned.flatten(0, 1))
        if run.save_or_stop():
            return


def log_progress(run, codes, embedding):
    """Write a log line with the health of the codes (B, K) and of the embeddings (N, D)."""
    num_prototypes = codes.shape[1]
    values = run.read(
        means={
            "code_entropy": health.code_entropy(codes),
            "embedding_std": health.embedding_std(embedding),
        },
        own={
            "prototypes_used": health.prototype_usage(codes),
            "rankme": health.rankme(embedding),
        },
    )
    text = (
        f"codes H {values['code_entropy']:.2f} of {math.log(num_prototypes):.2f}, "
        f"{values['prototypes_used']:.0f} of {num_prototypes} in use, "
        f"std {values['embedding_std']:.2f}, rank {values['rankme']:.0f}"
    )
    unique, unique_text = run.count_unique(prototypes_of(run.module), "--nmb_prototypes")
    line = run.report(values | unique, text + unique_text)
    run.diagnose(line, lambda lines: diagnose(lines, num_prototypes))


def diagnose(history: list[dict], num_prototypes: int) -> health.Trouble | None:
    """What is wrong with a run, in one sentence that names the flags that help, or None.

    history: the latest log lines, oldest first, with `loss`, `code_entropy` (nats), `prototypes_used`,
    `embedding_std` and `batch` (samples that share one assignment problem). The remedies are the
    published ones ("Common issues" of the SwAV repository): a lower epsilon, prototypes frozen for
    longer, a queue that is shorter or starts later. Needs 10 lines, all of them in trouble, because a
    healthy run passes ln(K) too.
    """
    recent = history[-health.NUM_LINES :]
    if len(recent) < health.NUM_LINES or num_prototypes < 2:
        return None
    ceiling = math.log(num_prototypes)
    remedies = "lower --epsilon (0.03), lower --base_lr, or freeze the prototypes for longer "
    trouble = health.same_embedding(recent, remedies + "(--freeze_prototypes_niters)")
    if trouble:
        return trouble
    if all(abs(line["loss"] - ceiling) < 1e-3 * ceiling for line in recent):
        return health.Trouble(
            "loss",
            f"the loss stays at ln(K) = {ceiling:.3f}, what constant codes give; lower --epsilon "
            "(0.03), freeze the prototypes for longer (--freeze_prototypes_niters), use fewer "
            "prototypes (--nmb_prototypes), or a shorter or later queue (--queue_length, "
            "--epoch_queue_starts)",
        )
    if all(line["code_entropy"] > 0.99 * ceiling for line in recent):
        return health.Trouble(
            "codes",
            f"the codes are uniform (entropy {recent[-1]['code_entropy']:.2f} of at most "
            f"{ceiling:.2f}) and carry no signal; lower --epsilon (0.03)",
        )
    possible = min(num_prototypes, recent[-1]["batch"])
    if possible >= 8 and all(line["prototypes_used"] < 0.05 * possible for line in recent):
        return health.Trouble(
            "prototypes",
            f"only {recent[-1]['prototypes_used']:.1f} of {possible} possible prototypes are in use; "
            "freeze the prototypes for longer (--freeze_prototypes_niters), lower --base_lr, or "
            "start the queue later (--epoch_queue_starts)",
        )
    return None


def prototypes_of(model):
    """The prototypes of each head: a list of (K, D) parameters."""
    return [p for name, p in model.named_parameters() if name.startswith("prototypes")]


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    args, dataset = image_flags.parse_args(
        get_parser(), PRESETS, argv, method="swav", world_size=launch.world_size
    )
    image_flags.fill_in_crops(args)
    flags.check_runtime(args, launch.world_size)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, len(dataset))
    queue_length = check_args(args, global_batch)
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    torch.manual_seed(args.seed)  # every process starts from the same network
    num_prototypes = args.nmb_prototypes if len(args.nmb_prototypes) > 1 else args.nmb_prototypes[0]
    model = build_model(
        args.arch, normalize=True, nmb_prototypes=num_prototypes, **flags.model_options(args)
    )
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.init_from:
        from src.nets.weights import load_weights

        load_weights(model, args.init_from, allow_missing=("projection_head", "prototypes"))
    if args.fixed_prototypes:  # appendix C.2
        for prototypes in prototypes_of(model):
            prototypes.requires_grad_(False)

    process = dist.init(args.device, args.dist_timeout)

    # ============ data ============
    crops = MultiCropDataset(dataset, **image_flags.crop_options(args))
    sampler = EpochSampler(
        len(dataset),
        args.batch_size,
        rank=process.rank,
        world_size=process.world_size,
        seed=args.seed,
        groups=dataset.groups,
    )
    loader = multicrop_loader(crops, sampler, **flags.loader_options(args, process.device.type))

    # ============ model and optimizer ============
    model = place_network(model, process, **flags.placement_options(args))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(args.optimizer, trained, args.wd)  # appendix A.1
    queue = build_queue(args, queue_length, process.device) if queue_length else None
    run = Run(
        args,
        process,
        method="swav",
        module=model,
        network=average_gradients(model, process),
        augment=augment,
        optimizer=optimizer,
        dataset=dataset,
        global_batch=global_batch,
        image_size=args.size_crops[0],
        num_prototypes=args.nmb_prototypes[0],
        method_state={"queue": queue} if queue else {},
    )
    factor = flags.lr_factor(args, global_batch)
    schedule = cosine_schedule(
        args.base_lr * factor,
        args.final_lr * factor,
        args.epochs,
        run.iters_per_epoch,
        warmup_epochs=args.warmup_epochs,
        start_value=args.start_warmup * factor,
    )
    log_plan(run, crops, peak_lr=args.base_lr * factor)
    log_codes(args, global_batch, queue_length)
    first_epoch, start = run.resume()
    run.begin()

    # ============ epochs ============
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch, start)
        active = queue if epoch >= args.epoch_queue_starts else None
        train_one_epoch(run, loader, schedule, active, epoch, start, args)
        start = 0
        if run.end_epoch(epoch):
            break
    return run.leave()


def build_queue(args, queue_length, device):
    """The queue of --queue_length embeddings, rounded down to whole batches."""
    return Queue(
        num_crops=len(args.crops_for_assign),
        length=queue_length,
        dim=args.head_dims[-1] if args.head_dims else args.feat_dim,
        batch_size=args.batch_size,
        device=device,
    )


def log_codes(args, global_batch, queue_length):
    """Say what the assignment problem will be; too few samples for the prototypes is a known trap."""
    num_prototypes = args.nmb_prototypes[0]
    logger.info(
        f"codes       K = {num_prototypes:,} prototypes share {global_batch:,} images and a queue of "
        f"{queue_length:,}; ln(K) = {math.log(num_prototypes):.3f} is the loss of constant codes; "
        f"epsilon {args.epsilon:g}, {args.sinkhorn_iterations} iterations"
    )
    if queue_length < args.queue_length:
        logger.info(f"note: --queue_length {args.queue_length} rounded down to whole batches")
    if global_batch + queue_length < num_prototypes:
        logger.info("note: less than one sample each; the paper adds a queue of about K rows")


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method (symbols of the paper)").add_argument
    add("--crops_for_assign", type=at_least_zero(int), nargs="+", default=[0, 1],
        help="crops whose codes q are computed and predicted from the others (Eq. 6)")
    add("--temperature", type=positive(float), default=0.1, help="tau of Eq. 2")
    add("--epsilon", type=positive(float), default=0.05,
        help="entropy regularisation of the codes, Eq. 3; lower it first when a run collapses")
    add("--sinkhorn_iterations", type=positive(int), default=3, help="of Eq. 5 (appendix C.4)")
    add("--sinkhorn_float64", action="store_true", help="compute the codes in float64")
    add("--nmb_prototypes", type=positive(int), nargs="+", default=[3000],
        help="K; several values: several sets of prototypes, their losses averaged")
    add("--fixed_prototypes", action="store_true", help="random ones, not learned (appendix C.2)")
    add("--freeze_prototypes_niters", type=at_least_zero(int), default=313,
        help="iterations at the start during which the prototypes are not updated")
    add("--hard_assignment_iters", type=at_least_zero(int), default=0,
        help="iterations at the start with codes rounded to one prototype (appendix C.3)")
    add("--queue_length", type=at_least_zero(int), default=0,
        help="embeddings of past batches that take part in Eq. 3, over all processes; 0: none")
    add("--epoch_queue_starts", type=at_least_zero(int), default=15, help="epoch, counted from 0")

    image_flags.add_crop_args(image_flags.add_data_args(parser, PRESETS))
    image_flags.add_augment_args(parser)
    flags.add_model_args(parser)

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=100, help="passes over the data")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=64,
        help="B, images per process")
    add("--optimizer", default="larc", choices=["larc", "lars", "sgd", "adamw"],
        help="larc: around SGD with momentum 0.9, as published; or another")
    add("--base_lr", type=positive(float), default=4.8, help="learning rate after the warm-up")
    add("--final_lr", type=at_least_zero(float), default=0.0, help="learning rate at the end")
    add("--start_warmup", type=at_least_zero(float), default=0.0, help="learning rate at the start")
    add("--warmup_epochs", type=at_least_zero(int), default=10, help="epochs of linear warm-up")
    add("--wd", type=at_least_zero(float), default=1e-6, help="weight decay")

    flags.add_training_args(parser)
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args, global_batch: int) -> int:
    """Raise ValueError on arguments that do not fit together; returns the queue length used."""
    num_crops = sum(args.nmb_crops)
    if num_crops < 2:
        raise ValueError("--nmb_crops 1: a code is predicted from another crop, so use at least 2")
    image_flags.check_crops_for_assign(args)
    length = args.queue_length - args.queue_length % global_batch
    is_of_preset = args.queue_length == (getattr(args, "chosen", None) or {}).get("queue_length")
    if args.queue_length and not length and not is_of_preset:  # whose batch has rows enough then
        raise ValueError(
            f"--queue_length {args.queue_length} has no room for one batch of {global_batch} images: "
            f"use a multiple of {global_batch}, or 0 for no queue"
        )
    return length


if __name__ == "__main__":
    flags.run(main)
