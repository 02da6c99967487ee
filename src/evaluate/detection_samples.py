"""Which anchors and proposals of an image the losses of a detector are of, drawn for each image by itself."""

import torch
from torch import Tensor, nn

from ..data.multicrop import generator


class SamplesByImage:
    """Draws the anchors or proposals of each image that a loss is of, by a generator of the image's own.

    In place of torchvision's sampler, so that the draws depend neither on the number of processes nor on
    whether the run was interrupted. keys: of the generators of the images of the next batch, set before.
    """

    def __init__(self, number: int, positive_share: float):
        self.number, self.positive_share = number, positive_share
        self.keys: list[tuple[int, ...]] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """labels: of the anchors of each image, (A,): above 0 positive, 0 negative, -1 neither. Returns
        masks uint8 (A,) of the positive and of the negative ones that were drawn."""
        chosen = ([], [])
        for of_image, keys in zip(labels, self.keys, strict=True):
            draws = generator(*keys)
            room = int(self.number * self.positive_share)
            for masks, rows in zip(chosen, (of_image >= 1, of_image == 0), strict=True):
                places = rows.nonzero().flatten()
                order = torch.randperm(len(places), generator=draws)[:room]
                mask = torch.zeros_like(of_image, dtype=torch.uint8)
                mask[places[order.to(places.device)]] = 1
                masks.append(mask)
                room = self.number - len(order)
        return chosen


def set_draws(detector: nn.Module, keys: list[tuple[int, ...]]) -> None:
    """Say what the draws of the next batch depend on, for each of its images."""
    detector.rpn.fg_bg_sampler.keys = [(*key, 0) for key in keys]
    detector.roi_heads.fg_bg_sampler.keys = [(*key, 1) for key in keys]
