"""A trunk as a program that runs without this code: torch.export and ONNX, for any batch and size.

program, any_size = trace(model, in_chans=3, image_size=224)
check(program.module(), model, in_chans=3, sizes=[(224, 224), (256, 288)])
"""

import copy
import io
import logging
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import RunError, cause
from .vision_transformer import VisionTransformer, bicubic_matrix

logger = logging.getLogger(__name__)

BATCHES = (1, 3)  # images at a time, that programs are checked with
SMALLEST_TRACED = 96  # px; the last map of a ResNet has several cells then
TOLERANCE = 1e-5  # of the largest feature, in what a program and the network differ
LARGEST_ONNX = 2**31  # bytes in one file: a limit of its format


class Trunk(nn.Module):
    """Normalised images (B, C, H, W) -> features (B, D): what is traced of a network."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_backbone(images)


def trace(
    model: nn.Module, in_chans: int, image_size: int, *, try_any_size: bool = True
) -> tuple[ExportedProgram, bool]:
    """(program of a trunk, whether it takes images of any size), on the CPU in float32.

    model: with forward_backbone, in evaluation mode, on the CPU in float32; it stays as it is. The
    program takes any number of images; of image_size x image_size only, where the network is made for
    one size, cannot be traced for others, or is not to be tried for them. Raises RunError where it
    cannot be traced at all, and what the network raises for images of that size.
    """
    with torch.no_grad():
        model.forward_backbone(torch.zeros(1, in_chans, image_size, image_size))
    traced = copy.deepcopy(model).to(memory_format=torch.contiguous_format).requires_grad_(False)
    if isinstance(traced, VisionTransformer):
        traced.position_table = types.MethodType(_position_table, traced)
    trunk = Trunk(traced).eval()
    side = max(image_size, SMALLEST_TRACED)
    any_batch, any_size = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    if try_any_size:
        try:
            program = _export(trunk, torch.zeros(2, in_chans, side, side), any_size)
            check(program.module(), model, in_chans, two_sizes(image_size))
            return program, True
        except Exception as error:  # torch.export has no error of its own for what it cannot trace
            logger.debug(f"not for all sizes: {cause(error)}")
    try:
        images = torch.zeros(2, in_chans, image_size, image_size)
        return _export(trunk, images, any_batch), False
    except Exception as error:
        raise RunError(f"torch.export cannot trace this network ({cause(error)})") from error


def _export(trunk, images, dynamic):
    return torch.export.export(trunk, (images,), dynamic_shapes={"images": dynamic}, strict=False)


def two_sizes(image_size: int) -> list[tuple[int, int]]:
    """(height, width) of the images that a program for all sizes is checked with."""
    return [(image_size, image_size), (image_size + 32, image_size + 64)]


def check(
    run: Callable[[Tensor], Tensor],
    model: nn.Module,
    in_chans: int,
    sizes: list[tuple[int, int]],
) -> float:
    """The largest difference between the features of a program and of its network, over the largest
    feature, for one and three images of each size (height, width).

    Raises RunError where it exceeds TOLERANCE.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    with torch.no_grad():
        for batch in BATCHES:
            for height, width in sizes:
                images = torch.randn(batch, in_chans, height, width, generator=generator)
                expected = model.forward_backbone(images)
                difference = (run(images) - expected).abs().max() / expected.abs().max()
                if not difference <= TOLERANCE:  # NaN, too
                    raise RunError(
                        f"the exported network and the one here differ by {difference:.1e} for {batch} "
                        f"images of {height} x {width} px"
                    )
                largest = max(largest, difference.item())
    return largest


def to_onnx(program: ExportedProgram, any_size: bool) -> bytes:
    """A traced trunk as an ONNX file, from `images` to `features`.

    any_size: as trace says. Raises ValueError where it is too large for one file, and RunError where
    torch.onnx lacks a part of it.
    """
    num_bytes = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    if num_bytes >= LARGEST_ONNX:
        raise ValueError(
            f"--format onnx: {num_bytes / 2**30:.1f} GB of weights exceed the 2 GB of one ONNX file: use "
            "--format torch_export"
        )
    for library in ("onnxscript", "onnx_ir", "torch.onnx"):  # which speak of every node
        logging.getLogger(library).setLevel(logging.ERROR)
    names = {0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"}
    try:
        written = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": names},
            external_data=False,
            verbose=False,
        )
    except RuntimeError as error:
        raise RunError(
            f"torch.onnx cannot write this network ({cause(error)}): use --format torch_export, or a "
            "newer torch"
        ) from error
    return written.model_proto.SerializeToString()


def onnx_features(contents: bytes) -> Callable[[Tensor], Tensor] | None:
    """The features of images, by onnxruntime on the CPU; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])

    def run(images):
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    return run


def program_bytes(program: ExportedProgram) -> bytes:
    """The .pt2 file of a program, for torch.export.load."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _position_table(self, height, width):
    """VisionTransformer.position_table without a branch on the size of the images, (1, 1 + N, D).

    For the size that the table is for, the interpolation is the identity."""
    table = self.pos_embed
    rows, columns = height // self.patch_size, width // self.patch_size
    is_own = _equal(rows, self.grid[0]) & _equal(columns, self.grid[1])
    if self.grid[0] == self.grid[1]:
        is_own = is_own & _equal(height - width, 0)

    def matrix(size, new_size):
        identity = torch.arange(new_size)[:, None] == torch.arange(size)
        step = size / (torch.scalar_tensor(new_size, dtype=torch.float64) + 0.1)
        interpolation = bicubic_matrix(size, new_size, table, step.to(table.dtype))
        return torch.where(is_own, identity.to(table.dtype), interpolation)

    patches = table[0, 1:].unflatten(0, self.grid)
    patches = matrix(self.grid[1], columns) @ patches
    patches = matrix(self.grid[0], rows) @ patches.flatten(1)
    patches = patches.view(1, rows * columns, self.embed_dim)
    return torch.cat([table[:, :1], patches], dim=1)


def _equal(size, number):
    """Whether a size of the traced images, which only the run knows, is a number, as a tensor."""
    return torch.scalar_tensor(size, dtype=torch.int64) == number
