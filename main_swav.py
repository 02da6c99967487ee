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

import argparse
import logging
import math

import torch
import torch.nn.functional as F

from src import dist
from src.cluster.sinkhorn import sinkhorn
from src.data.augment import Augment
from src.data.datasets import open_dataset
from src.gradients import grad_norm
from src.losses import swapped_cross_entropy
from src.nets.resnet import build_model
from src.optim import cosine_schedule
from src.run import checkpoint, diagnosis, flags, image_flags, metrics, setup
from src.run.log import Stopwatch, describe_run, setup_logging
from src.run.run import Run

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {"temperature": 0.2, "freeze_prototypes_niters": 100}
PRESETS = {
    "imagenet": {},
    "cifar": {**SMALL, "epsilon": 0.01, "nmb_prototypes": [100], "dump_path": "runs/swav_cifar"},
    "tiny": {**SMALL, "epsilon": 0.02, "nmb_prototypes": [60], "dump_path": "runs/swav_digits"},
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
    num_crops = sum(nmb_crops)
    views = scores.view(num_crops, -1, scores.shape[-1])  # (V, B, K)
    num_pairs = len(crops_for_assign) * (num_crops - 1)
    pairs = (views, assignments, crops_for_assign)
    return swapped_cross_entropy(*pairs, temperature, weight=1 / num_pairs)


@torch.no_grad()
def assign_codes(scores, prototypes, crops_for_assign, queue, hard, **sinkhorn_args):
    """Codes of the crops in crops_for_assign, a list of (B, K): equal shares for all prototypes.

    scores: (V, B, K). prototypes: (K, D). A full queue adds its embeddings to the problem (section
    3.1). hard: round each code to its largest entry (appendix C.3).
    """
    batch_size, codes = scores.shape[1], []
    for i, crop in enumerate(crops_for_assign):
        problem = scores[crop]  # (B, K)
        if queue is not None and queue.full:
            problem = torch.cat([queue.embeddings[i] @ prototypes.t(), problem])  # (L + B, K)
        q = sinkhorn(problem, max_score=MAX_SCORE, **sinkhorn_args)[-batch_size:]  # (B, K)
        codes.append(F.one_hot(q.argmax(1), q.shape[1]).to(q.dtype) if hard else q)
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
        return self.num_rows >= self.embeddings.shape[1]

    def push(self, embeddings):
        """embeddings: (crops, B, D) of the batch."""
        kept = self.embeddings[:, : -embeddings.shape[1]]
        self.embeddings = torch.cat([embeddings.to(kept.dtype), kept], 1)
        self.num_rows += embeddings.shape[1]

    def state_dict(self):
        """All processes' rows, by age, so that any number of processes can take them over."""
        rows = dist.all_gather_rows(self.embeddings[None])  # (W, crops, L, D)
        rows = rows.unflatten(2, (-1, self.batch_size))  # (W, crops, L / B, B, D)
        rows = rows.permute(1, 2, 0, 3, 4)  # (crops, L / B, W, B, D)
        return {"embeddings": rows.flatten(1, 3).cpu(), "num_rows": self.num_rows * len(rows[0, 0])}

    def load_state_dict(self, state):
        batch_size, rank, world_size = self.batch_size, dist.rank(), dist.world_size()
        stored = state["embeddings"].to(self.embeddings.device)
        num_batches = self.embeddings.shape[1] // batch_size
        if stored.shape[1] < num_batches * world_size * batch_size:
            return  # the queue was made longer: it fills again
        stored = stored[:, : num_batches * world_size * batch_size]
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
    """One pass over the loader, from iteration `start`; returns the iterations of the epoch done."""
    device, num_crops = run.process.device, sum(args.nmb_crops)
    heads = [p for name, p in run.module.named_parameters() if name.startswith("prototypes")]
    stopwatch = Stopwatch()
    run.network.train()
    for it, (batch, _) in enumerate(stopwatch.watch(loader), start):
        iteration = epoch * run.iters_per_epoch + it
        for group in run.optimizer.param_groups:
            group["lr"] = float(schedule[iteration])
        normalize_prototypes(heads)

        # ============ multi-crop forward ============
        draws = setup.generator(args.seed, epoch, it, run.process.rank)
        torch.manual_seed(draws.initial_seed())  # dropout and the like of a trunk, if it has any
        crops = run.augment([crop.to(device, non_blocking=True) for crop in batch], draws)
        with dist.autocast(device, run.precision):
            embedding, scores = run.network(crops)  # (V * B, D), (V * B, K) for each head
        embedding = embedding.detach().unflatten(0, (num_crops, -1))  # (V, B, D)

        # ============ swav loss ============
        loss, codes_of_heads = 0.0, []
        for prototypes, s in zip(heads, scores if len(heads) > 1 else [scores], strict=True):
            codes = assign_codes(
                *(s.detach().unflatten(0, (num_crops, -1)), prototypes, args.crops_for_assign),
                *(queue, iteration < args.hard_assignment_iters),
                epsilon=args.epsilon,
                iterations=args.sinkhorn_iterations,
                dtype=torch.float64 if args.sinkhorn_float64 else torch.float32,
            )
            codes_of_heads.append(codes)
            swapped = (args.nmb_crops, args.crops_for_assign, args.temperature)
            loss = loss + swav_loss(s, codes, *swapped) / len(heads)
        if queue is not None:
            queue.push(torch.stack([embedding[crop] for crop in args.crops_for_assign]))

        # ============ backward and optim step ============
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        for prototypes in heads if iteration < args.freeze_prototypes_niters else ():
            prototypes.grad = None
        run.last = (loss.detach(), grad_norm(run.module.parameters()))
        run.scaler.step(run.optimizer)
        run.scaler.update()

        # ============ log, save, stop ============
        done = it + 1
        run.picture_crops(crops)
        if done % args.log_freq == 0 or done == run.iters_per_epoch or iteration == 0:
            assigned = embedding[args.crops_for_assign].flatten(0, 1)  # (crops * B, D)
            rates = stopwatch.rates(run.global_batch, len(schedule) - iteration - 1)
            log_progress(run, epoch, iteration, codes_of_heads[0][0], assigned, rates, args)
        if done < run.iters_per_epoch and run.must_stop(done):
            run.save(epoch, done)
            return done
        if args.checkpoint_iters and done % args.checkpoint_iters == 0 < run.iters_per_epoch - done:
            run.save(epoch, done)
    return run.iters_per_epoch


def log_progress(run, epoch, iteration, codes, embedding, rates, args):
    """Write a log line with the health of the codes (B, K) and of the embeddings (N, D)."""
    num_prototypes = codes.shape[1]
    health = {
        "code_entropy": run.mean_over_processes(metrics.code_entropy(codes)),
        "prototypes_used": metrics.prototype_usage(codes).item(),
        "embedding_std": run.mean_over_processes(metrics.embedding_std(embedding)),
        "rankme": metrics.rankme(embedding).item(),
    }
    text = "codes H {code_entropy:.2f} of {ceiling:.2f}, {prototypes_used:.0f} of {k} in use, "
    text += "std {embedding_std:.2f}, rank {rankme:.0f}"
    text = text.format(**health, ceiling=math.log(num_prototypes), k=num_prototypes)
    line = run.report(epoch, iteration, rates, health, text)
    run.diagnose(line, lambda lines: diagnosis.diagnose(lines, num_prototypes))


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    args = flags.parse_args(get_parser(), PRESETS, argv)
    image_flags.fill_in_crops(args)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    flags.check_runtime(args, launch.world_size)
    dataset = open_dataset(args.data_path, in_chans=args.in_chans)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, len(dataset))
    queue_length = check_args(args, global_batch)
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    torch.manual_seed(args.seed)  # every process starts from the same network
    sets = args.nmb_prototypes if len(args.nmb_prototypes) > 1 else args.nmb_prototypes[0]
    options = flags.model_options(args)
    model = build_model(args.arch, normalize=True, nmb_prototypes=sets, **options)
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.init_from:
        head = ("projection_head", "prototypes")
        checkpoint.load_weights(model, args.init_from, allow_missing=head)
    if args.fixed_prototypes:  # appendix C.2
        for name, weight in model.named_parameters():
            weight.requires_grad_(not name.startswith("prototypes"))

    process = dist.init(args.device)
    precision = dist.resolve_precision(args.precision, process.device)

    # ============ data ============
    resolutions = [args.nmb_crops, args.size_crops, args.min_scale_crops, args.max_scale_crops]
    loading = (args.batch_size, args.workers, args.seed, args.interpolation)
    crops, sampler, loader = setup.multicrop_loading(dataset, resolutions, process, *loading)

    # ============ model and optimizer ============
    placing = (process, args.sync_bn, args.syncbn_process_group_size, args.compile)
    model, network = setup.wrap_network(model, *placing)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = setup.build_optimizer(args.optimizer, trained, args.wd)  # appendix A.1
    queue = None
    if queue_length:
        dim = args.head_dims[-1] if args.head_dims else args.feat_dim
        shape = (len(args.crops_for_assign), queue_length, dim)
        queue = Queue(*shape, args.batch_size, process.device)
    run = Run(
        *(args, process, precision, model, network, augment, optimizer),
        *(len(dataset), global_batch, {"queue": queue} if queue else {}),
        method="swav",
    )
    factor = flags.lr_factor(args, global_batch)
    peak, end, begin = (lr * factor for lr in (args.base_lr, args.final_lr, args.start_warmup))
    times = (args.epochs, run.iters_per_epoch, args.warmup_epochs)
    schedule = cosine_schedule(peak, end, *times, begin)
    setup.log_plan(run, crops, peak)
    log_codes(args, global_batch, queue_length)
    first_epoch, start = run.resume()
    if process.rank == 0:  # not before: a run that may not go on leaves the folder as it was
        describe_run(vars(args), args.dump_path)

    # ============ epochs ============
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch, start)
        active = queue if epoch >= args.epoch_queue_starts else None
        done = train_one_epoch(run, loader, schedule, active, epoch, start, args)
        if run.stopping:
            return run.stopped()
        last, start = epoch + 1 == args.epochs, 0
        run.save(epoch, done, keep=last or (epoch + 1) % args.checkpoint_freq == 0)
        if args.knn_freq and (last or (epoch + 1) % args.knn_freq == 0):
            run.probe(model, dataset, epoch, args.size_crops[0], args.workers)
        run.plot(args.nmb_prototypes[0])
        if not last and run.must_stop(done):
            return run.stopped()
    return run.finished()


def log_codes(args, global_batch, queue_length):
    """Say what the assignment problem will be; too few samples for the prototypes is a known trap."""
    num_prototypes = args.nmb_prototypes[0]
    logger.info(
        "codes       K = %s prototypes share %s images and a queue of %s; ln(K) = %.3f is the loss of "
        "constant codes; epsilon %g, %d iterations",
        *(f"{num_prototypes:,}", f"{global_batch:,}", f"{queue_length:,}"),
        *(math.log(num_prototypes), args.epsilon, args.sinkhorn_iterations),
    )
    if queue_length < args.queue_length:
        logger.info("note: --queue_length %d rounded down to whole batches", args.queue_length)
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
    if args.queue_length and not length:
        raise ValueError(
            f"--queue_length {args.queue_length} has no room for one batch of {global_batch} images: "
            f"use a multiple of {global_batch}, or 0 for no queue"
        )
    return length


if __name__ == "__main__":
    flags.run(main)
