"""Photometric operations on a batch of images, each sample with its own parameters.

Images are float `(n, C, S, S)` in [0, 1] and are changed in place; parameters are `(n, 1, 1, 1)`
unless said otherwise. The operations are those of PIL and of torchvision, without PIL's rounding
to 8 bits. Mean absolute differences over random parameters of SwAV, in levels of 1/255, on images
of uniform noise (the hardest case) and on smooth ones:

                  PIL, noise  PIL, smooth  torchvision on float tensors, noise and smooth
    brightness    0.43        0.46         0
    contrast      0.45        0.51         0.01 (its weight of red is 0.2989)
    saturation    0.46        0.50         0.01
    hue           0.87        0.52         0
    grayscale     0.25        0.25         0.01
    blur          0.55        0.43         2.6 and 0.23
    solarize      0           0            0

PIL's hue works with 256 hues and torchvision cuts its turn down to a whole 255th, which PIL reads
as a 256th: up to 1.7 levels on noise, at most 0.8 when that turn is given to ours. PIL's blur (the
published one) is three box blurs, and so is ours; torchvision's samples a Gaussian, which is
narrower below sigma 0.5: on noise up to 10 levels apart. Near sigma 0.1 PIL rounds each of its six
passes to 8 bits and so hardly blurs at all: 1.04 levels on noise, 0.1 on smooth images.
"""

import numpy as np
import torch
import torch.nn.functional as F

LUMA = (0.299, 0.587, 0.114)  # PIL's weights of red, green and blue
BOX_PASSES = 3  # PIL approximates a Gaussian by three box blurs, and so do we
TINY = 1e-9


def flip(x: torch.Tensor) -> None:
    """Mirror left and right."""
    x.copy_(x.flip(-1))


def solarize(x: torch.Tensor) -> None:
    """Invert what is brighter than one half, which is PIL's threshold of 128."""
    torch.minimum(x, 1 - x, out=x)


def grayscale(x: torch.Tensor) -> None:
    """Set all three channels to the luminance."""
    x.copy_(luminance(x))


def luminance(x: torch.Tensor) -> torch.Tensor:
    """`(n, 3, ...)` to `(n, 1, ...)` with PIL's weights."""
    gray = x[:, 0:1] * LUMA[0]
    return gray.add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:3], alpha=LUMA[2])


def brightness(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply, then clamp to [0, 1]."""
    x.mul_(factor).clamp_(0, 1)


def contrast(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply the distance to the image's mean luminance, then clamp to [0, 1].

    Without three channels the mean of all values stands for the luminance.
    """
    mean = x.mean(dim=(2, 3), keepdim=True)  # (n, C, 1, 1)
    mean = luminance(mean) if x.shape[1] == 3 else mean.mean(dim=1, keepdim=True)
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply the distance to each pixel's luminance, then clamp to [0, 1]."""
    gray = luminance(x).mul_(1 - factor)
    x.mul_(factor).add_(gray).clamp_(0, 1)


def hue(x: torch.Tensor, peaks: torch.Tensor) -> None:
    """Turn the hue of HSV; `peaks` `(n, 3, 1, 1)` as `hue_peaks` gives them.

    With the hue h in sextants from -3 to 3 and D = max - min, a channel that peaks at hue c is
    min + D * clamp(||h - c| - 3| - 1, 0, 1); red peaks at 0, green at 2, blue at -2. Inverted,
    |h| = (G + B - R - min) / D + 1 with the sign of G - B. To turn the hue is to move the peaks.
    """
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    low = x.amin(dim=1, keepdim=True)
    chroma = x.amax(dim=1, keepdim=True).sub_(low).add_(TINY)  # gray: 0 / TINY, so no NaN
    angle = (green + blue).sub_(red).sub_(low).div_(chroma).add_(1).copysign_(green - blue)
    wave = (angle - peaks).abs_().sub_(3).abs_().clamp_(1, 2)  # (n, 3, S, S)
    torch.addcmul(low.sub_(chroma), wave, chroma, out=x)


def hue_peaks(factor: np.ndarray) -> np.ndarray:
    """Where red, green and blue peak, in sextants from -3 to 3, after `factor` `(N,)` turns."""
    return np.mod(np.array([0.0, 2.0, -2.0]) - 6 * factor[:, None] + 3, 6) - 3  # (N, 3)


def blur(x: torch.Tensor, kernel: torch.Tensor) -> None:
    """Separable blur; `kernel` `(n, r + 1, 1, 1)` is one half of it, centre first.

    Beyond the border the edge pixel goes on, as in PIL.
    """
    radius = kernel.shape[1] - 1
    weights = kernel.unsqueeze(-1).unbind(1)  # (n, 1, 1, 1) each
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size = x.shape[dim]
        padded = F.pad(x, padding, mode="replicate")
        torch.mul(padded.narrow(dim, radius, size), weights[0], out=x)
        for tap in range(1, radius + 1):
            pair = padded.narrow(dim, radius - tap, size) + padded.narrow(dim, radius + tap, size)
            x.addcmul_(pair, weights[tap])


def blur_kernels(sigma: np.ndarray) -> np.ndarray:
    """Half kernels of PIL's GaussianBlur(radius=sigma), `(N,)` -> `(N, r + 1)` float32.

    PIL runs three box blurs whose width, a whole number of pixels and a fraction at both ends,
    gives their sum the variance sigma^2 exactly. This is their convolution.
    """
    variance = np.square(sigma)[:, None]  # (N, 1)
    whole = np.floor((np.sqrt(12 * variance / BOX_PASSES + 1) - 1) / 2)
    end = (2 * whole + 1) * (whole * (whole + 1) - variance)
    end = end / (6 * (variance / BOX_PASSES - (whole + 1) ** 2))
    reach = int(whole.max(initial=0)) + 1
    distance = np.abs(np.arange(-reach, reach + 1))  # (2 reach + 1,)
    box = np.where(distance <= whole, 1.0, np.where(distance == whole + 1, end, 0.0))
    box /= box.sum(axis=1, keepdims=True)
    kernel = np.ones((len(sigma), 1))
    for _ in range(BOX_PASSES):
        wider = np.zeros((len(sigma), kernel.shape[1] + 2 * reach))
        for shift in range(box.shape[1]):
            wider[:, shift : shift + kernel.shape[1]] += kernel * box[:, shift : shift + 1]
        kernel = wider
    return kernel[:, kernel.shape[1] // 2 :].astype(np.float32)
