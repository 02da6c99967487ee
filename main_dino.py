"""DINO: a student learns the output of its own momentum teacher, from several crops of an image.

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised
Vision Transformers, ICCV 2021, arXiv:2104.14294; equations as in chapter 5 of Caron's thesis.
  Eq. 5.1-5.3    local-to-global cross-entropy, sharpening   DINOLoss.forward
  Eq. 5.4        centring                                    DINOLoss.update_center
  section 5.3.1  momentum teacher                            update_teacher
  section 5.3.1  head with a weight-normalised last layer    src/nets/dino_head.py
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

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import logging
import math
from functools import partial

import torch
from torch import Tensor, nn

from src import dist
from src.cluster.sinkhorn import sinkhorn
from src.data.augment import Augment
from src.data.datasets import EpochSampler, usual_std
from src.data.multicrop import MultiCropDataset, multicrop_loader
from src.losses import swapped_cross_entropy
from src.nets.backbones import build_backbone
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.optim import build_optimizer, clip_gradients, cosine_schedule, parameter_groups
from src.run import checkpoint, flags, health, image_flags
from src.run.log import setup_logging
from src.run.run import Run, average_gradients, log_plan, place_network

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {
    "patch_size": 4, "out_dim": 1024, "hidden_dim": 512, "bottleneck_dim": 128, "use_bn_in_head": True,
    "optimizer": "adamw", "weight_decay_end": 0.04, "warmup_epochs": 4, "momentum_teacher": 0.99,
    "drop_path_rate": 0.0, "local_crops_number": 2, "width": 1.0,
}  # fmt: skip


def photos(situation):
    """Defaults for photographs, beside those of src/run/presets.py; less epochs where a step takes longer."""
    epochs = situation.epochs()
    if situation.has_small_network():
        epochs = max(5, 2 * epochs // 5)
    return {
        "epochs": epochs,
        "arch": "vit_small" if situation.on_gpu else "vit_micro",
        "width": 1.0,
        "patch_size": 16 if situation.on_gpu else 8,
        "out_dim": max(256, situation.clusters()),
        "hidden_dim": 512,
        "bottleneck_dim": 128,
        "use_bn_in_head": True,
        "optimizer": "adamw",
        "lr": 0.001,
        "weight_decay_end": 0.04,
        "warmup_epochs": max(1, epochs // 10),
        "momentum_teacher": 0.99,
        "drop_path_rate": 0.0,
        "global_crops_size": situation.crop_sides()[0],
        "local_crops_size": situation.crop_sides()[1],
        "local_crops_number": 4,
    }


PRESETS = {
    "imagenet": {},
    "photos": photos,
    "cifar": {
        **SMALL, "arch": "vit_tiny", "lr": 0.002, "global_crops_size": 32, "local_crops_size": 16,
        "global_crops_scale": [0.3, 1.0], "local_crops_scale": [0.1, 0.4],
    },
    "tiny": {
        **SMALL, "arch": "vit_micro", "lr": 0.016, "global_crops_size": 16, "local_crops_size": 8,
        "global_crops_scale": [0.6, 1.0], "local_crops_scale": [0.3, 0.6], "solarize": [0.0],
        "out_dim": 256, "teacher_temp": 0.02, "warmup_teacher_temp": 0.02, "batch_size": 32,
        "epochs": 40,
    },
}  # fmt: skip
NUM_GLOBAL = 2  # crops that the teacher sees


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
    """One pass over the loader, from iteration `start` of the epoch on."""
    student_parameters, teacher_parameters = (
        list(run.module.parameters()),
        list(teacher.parameters()),
    )
    for iteration, crops, _ in run.iterate(loader, epoch, start):
        for group in run.optimizer.param_groups:
            group["lr"] = float(schedules["lr"][iteration])
        # Biases and norms, the second group, are not decayed.
        run.optimizer.param_groups[0]["weight_decay"] = float(schedules["weight_decay"][iteration])

        # ============ multi-crop forward ============
        with run.autocast():
            with torch.no_grad():
                features = teacher.forward_backbone(torch.cat(crops[:NUM_GLOBAL]))  # (2 * B, D)
                teacher_output = teacher.head(features)  # (2 * B, K)
            student_output = run.network(crops)  # (V * B, K)

        # ============ dino loss ============
        if run.is_log_step():
            targets = criterion.probabilities(teacher_output, epoch)  # before the center moves
        loss = criterion(student_output, teacher_output, epoch)  # moves the center

        # ============ backward and optim step ============
        run.backward(loss)
        norms = clip_gradients(student_parameters, args.clip_grad)
        if epoch < args.freeze_last_layer:
            for parameter in run.module.head.last_layer.parameters():
                parameter.grad = None
        if run.step(gradient_norm=torch.linalg.vector_norm(norms)):
            momentum = float(schedules["momentum"][iteration])
            update_teacher(teacher_parameters, student_parameters, momentum)

        # ============ log, save, stop ============
        if run.is_log_step():
            log_progress(run, targets, features, criterion.center, teacher.head.last_layer)
        if run.save_or_stop():
            return


def log_progress(run, probabilities, features, center, last_layer):
    """Write a log line with the health of the teacher: its output (N, K), features (N, D), prototypes."""
    num_outputs, features = probabilities.shape[1], nn.functional.normalize(features.float(), dim=1)
    values = run.read(
        means={
            "teacher_entropy": health.code_entropy(probabilities),
            "embedding_std": health.embedding_std(features),
        },
        own={
            "kl_to_uniform": kl_to_uniform(probabilities),
            "center_norm": center.norm(),
            "prototypes_used": health.prototype_usage(probabilities),
            "rankme": health.rankme(features),
        },
    )
    values["student_kl"] = values["loss"] - values["teacher_entropy"]
    text = (
        f"teacher H {values['teacher_entropy']:.2f} of {math.log(num_outputs):.2f}, "
        f"KL to uniform {values['kl_to_uniform']:.2f}, center {values['center_norm']:.2f}, "
        f"{values['prototypes_used']:.0f} of {num_outputs} in use, "
        f"std {values['embedding_std']:.2f}, rank {values['rankme']:.0f}"
    )
    prototypes = last_layer.weight_v if run.arguments["l2_bottleneck"] else last_layer.weight
    unique, unique_text = run.count_unique([prototypes], "--out_dim")
    line = run.report(values | unique, text + unique_text)
    run.diagnose(line, lambda lines: diagnose(lines, num_outputs))


@torch.no_grad()
def kl_to_uniform(probabilities: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats from the mean of (B, K) probabilities over all processes to 1 / K.

    0 when all outputs are equally likely over the batch, ln(K) when one of them takes all.
    """
    mean = health.in_float64(probabilities.mean(0, dtype=torch.float32))  # (K,)
    mean = dist.all_reduce_sum(mean) / dist.world_size()
    return (math.log(len(mean)) - health.entropy(mean)).clamp(min=0)


def diagnose(history: list[dict], num_outputs: int) -> health.Trouble | None:
    """What is wrong with a run of self-distillation, in one sentence that names the flags that help, or None.

    history: log lines with `teacher_entropy`, `student_kl`, `kl_to_uniform` (nats),
    `prototypes_used` and `embedding_std`. Collapse has two forms (section 5.6.3 of the thesis):
    uniform outputs, or one output that takes all; in both the student's KL to the teacher vanishes.
    """
    recent = history[-health.NUM_LINES :]
    if len(recent) < health.NUM_LINES or num_outputs < 2:
        return None
    ceiling, last = math.log(num_outputs), recent[-1]
    if all(line["teacher_entropy"] > 0.99 * ceiling for line in recent):
        return health.Trouble(
            "uniform",
            f"collapse: the teacher's output is uniform (entropy {last['teacher_entropy']:.2f} of at "
            f"most {ceiling:.2f}); lower --teacher_temp or --warmup_teacher_temp (0.02), or lower --lr",
        )
    if all(
        line["kl_to_uniform"] > 0.9 * ceiling or line["prototypes_used"] < 1.5 for line in recent
    ):
        return health.Trouble(
            "one output",
            f"collapse: one output takes all images (KL to uniform {last['kl_to_uniform']:.2f} of at "
            f"most {ceiling:.2f}, {last['prototypes_used']:.1f} outputs in use); let the center follow "
            "faster (--center_momentum 0.9), use a teacher with momentum (--momentum_teacher 0.996), "
            "or raise --teacher_temp",
        )
    if all(line["student_kl"] < 1e-3 * ceiling for line in recent):
        return health.Trouble(
            "student",
            f"collapse: student and teacher give all crops the same output (KL {last['student_kl']:.4f}"
            "); use a teacher with momentum (--momentum_teacher 0.996 --momentum_teacher_end 1), "
            "lower --teacher_temp, or lower --lr",
        )
    if all(line["embedding_std"] < 0.05 for line in recent):
        return health.Trouble(
            "embeddings",
            "collapse: all images have the same features (standard deviation "
            f"{last['embedding_std']:.3f}); lower --lr, lower --teacher_temp, or use a teacher with "
            "momentum (--momentum_teacher 0.996 --momentum_teacher_end 1)",
        )
    return None


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    args, dataset = image_flags.parse_args(
        get_parser(), PRESETS, argv, method="dino", world_size=launch.world_size
    )
    flags.check_runtime(args, launch.world_size)
    global_batch = args.batch_size * launch.world_size
    args.mean, args.std = args.mean or dataset.mean, args.std or usual_std(dataset.std)
    flags.check_batch(args, global_batch, len(dataset))
    check_args(args)
    num_crops = NUM_GLOBAL + args.local_crops_number
    augment = Augment(**image_flags.augment_options(args, dataset, num_crops))
    criterion = DINOLoss(
        out_dim=args.out_dim,
        nmb_crops=num_crops,
        warmup_teacher_temp=args.warmup_teacher_temp,
        teacher_temp=args.teacher_temp,
        warmup_teacher_temp_epochs=args.warmup_teacher_temp_epochs,
        epochs=args.epochs,
        student_temp=args.student_temp,
        center_momentum=args.center_momentum,
        teacher_output=args.teacher_output,
    )
    torch.manual_seed(args.seed)  # every process starts from the same network
    student = build_network(args, drop_path_rate=args.drop_path_rate)
    teacher = build_network(args, drop_path_rate=0.0)
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    start_teacher(student, teacher, args.init_from)

    process = dist.init(args.device, args.dist_timeout)

    # ============ data ============
    crops = MultiCropDataset(dataset, **crop_options(args))
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
    teacher = place_network(teacher, process, **flags.placement_options(args))
    student = place_network(student, process, **flags.placement_options(args))
    optimizer = build_optimizer(args.optimizer, parameter_groups(student), args.weight_decay)
    run = Run(
        args,
        process,
        method="dino",
        module=student,
        network=average_gradients(student, process),
        augment=augment,
        optimizer=optimizer,
        dataset=dataset,
        global_batch=global_batch,
        image_size=args.global_crops_size,
        num_prototypes=args.out_dim,
        evaluated=probed_networks(args.probe_networks, student, teacher),
        method_state={"dino_loss": criterion.to(process.device)},
        saved={"student": student, "teacher": teacher},
    )
    peak_lr = args.lr * flags.lr_factor(args, global_batch)
    length = {"epochs": args.epochs, "iters_per_epoch": run.iters_per_epoch}
    schedules = {
        "lr": cosine_schedule(peak_lr, args.min_lr, **length, warmup_epochs=args.warmup_epochs),
        "weight_decay": cosine_schedule(args.weight_decay, args.weight_decay_end, **length),
        "momentum": cosine_schedule(args.momentum_teacher, args.momentum_teacher_end, **length),
    }
    log_plan(run, crops, peak_lr=peak_lr)
    log_teacher(args)
    first_epoch, start = run.resume()
    run.begin()

    # ============ epochs ============
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch, start)
        train_one_epoch(run, teacher, criterion, loader, schedules, epoch, start, args)
        start = 0
        if run.end_epoch(epoch):
            break
    return run.leave()


def build_network(args, drop_path_rate):
    """Backbone and head; student and teacher differ in stochastic depth alone."""
    backbone = build_backbone(
        args.arch,
        drop_path_rate=drop_path_rate,
        **flags.backbone_options(args),
        **flags.vit_options(args, args.global_crops_size),
    )
    head = DINOHead(
        backbone.num_features,
        args.out_dim,
        use_bn=args.use_bn_in_head,
        norm_last_layer=args.norm_last_layer,
        nlayers=args.head_layers,
        hidden_dim=args.hidden_dim,
        bottleneck_dim=args.bottleneck_dim,
        l2_bottleneck=args.l2_bottleneck,
    )
    return MultiCropWrapper(backbone, head)


def start_teacher(student, teacher, init_from):
    """Give both networks the weights of a file, if any; else the teacher starts as the student.

    A file with the sections "student" and "teacher" fills both; the head may be missing. Raises as
    src.nets.weights.load_weights. The teacher is not trained by gradients.
    """
    sections = []
    if init_from:
        from src.nets import weights

        sections = weights.sections(init_from)
        key = "student" if "student" in sections else None
        weights.load_weights(student, init_from, key, allow_missing=("head.",))
    teacher.load_state_dict(student.state_dict())
    if "teacher" in sections:
        weights.load_weights(teacher, init_from, "teacher", allow_missing=("head.",))
    teacher.requires_grad_(False)


def probed_networks(names, student, teacher):
    """What k-NN evaluates, by name: the teacher, without one, where --probe_networks says nothing."""
    if names is None:
        return {"": teacher}
    networks = {"teacher": teacher, "student": student}  # of the first is what the log calls knn
    return {name: network for name, network in networks.items() if name in names}


def crop_options(args):
    """The arguments of MultiCropDataset, with the crops as DINO's flags say them."""
    numbers = [NUM_GLOBAL, args.local_crops_number]
    sizes = [args.global_crops_size, args.local_crops_size]
    smallest, largest = zip(args.global_crops_scale, args.local_crops_scale, strict=True)
    used = 2 if args.local_crops_number else 1
    return {
        "num_crops": numbers[:used],
        "size_crops": sizes[:used],
        "min_scale_crops": list(smallest[:used]),
        "max_scale_crops": list(largest[:used]),
        "seed": args.seed,
        "interpolation": args.interpolation,
        "reduced_decoding": args.reduced_decoding,
    }


def log_teacher(args):
    """Say what the teacher will be."""
    logger.info(
        f"teacher     momentum {args.momentum_teacher:g} to {args.momentum_teacher_end:g}, "
        f"{args.teacher_output}, temperature {args.warmup_teacher_temp:g} to {args.teacher_temp:g} in "
        f"{args.warmup_teacher_temp_epochs} epochs; K = {args.out_dim:,}, "
        f"ln(K) = {math.log(args.out_dim):.3f} is the loss of uniform outputs"
    )


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

    add = flags.add_training_args(parser)
    add("--probe_networks", nargs="+", choices=["student", "teacher"], default=None,
        help="networks that --knn_freq evaluates, by name in the log and on the curves (Figure 5.7); "
        "default: the teacher")
    flags.add_runtime_args(parser)
    parser.set_defaults(  # published for this method: BYOL's transformations, the linear scaling rule
        color_jitter=[0.4, 0.4, 0.2, 0.1], blur=[1.0, 0.1, 0.5], solarize=[0.0, 0.2, 0.0],
        interpolation="bicubic", lr_scaling="linear", lr_reference_batch=256, checkpoint_freq=20,
        syncbn_process_group_size=0, seed=0,
    )
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    if args.probe_networks and not args.knn_freq:
        raise ValueError(
            "--probe_networks needs --knn_freq: give the epochs between two evaluations, such as 1"
        )
    for name in ("global_crops_scale", "local_crops_scale"):
        values = list(getattr(args, name))
        if len(values) != 2 or not 0 < values[0] <= values[1] <= 1:
            raise ValueError(f"--{name} {values}: need two shares of the image, such as 0.4 1")


if __name__ == "__main__":
    flags.run(main)
