"""DINO: a student learns the output of its own momentum teacher, from several crops of an image.

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised
Vision Transformers, ICCV 2021, arXiv:2104.14294; equations as in chapter 5 of Caron's thesis.
  Eq. 5.1-5.3    local-to-global cross-entropy, sharpening   DINOLoss.forward
  Eq. 5.4        centring                                    DINOLoss.update_center
  section 5.3.1  momentum teacher                            update_teacher
  section 5.3.1  head with a weight-normalised last layer    src/nets/heads.py
  Table 5.10     Sinkhorn-Knopp or batch softmax instead     TEACHER_OUTPUTS

  python main_dino.py                                    digits, two minutes on two cores
  python main_dino.py --data_path cifar10                one GPU
  torchrun --nproc_per_node 8 main_dino.py --arch vit_small --data_path /imagenet/train \\
      --output_dir runs/dino                             69.3 % k-NN as published
  sbatch scripts/dino_vits16_800ep.sh                    16 GPUs, 77.0 % linear in the paper
Starting the same command again continues where it stopped.

Deviations from the authors' code: photometry runs in batches on the device, in float, not on 8-bit
images; crops depend on (seed, epoch, index) only, photometry and stochastic depth on (seed, epoch,
iteration, rank); GPUs that have it compute in bf16, not fp16; a temperature warm-up longer than the
run is refused. Kept: normalisation with the usual red std 0.229; the very first learning rate is 0,
schedules repeat their peak and stop short of their end; the center is updated after it is used;
position tables are interpolated with 0.1 added to the size.
"""

import argparse
import logging
import math
from functools import partial

import torch
from torch import Tensor, nn

from src import dist
from src.cluster.sinkhorn import sinkhorn
from src.data.augment import Augment
from src.data.datasets import open_dataset, usual_std
from src.gradients import clip_gradients
from src.losses import swapped_cross_entropy
from src.nets.backbones import build_backbone
from src.nets.heads import DINOHead, MultiCropWrapper
from src.optim import cosine_schedule, parameter_groups
from src.run import checkpoint, diagnosis, flags, image_flags, metrics, setup
from src.run.log import Stopwatch, describe_run, setup_logging
from src.run.run import Run

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {
    "patch_size": 4, "out_dim": 1024, "hidden_dim": 512, "bottleneck_dim": 128, "use_bn_in_head": True,
    "optimizer": "adamw", "weight_decay_end": 0.04, "warmup_epochs": 4, "momentum_teacher": 0.99,
    "drop_path_rate": 0.0, "local_crops_number": 2, "width": 1.0,
}  # fmt: skip
PRESETS = {
    "imagenet": {},
    "cifar": {
        **SMALL, "arch": "vit_tiny", "lr": 0.002, "global_crops_size": 32, "local_crops_size": 16,
        "global_crops_scale": [0.3, 1.0], "local_crops_scale": [0.1, 0.4], "dump_path": "runs/dino_cifar",
    },
    "tiny": {
        **SMALL, "arch": "vit_micro", "lr": 0.016, "global_crops_size": 16, "local_crops_size": 8,
        "global_crops_scale": [0.6, 1.0], "local_crops_scale": [0.3, 0.6], "solarize": [0.0],
        "out_dim": 256, "teacher_temp": 0.02, "warmup_teacher_temp": 0.02, "batch_size": 32,
        "epochs": 40, "dump_path": "runs/dino_digits",
    },
}  # fmt: skip
NUM_GLOBAL = 2  # crops that the teacher sees
HEALTH = "teacher H {teacher_entropy:.2f} of {ceiling:.2f}, KL to uniform {kl_to_uniform:.2f}, "
HEALTH += "center {center_norm:.2f}, {prototypes_used:.0f} of {k} in use, std {embedding_std:.2f}, "
HEALTH += "rank {rankme:.0f}"


# ============ dino loss ============
def centre_and_sharpen(output, center, temperature):
    """softmax((g_t(x) - c) / temperature): (N, K) -> (N, K)."""
    p = (output - center).div_(temperature)  # float32, as the center
    return torch.softmax(p, 1, out=p)


def equal_shares(output, center, temperature, iterations):
    """Sinkhorn-Knopp over all processes: every output is as likely as any other."""
    return sinkhorn(output, temperature, iterations)


TEACHER_OUTPUTS = {
    "centering": centre_and_sharpen,
    "sinkhorn": partial(equal_shares, iterations=3),
    "batch_softmax": partial(equal_shares, iterations=1),  # and rows to 1, section 4.2.2
}


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's global crops and all other crops of the student (Eq. 5.3).

    out_dim: K. nmb_crops: number of crops, or a list of the numbers for each resolution; the first
    two are global. The teacher's temperature rises linearly from warmup_teacher_temp to teacher_temp
    during warmup_teacher_temp_epochs. teacher_output: an operation of TEACHER_OUTPUTS.
    The buffer `center` (1, K) is the same on all processes. Raises ValueError.
    """

    def __init__(
        self, out_dim: int, nmb_crops: int | list[int], warmup_teacher_temp: float,
        teacher_temp: float, warmup_teacher_temp_epochs: int, epochs: int, student_temp: float = 0.1,
        center_momentum: float = 0.9, teacher_output: str = "centering",
    ):  # fmt: skip
        super().__init__()
        num_warmup = warmup_teacher_temp_epochs
        if num_warmup > epochs:
            raise ValueError(f"--warmup_teacher_temp_epochs {num_warmup} exceeds --epochs {epochs}")
        self.num_crops = nmb_crops if isinstance(nmb_crops, int) else sum(nmb_crops)
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.normalise = TEACHER_OUTPUTS[teacher_output]
        self.register_buffer("center", torch.zeros(1, out_dim))
        rise = (teacher_temp - warmup_teacher_temp) / max(1, num_warmup - 1)
        temps = [warmup_teacher_temp + rise * epoch for epoch in range(num_warmup)]
        self.teacher_temps = temps + [teacher_temp] * (epochs - num_warmup)  # one an epoch

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """The loss, a scalar; then the center moves.

        student_output: (V * B, K) of all V crops, crop-major, carries gradient. teacher_output:
        (2 * B, K) of the global crops, a constant. Mean over images and over the 2 (V - 1) pairs of
        a global crop and another crop of - sum_k P_t^(k) log P_s^(k), in float32.
        """
        views = student_output.view(self.num_crops, -1, student_output.shape[-1])  # (V, B, K)
        p = self.probabilities(teacher_output, epoch).chunk(NUM_GLOBAL)  # 2 of (B, K)
        num_pairs = NUM_GLOBAL * (self.num_crops - 1)
        loss = swapped_cross_entropy(views, p, range(NUM_GLOBAL), self.student_temp, 1 / num_pairs)
        self.update_center(teacher_output)
        return loss

    @torch.no_grad()
    def probabilities(self, teacher_output: Tensor, epoch: int) -> Tensor:
        """P_t, the targets: (2 * B, K) -> (2 * B, K) float32."""
        return self.normalise(teacher_output, self.center, self.teacher_temps[epoch])

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """c <- m c + (1 - m) mean of the teacher's output over the batch of all processes (Eq. 5.4)."""
        total = teacher_output.sum(0, keepdim=True, dtype=torch.float32)  # (1, K)
        total = dist.all_reduce_sum(total)
        mean = total / (len(teacher_output) * dist.world_size())
        self.center.lerp_(mean, 1 - self.center_momentum)


@torch.no_grad()
def update_teacher(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    """theta_t <- momentum theta_t + (1 - momentum) theta_s, in place, parameters in the same order."""
    torch._foreach_lerp_(teacher, student, 1 - momentum)


# ============ one epoch ============
def train_one_epoch(run, teacher, criterion, loader, schedules, epoch, start, args):
    """One pass over the loader, from iteration `start`; returns the iterations of the epoch done."""
    device = run.process.device
    students, teachers = list(run.module.parameters()), list(teacher.parameters())
    last_layer, stopwatch = list(run.module.head.last_layer.parameters()), Stopwatch()
    run.network.train()
    for it, (batch, _) in enumerate(stopwatch.watch(loader), start):
        iteration = epoch * run.iters_per_epoch + it
        lr, weight_decay, momentum = (float(schedule[iteration]) for schedule in schedules)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.param_groups[0]["weight_decay"] = weight_decay  # biases and norms have none

        # ============ multi-crop forward ============
        draws = setup.generator(args.seed, epoch, it, run.process.rank)
        torch.manual_seed(draws.initial_seed())  # stochastic depth
        crops = run.augment([crop.to(device, non_blocking=True) for crop in batch], draws)
        with dist.autocast(device, run.precision):
            with torch.no_grad():
                features = teacher.forward_backbone(torch.cat(crops[:NUM_GLOBAL]))  # (2 * B, D)
                teacher_output = teacher.head(features)  # (2 * B, K)
            student_output = run.network(crops)  # (V * B, K)

        # ============ dino loss ============
        done = it + 1
        logged = done % args.log_freq == 0 or done == run.iters_per_epoch or iteration == 0
        targets = criterion.probabilities(teacher_output, epoch) if logged else None
        loss = criterion(student_output, teacher_output, epoch)  # moves the center

        # ============ backward and optim step ============
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        norms = clip_gradients(students, args.clip_grad)
        for parameter in last_layer if epoch < args.freeze_last_layer else ():
            parameter.grad = None
        run.last = (loss.detach(), torch.linalg.vector_norm(norms))
        run.scaler.step(run.optimizer)
        run.scaler.update()
        update_teacher(teachers, students, momentum)

        # ============ log, save, stop ============
        run.picture_crops(crops)
        if logged:
            rates = stopwatch.rates(run.global_batch, len(schedules[0]) - iteration - 1)
            log_progress(run, epoch, iteration, targets, features, criterion.center, rates)
        if done < run.iters_per_epoch and run.must_stop(done):
            run.save(epoch, done)
            return done
        if args.checkpoint_iters and done % args.checkpoint_iters == 0 < run.iters_per_epoch - done:
            run.save(epoch, done)
    return run.iters_per_epoch


def log_progress(run, epoch, iteration, probabilities, features, center, rates):
    """Write a log line with the health of the teacher: its output (N, K) and its features (N, D)."""
    num_outputs, features = probabilities.shape[1], nn.functional.normalize(features.float(), dim=1)
    entropy = run.mean_over_processes(metrics.code_entropy(probabilities))
    health = {
        "teacher_entropy": entropy,
        "student_kl": run.mean_over_processes(run.last[0]) - entropy,
        "kl_to_uniform": metrics.kl_to_uniform(probabilities).item(),
        "center_norm": center.norm().item(),
        "prototypes_used": metrics.prototype_usage(probabilities).item(),
        "embedding_std": run.mean_over_processes(metrics.embedding_std(features)),
        "rankme": metrics.rankme(features).item(),
    }
    text = HEALTH.format(**health, ceiling=math.log(num_outputs), k=num_outputs)
    line = run.report(epoch, iteration, rates, health, text)
    run.diagnose(line, lambda lines: diagnosis.diagnose_teacher(lines, num_outputs))


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    args = flags.parse_args(get_parser(), PRESETS, argv)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    flags.check_runtime(args, launch.world_size)
    dataset = open_dataset(args.data_path, in_chans=args.in_chans)
    global_batch = args.batch_size * launch.world_size
    args.mean, args.std = args.mean or dataset.mean, args.std or usual_std(dataset.std)
    flags.check_batch(args, global_batch, len(dataset))
    resolutions = check_args(args)
    num_crops = NUM_GLOBAL + args.local_crops_number
    augment = Augment(**image_flags.augment_options(args, dataset, num_crops))
    criterion = DINOLoss(
        *(args.out_dim, num_crops, args.warmup_teacher_temp, args.teacher_temp),
        *(args.warmup_teacher_temp_epochs, args.epochs, args.student_temp, args.center_momentum),
        args.teacher_output,
    )
    torch.manual_seed(args.seed)  # every process starts from the same network
    student, teacher = (build_network(args, rate) for rate in (args.drop_path_rate, 0.0))
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    setup.start_teacher(student, teacher, args.init_from)

    process = dist.init(args.device)
    precision = dist.resolve_precision(args.precision, process.device)

    # ============ data ============
    loading = (args.batch_size, args.workers, args.seed, args.interpolation)
    crops, sampler, loader = setup.multicrop_loading(dataset, resolutions, process, *loading)

    # ============ model and optimizer ============
    placing = (process, args.sync_bn, args.syncbn_process_group_size, args.compile)
    teacher = setup.place_network(teacher, *placing)
    student, network = setup.wrap_network(student, *placing)
    optimizer = setup.build_optimizer(args.optimizer, parameter_groups(student), args.weight_decay)
    run = Run(
        *(args, process, precision, student, network, augment, optimizer),
        *(len(dataset), global_batch, {"dino_loss": criterion.to(process.device)}),
        saved={"student": student, "teacher": teacher},
        method="dino",
    )
    peak = args.lr * flags.lr_factor(args, global_batch)
    times = (args.epochs, run.iters_per_epoch)
    schedules = (
        cosine_schedule(peak, args.min_lr, *times, args.warmup_epochs),
        cosine_schedule(args.weight_decay, args.weight_decay_end, *times),
        cosine_schedule(args.momentum_teacher, args.momentum_teacher_end, *times),
    )
    setup.log_plan(run, crops, peak)
    log_teacher(args)
    first_epoch, start = run.resume()
    if process.rank == 0:  # not before: a run that may not go on leaves the folder as it was
        describe_run(vars(args), args.dump_path)

    # ============ epochs ============
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch, start)
        done = train_one_epoch(run, teacher, criterion, loader, schedules, epoch, start, args)
        if run.stopping:
            return run.stopped()
        last, start = epoch + 1 == args.epochs, 0
        run.save(epoch, done, keep=last or (epoch + 1) % args.checkpoint_freq == 0)
        if args.knn_freq and (last or (epoch + 1) % args.knn_freq == 0):
            run.probe(teacher, dataset, epoch, args.global_crops_size, args.workers)
        run.plot(args.out_dim)
        if not last and run.must_stop(done):
            return run.stopped()
    return run.finished()


def build_network(args, drop_path_rate):
    """Backbone and head; student and teacher differ in stochastic depth alone."""
    options = {**flags.backbone_options(args), **flags.vit_options(args, args.global_crops_size)}
    backbone = build_backbone(args.arch, drop_path_rate=drop_path_rate, **options)
    head = DINOHead(
        *(backbone.num_features, args.out_dim, args.use_bn_in_head, args.norm_last_layer),
        *(args.head_layers, args.hidden_dim, args.bottleneck_dim, args.l2_bottleneck),
    )
    return MultiCropWrapper(backbone, head)


def log_teacher(args):
    """Say what the teacher will be."""
    text = (
        "teacher     momentum {momentum_teacher:g} to {momentum_teacher_end:g}, {teacher_output}, "
    )
    text += "temperature {warmup_teacher_temp:g} to {teacher_temp:g} in "
    text += "{warmup_teacher_temp_epochs} epochs; K = {out_dim:,}, ln(K) = {0:.3f} is the loss of "
    text += "uniform outputs"
    logger.info(text.format(math.log(args.out_dim), **vars(args)))


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive, probability = flags.at_least_zero, flags.positive, flags.probability

    add = parser.add_argument_group("method (symbols of the thesis)").add_argument
    add("--out_dim", type=positive(int), default=65536, help="K, outputs of the head")
    add("--student_temp", type=positive(float), default=0.1, help="tau_s of Eq. 5.1")
    add("--teacher_temp", type=positive(float), default=0.04, help="tau_t after its warm-up")
    add("--warmup_teacher_temp", type=positive(float), default=0.04, help="tau_t at the start")
    add("--warmup_teacher_temp_epochs", type=at_least_zero(int), default=0,
        help="epochs in which tau_t rises from --warmup_teacher_temp to --teacher_temp")
    add("--momentum_teacher", type=probability, default=0.996,
        help="lambda of the teacher at the start; higher, 0.9995, for batches of 256")
    add("--momentum_teacher_end", type=probability, default=1.0,
        help="lambda at the end; 0 for both is a teacher that copies the student (section 5.6.2)")
    add("--center_momentum", type=probability, default=0.9, help="m of Eq. 5.4; 1: no centring")
    add("--teacher_output", default="centering", choices=[*TEACHER_OUTPUTS],
        help="what keeps the teacher's output from collapsing (Table 5.10)")

    add = flags.add_vit_args(parser)
    add("--drop_path_rate", type=probability, default=0.1, help="stochastic depth of the student")
    add = flags.add_backbone_args(parser, "vit_small")
    add("--norm_last_layer", type=flags.boolean, default=True,
        help="keep the norms of the last layer's rows at 1; false is better for vit_small, and less stable")
    add("--use_bn_in_head", type=flags.boolean, default=False, help="batch norm in the head (5.6.6)")
    add("--head_layers", type=positive(int), default=3, help="linear layers of the head's MLP")
    add("--hidden_dim", type=positive(int), default=2048, help="hidden units of the head's MLP")
    add("--bottleneck_dim", type=positive(int), default=256, help="units before the last layer")
    add("--l2_bottleneck", action=argparse.BooleanOptionalAction, default=True,
        help="normalise them; without, the MLP ends in the K outputs (section 5.6.6)")

    add = image_flags.add_data_args(parser, PRESETS)
    add("--global_crops_size", type=positive(int), default=224, help="side of the 2 global crops, px")
    add("--global_crops_scale", type=float, nargs="+", default=(0.4, 1.0),
        help="smallest and largest share of the image's area in a global crop")
    add("--local_crops_number", type=at_least_zero(int), default=8, help="local crops of an image")
    add("--local_crops_size", type=positive(int), default=96, help="side of the local crops, px")
    add("--local_crops_scale", type=float, nargs="+", default=(0.05, 0.4), help="likewise")
    image_flags.add_augment_args(parser)

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=100, help="passes over the data")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=64, help="B, per process")
    add("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"], help="of the student")
    add("--lr", type=positive(float), default=0.0005,
        help="learning rate after the warm-up, for --lr_reference_batch images")
    add("--min_lr", type=at_least_zero(float), default=1e-6, help="at the end, not scaled")
    add("--warmup_epochs", type=at_least_zero(int), default=10, help="epochs of linear warm-up from 0")
    add("--weight_decay", type=at_least_zero(float), default=0.04, help="at the start")
    add("--weight_decay_end", type=at_least_zero(float), default=0.4, help="at the end, by a cosine")
    add("--clip_grad", type=at_least_zero(float), default=3.0, help="largest norm of a gradient; 0: any")
    add("--freeze_last_layer", type=at_least_zero(int), default=1,
        help="epochs at the start during which the last layer is not updated")

    flags.add_training_args(parser)
    flags.add_runtime_args(parser)
    parser.set_defaults(  # published for this method: BYOL's transformations, the linear scaling rule
        color_jitter=[0.4, 0.4, 0.2, 0.1], blur=[1.0, 0.1, 0.5], solarize=[0.0, 0.2, 0.0],
        interpolation="bicubic", lr_scaling="linear", lr_reference_batch=256, checkpoint_freq=20,
        syncbn_process_group_size=0, seed=0,
    )
    return parser
    # fmt: on


def check_args(args) -> list[list]:
    """Raise ValueError on arguments that do not fit together; returns the lists of MultiCropDataset."""
    for name in ("global_crops_scale", "local_crops_scale"):
        values = list(getattr(args, name))
        if len(values) != 2 or not 0 < values[0] <= values[1] <= 1:
            raise ValueError(f"--{name} {values}: need two shares of the image, such as 0.4 1")
    numbers = [NUM_GLOBAL, args.local_crops_number]
    sizes = [args.global_crops_size, args.local_crops_size]
    scales = zip(args.global_crops_scale, args.local_crops_scale, strict=True)  # smallest, largest
    used = 2 if args.local_crops_number else 1
    return [list(values[:used]) for values in (numbers, sizes, *scales)]


if __name__ == "__main__":
    flags.run(main)
