"""SwAV by the package lightly, as bench/cifar_minutes.py runs it beside ours: its recipe for CIFAR-10.

lightly's own loss, prototypes, projection head and transformations, with the values of its benchmark on
CIFAR-10 (docs/source/getting_started/benchmarks/cifar10_benchmark.py there): two crops of 32 px, no blur,
512 prototypes, Adam with a learning rate of 0.001 for 128 images that falls along a cosine, epoch by epoch.
The network is the ResNet-18 with small stem that our methods train on a GPU, and the loop is that of its
examples.

    python -m bench.lightly_swav --data_path cifar10_folder --epochs 5 --dump_path runs/lightly

The folder is like that of a run of ours, as far as bench/cifar_minutes.py and eval_knn.py need it: args.json
when training begins, log.jsonl, and checkpoint.pth, after each epoch and on SIGTERM, from which the same
command goes on.
"""

import argparse
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from src.data.datasets import open_dataset
from src.nets.resnet import resnet18
from src.run import checkpoint

HIDDEN, DIM, NUM_PROTOTYPES = 512, 128, 512  # of the benchmark
MIN_SCALE = 0.14
RATE, RATE_BATCH, WEIGHT_DECAY = 1e-3, 128, 1e-6


class Crops(Dataset):
    """Crops of images by a transformation of lightly: [i] -> a list of float (3, S, S)."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.transform(to_pil_image(self.dataset.load(index)))


class SwAV(nn.Module):
    """Trunk, and lightly's head and prototypes: crops (B, 3, S, S) -> scores (B, K)."""

    def __init__(self, trunk):
        super().__init__()
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

        self.trunk = trunk
        self.projection_head = SwaVProjectionHead(trunk.num_features, HIDDEN, DIM)
        self.prototypes = SwaVPrototypes(DIM, NUM_PROTOTYPES)

    def forward(self, crops):
        embedding = self.projection_head(self.trunk.forward_backbone(crops))  # (B, D)
        return self.prototypes(F.normalize(embedding, dim=1))  # (B, K)


def batches(crops: Crops, epoch: int, start: int, args: argparse.Namespace) -> DataLoader:
    """The batches of an epoch from iteration `start` on; order and draws depend on (seed, epoch, start)."""
    torch.manual_seed(1_000_003 * args.seed + 1_009 * epoch + start)
    order = torch.randperm(
        len(crops), generator=torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    )
    whole = order[: len(crops) // args.batch_size * args.batch_size]  # the rest is left out
    indices = whole.split(args.batch_size)[start:]
    return DataLoader(
        crops,
        batch_sampler=[rows.tolist() for rows in indices],
        num_workers=args.workers,
        pin_memory=args.device != "cpu",
    )


def train(model, optimizer, criterion, crops, state, args) -> int:
    """Train from `state` (epoch, iteration of it) on; returns 0, or 128 + the signal that stopped it."""
    folder, stop = Path(args.dump_path), []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    per_epoch = len(crops) // args.batch_size
    first, start = state

    def save(epoch, done):
        networks = {"model": model.trunk.state_dict(), "swav": model.state_dict()}
        position = {"epoch": epoch, "done": done, "optimizer": optimizer.state_dict()}
        checkpoint.save_checkpoint(folder, {**networks, **position})

    (folder / "args.json").write_text(json.dumps(run_args(args), indent=2) + "\n")
    with open(folder / "log.jsonl", "a", buffering=1) as log:
        for epoch in range(first, args.epochs):
            for group in optimizer.param_groups:  # of torch's CosineAnnealingLR, stepped each epoch
                rate = RATE * args.batch_size / RATE_BATCH
                group["lr"] = rate * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
            logged, counted = time.perf_counter(), 0
            for done, views in enumerate(batches(crops, epoch, start, args), start + 1):
                model.prototypes.normalize()
                scores = [model(view.to(args.device)) for view in views]
                loss = criterion(scores, [])  # no crops of low resolution
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                counted += 1
                if done % args.log_freq == 0 or done == per_epoch or (epoch == 0 and done == 1):
                    value = loss.item()
                    seconds, logged = time.perf_counter() - logged, time.perf_counter()
                    line = {
                        "epoch": epoch,
                        "iteration": epoch * per_epoch + done - 1,
                        "loss": value,
                    }
                    line["epoch_float"] = epoch + done / per_epoch
                    line["images_per_second"] = counted * args.batch_size / seconds
                    log.write(json.dumps(line) + "\n")
                    counted = 0
                if stop and done < per_epoch:
                    save(epoch, done)
                    return 128 + stop[0]
            start = 0
            save(epoch + 1, 0)
            if stop and epoch + 1 < args.epochs:
                return 128 + stop[0]
    return 0


def run_args(args):
    """What eval_knn.py reads of a run: the network, and how its images were normalised."""
    from lightly.transforms.utils import IMAGENET_NORMALIZE

    network = {"arch": "resnet18", "stem": "small", "size_crops": [args.crop_size]}
    return {**vars(args), **network, **IMAGENET_NORMALIZE}


def main(argv: list[str] | None = None) -> int:
    """Train; returns 0, 2 where lightly is missing, or 128 + the signal."""
    args = parse_args(argv)
    try:
        from lightly.loss import SwaVLoss
        from lightly.transforms import SwaVTransform
    except ImportError as error:
        print(
            f"error: this needs the package lightly: pip install lightly ({error})", file=sys.stderr
        )
        return 2
    torch.manual_seed(args.seed)
    transform = SwaVTransform(
        crop_sizes=(args.crop_size,),
        crop_counts=(2,),
        crop_min_scales=(MIN_SCALE,),
        crop_max_scales=(1.0,),
        gaussian_blur=0.0,
    )
    crops = Crops(open_dataset(args.data_path, "train"), transform)
    model = SwAV(resnet18(stem="small", width=args.width)).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    Path(args.dump_path).mkdir(parents=True, exist_ok=True)
    state, place = checkpoint.load_checkpoint(args.dump_path), (0, 0)
    if state is not None:
        model.load_state_dict(state["swav"])
        optimizer.load_state_dict(state["optimizer"])
        place = (state["epoch"], state["done"])
    return train(model, optimizer, SwaVLoss(), crops, place, args)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data_path", required=True, help="images, as our training scripts take them")
    add("--dump_path", required=True, help="folder of the run")
    add("--epochs", type=int, required=True)
    add("--batch_size", type=int, default=128)
    add("--crop_size", type=int, default=32, help="side of the two crops, in pixels")
    add("--width", type=float, default=1.0, help="of the ResNet-18, as a multiple")
    add("--workers", type=int, default=0, help="loader processes")
    add("--device", default="cpu", help="cpu or cuda")
    add("--seed", type=int, default=0)
    add("--log_freq", type=int, default=20, help="iterations between two lines of the log")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
