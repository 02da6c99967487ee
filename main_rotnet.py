"""RotNet: turn every image by 0, 90, 180 and 270 degrees, train the network to say by how much.

Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations, ICLR
2018, arXiv:1803.07728; Caron's thesis, section 2.2.3. DeeperCluster starts from such a network.
  Eq. 2           classification of rotations         rotation_loss
  section 3.2     four rotations of each image        rotations
  section 3.1     learning rate in steps              step_lr of src/optim.py
  thesis, 3.3.1   networks, Sobel filters             src/nets/convnets.py, src/nets/sobel.py

  python main_rotnet.py                                           digits, a minute on two cores
  python main_rotnet.py --data_path cifar10
  torchrun --nproc_per_node 8 main_rotnet.py --data_path /imagenet/train --batch_size 24
  sbatch scripts/rotnet_vgg16_pretrain.sh                         the initialisation of DeeperCluster
Starting the same command again continues where it stopped.

Deviations: no Nesterov momentum, which the authors' code has; their released configurations train
longer than the paper (50 epochs, steps after 15, 30 and 45); crops on CIFAR are random resized ones
(theirs: the image, padded by 4 px) and the network is a ResNet (theirs: network in network); dropout
in alexnet and vgg16, as in DeepCluster, unless --dropout 0.
Kept: the four rotations of an image are in one batch, so that B images an iteration make 4 B crops;
the learning rate is multiplied by --gamma after each of --decay_epochs.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from src import dist
from src.data.augment import Augment
from src.data.datasets import EpochSampler, usual_std
from src.data.multicrop import MultiCropDataset, multicrop_loader
from src.labels.pseudo_labels import report_predictions
from src.nets.convnets import build_convnet
from src.optim import build_optimizer, step_lr
from src.run import checkpoint, convnet_flags, flags, image_flags
from src.run.log import setup_logging
from src.run.run import Run, average_gradients, log_plan, place_network

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {**convnet_flags.SMALL, "batch_size": 128, "lr": 0.1, "gamma": 0.2}
CIFAR = {"decay_epochs": [30, 60, 80]}
DIGITS = {"decay_epochs": [], "epochs": 30, "knn_freq": 10}


def photos(situation):
    """Defaults for photographs, beside those of src/run/presets.py."""
    return {
        **convnet_flags.PHOTOS,
        "lr": 0.05,
        "gamma": 0.1,
        "decay_epochs": convnet_flags.steps_of(situation.epochs()),
    }


PRESETS = {
    "imagenet": {},
    "photos": photos,
    "cifar": {**SMALL, **CIFAR},
    "tiny": {**SMALL, **DIGITS, "color_jitter": [0.4, 0.4, 0.0, 0.0], "jitter_prob": 0.8},
}
NUM_ROTATIONS = 4  # by 0, 90, 180 and 270 degrees


# ============ rotation loss ============
def rotations(crops: list[Tensor]) -> list[Tensor]:
    """Every crop by 0, 90, 180 and 270 degrees, counter-clockwise (section 3.2).

    crops: V tensors (B, C, S_v, S_v). Returns 4 V of them: the four rotations of the first crop,
    then those of the second. Pixels move and are not interpolated.
    """
    return [torch.rot90(crop, k, (2, 3)) for crop in crops for k in range(NUM_ROTATIONS)]


def rotation_labels(num_images: int, device: torch.device | str = "cpu") -> Tensor:
    """The rotation of each row that `rotations` makes of one crop of B images: (4 B,)."""
    return torch.arange(NUM_ROTATIONS, device=device).repeat_interleave(num_images)


def rotation_loss(scores: Tensor, num_images: int) -> Tensor:
    """Cross-entropy of the rotation of every crop (Eq. 2).

    scores: (V * 4 * B, 4), in the order of `rotations`, carries gradient. num_images: B. Returns the
    mean over crops, rotations and images.
    """
    labels = rotation_labels(num_images, scores.device)  # (4 B,)
    return F.cross_entropy(scores.float(), labels.repeat(len(scores) // len(labels)))


# ============ one epoch ============
def train_one_epoch(run, loader, epoch, start):
    """One pass over the loader, from iteration `start` of the epoch on."""
    for _, crops, indices in run.iterate(loader, epoch, start, picture_crops=False):
        crops = rotations(crops)
        run.picture_crops(crops)

        # ============ multi-crop forward ============
        with run.autocast():
            features, scores = run.network(crops)  # (V * 4 * B, F), (V * 4 * B, 4)

        # ============ rotation loss ============
        loss = rotation_loss(scores, len(indices))

        # ============ backward and optim step ============
        run.backward(loss)
        run.step()

        # ============ log, save, stop ============
        if run.is_log_step():
            report_predictions(
                run,
                logits=scores,
                labels=rotation_labels(len(indices), scores.device),
                embedding=features,
                lr="--lr",
                clusters=None,
            )
        if run.save_or_stop():
            return


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    args, dataset = image_flags.parse_args(
        get_parser(), PRESETS, argv, method="rotnet", world_size=launch.world_size
    )
    image_flags.fill_in_crops(args)
    flags.check_runtime(args, launch.world_size)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, len(dataset))
    args.mean, args.std = args.mean or dataset.mean, args.std or usual_std(dataset.std)
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    torch.manual_seed(args.seed)  # every process starts from the same network
    model = build_convnet(args.arch, NUM_ROTATIONS, **convnet_flags.convnet_options(args))
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.init_from:
        from src.nets.weights import load_weights

        load_weights(model, args.init_from, allow_missing=("top_layer",))

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
    groups = [{"params": trained, "momentum": args.momentum}]
    optimizer = build_optimizer("sgd", groups, args.wd)
    run = Run(
        args,
        process,
        method="rotnet",
        module=model,
        network=average_gradients(model, process),
        augment=augment,
        optimizer=optimizer,
        dataset=dataset,
        global_batch=global_batch,
        image_size=args.size_crops[0],
        num_prototypes=NUM_ROTATIONS,
    )
    lr = args.lr * flags.lr_factor(args, global_batch)
    log_plan(run, crops, peak_lr=lr)
    log_rotations(args)
    first_epoch, start = run.resume()
    run.begin()

    # ============ epochs ============
    for epoch in range(first_epoch, args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = step_lr(lr, epoch, decay_epochs=args.decay_epochs, gamma=args.gamma)
        sampler.set_epoch(epoch, start)
        train_one_epoch(run, loader, epoch, start)
        start = 0
        if run.end_epoch(epoch):
            break
    return run.leave()


def log_rotations(args):
    """Say what will be predicted."""
    logger.info(
        f"rotations   {NUM_ROTATIONS} of each crop in a batch; ln({NUM_ROTATIONS}) = "
        f"{math.log(NUM_ROTATIONS):.3f} is the loss of predicting nothing; "
        f"{convnet_flags.describe_steps(args)}"
    )


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = image_flags.add_data_args(parser, PRESETS)
    image_flags.add_crop_args(add)
    image_flags.add_augment_args(parser)
    convnet_flags.add_convnet_args(parser, "alexnet")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=30, help="passes over the data")
    add("--batch_size", type=positive(int), default=192,
        help="B, images per process, each in four rotations")
    convnet_flags.add_sgd_args(add, lr=0.01, wd=5e-4, decay_epochs=[10, 20], gamma=0.1)
    add("--momentum", type=at_least_zero(float), default=0.9, help="of SGD")

    flags.add_training_args(parser)
    flags.add_runtime_args(parser)
    parser.set_defaults(**convnet_flags.ONE_CROP, workers=4)
    return parser
    # fmt: on


if __name__ == "__main__":
    flags.run(main)
