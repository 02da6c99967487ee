"""Fixed Sobel filters before the first convolution, and how to train without, use without them.

DeepCluster (Caron et al. 2018, arXiv:1807.05520, section 3.3) takes colour away and shows the
network the two derivatives of the grey image, as Bojanowski & Joulin 2017, arXiv:1704.05310.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Cross-correlated with the grey image: minus its derivative along a row, and along a column.
FILTERS = (((1, 0, -1), (2, 0, -2), (1, 0, -1)), ((1, 2, 1), (0, 0, 0), (-1, -2, -1)))


class Sobel(nn.Sequential):
    """Grey level, then two derivatives: (B, 3, H, W) -> (B, 2, H + 2 padding - 2, W + ...).

    padding: zeros around the image; 1 in DeepCluster, 2 in DeeperCluster, 0 for none. Nothing here
    is trained. Raises ValueError on another padding.
    """

    def __init__(self, padding: int = 1):
        if padding not in (0, 1, 2):
            raise ValueError(f"--sobel_padding {padding} must be 1 (DeepCluster), 2 or 0")
        super().__init__(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 3, padding=padding))
        self.requires_grad_(False)
        self[0].weight.fill_(1 / 3)
        self[1].weight.copy_(torch.tensor(FILTERS).unsqueeze(1))
        for conv in self:
            conv.bias.zero_()

    @property
    def padding(self) -> int:
        """Zeros around the image, in pixels."""
        return self[1].padding[0]

    def forward(self, x: Tensor) -> Tensor:
        # In the 8 bits of bfloat16 the difference of two neighbours would be mostly rounding.
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self[0].weight.dtype))


@torch.no_grad()
def sobel_to_rgb(conv: nn.Conv2d, padding: int) -> nn.Conv2d:
    """One convolution of RGB images that stands for Sobel(padding) and `conv` after it.

    conv: of 2 channels, kernel k; the new one has kernel k + 2, the same stride and bias, and their
    paddings added. Its output is the same, to rounding, everywhere with padding 2, beyond which Sobel
    filters give zero, and else wherever its window lies inside the image; at the border `conv` saw
    zeros, where the new one sees derivatives of the image against zeros. Raises ValueError on a
    convolution that is not a plain one of 2 channels.
    """
    if conv.in_channels != 2 or conv.groups != 1 or conv.dilation != (1, 1):
        raise ValueError(f"{conv} must have 2 input channels, 1 group and no dilation")
    filters = torch.tensor(FILTERS, dtype=torch.float64, device=conv.weight.device)  # (2, 3, 3)
    # Of two cross-correlations in a row the kernels are convolved with each other.
    kernel = F.conv2d(
        conv.weight.double(), filters.flip(1, 2).unsqueeze(1), padding=2, groups=2
    ).sum(1, keepdim=True)  # (out, 1, k + 2, k + 2)
    rgb = nn.Conv2d(
        3,
        conv.out_channels,
        tuple(k + 2 for k in conv.kernel_size),
        conv.stride,
        tuple(p + padding for p in conv.padding),
        bias=conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    rgb.weight.copy_((kernel / 3).expand(-1, 3, -1, -1))
    if conv.bias is not None:
        rgb.bias.copy_(conv.bias)
    return rgb
