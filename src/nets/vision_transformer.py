"""Vision transformers as DINO trains them: ViT-Tiny, Small, Base and Large, patches of any size.

ViT (Dosovitskiy et al. 2020, arXiv:2010.11929), section 3.1, Eq. 1-4, in the sizes of DeiT (Touvron
et al. 2020, arXiv:2012.12877, Table 1); stochastic depth (Huang et al. 2016, arXiv:1603.09382);
register tokens (Darcet et al. 2023, arXiv:2309.16588); LayerScale (Touvron et al. 2021,
arXiv:2103.17239). The names of parameters are those of the released checkpoints of DINO (Caron et al.
2021, arXiv:2104.14294) and DINOv2 (Oquab et al. 2023, arXiv:2304.07193).
"""

import functools
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D): softmax(q k^T / sqrt(D / heads)) v."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(B, T, 3 D) -> queries, keys and values, each (B, heads, T, D / heads)."""
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, qkv: Tensor, class_only: bool = False) -> Tensor:
        """(B, T, 3 D) -> (B, T, D), or (B, 1, D) of the class token alone."""
        queries, keys, values = self.split(qkv)
        queries = queries[:, :, :1] if class_only else queries
        x = F.scaled_dot_product_attention(queries, keys, values)  # (B, heads, T or 1, D / heads)
        return x.transpose(1, 2).flatten(2)

    def forward(
        self, x: Tensor, class_only: bool = False, packed: Sequence[torch.Size] | None = None
    ) -> Tensor:
        qkv = self.qkv(x)
        if packed is None:
            return self.proj(self.attend(qkv, class_only))
        batches = [self.attend(batch) for batch in unpack(qkv, packed)]
        return self.proj(pack(batches))

    def weights(self, x: Tensor) -> Tensor:
        """What every token attends to, (B, T, D) -> (B, heads, T, T); rows sum to 1."""
        queries, keys, _ = self.split(self.qkv(x))
        scale = queries.shape[-1] ** -0.5
        return (queries * scale @ keys.transpose(-2, -1)).softmax(dim=-1)


class MLP(nn.Module):
    """Linear, GELU, Linear; (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each dimension, (..., D) -> (..., D), which starts at `initial`."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _AddShare(torch.autograd.Function):
    """x + share branch, in the type of x: one operation forwards and one backwards, whatever the types."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, branch, share):
        with without_autocast(x):  # which would convert the branch first
            return torch.addcmul(x, branch, share).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, branch, share = inputs
        ctx.save_for_backward(share)
        ctx.dtype = branch.dtype

    @staticmethod
    def backward(ctx, grad):
        (share,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient that is differentiated once more
            return grad, (grad * share).to(ctx.dtype), None
        of_branch = torch.empty_like(grad, dtype=ctx.dtype)
        return grad, torch.mul(grad, share, out=of_branch), None


class Block(nn.Module):
    """A pre-norm encoder block (ViT, Eq. 2-3) with stochastic depth, (B, T, D) -> (B, T, D).

    drop_path_rate: how often a branch of a sample is left out in training, see
    VisionTransformer.draw_branches. layer_scale: where the factors of the branches start, None: there
    are none. class_only: token 0 alone, (B, 1, D); no output needs more of the last. shares: (2, B, 1, 1),
    of each branch of each sample what is added, None: all. packed: x is several batches in one, (N, D), see
    pack; shares are then of each token, (2, N, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path_rate: float,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()
        if layer_scale is not None:
            self.ls1, self.ls2 = LayerScale(dim, layer_scale), LayerScale(dim, layer_scale)

    def forward(
        self,
        x: Tensor,
        class_only: bool = False,
        shares: Tensor | None = None,
        packed: Sequence[torch.Size] | None = None,
    ) -> Tensor:
        of_attention, of_mlp = (None, None) if shares is None else shares
        branch = self.ls1(self.attn(self.norm1(x), class_only, packed))
        x = self.add(x[:, :1] if class_only else x, branch, of_attention)
        return self.add(x, self.ls2(self.mlp(self.norm2(x))), of_mlp)

    def add(self, x: Tensor, branch: Tensor, share: Tensor | None) -> Tensor:
        """Add a share (B, 1, 1) of a branch's output (B, T, D), where None is all of it."""
        return x + branch if share is None else _AddShare.apply(x, branch, share)


class PatchEmbedding(nn.Module):
    """(B, C, H, W) -> (B, floor(H/p) floor(W/p), D): a linear map of each p x p patch, by rows."""

    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A vision transformer without a head: images to the class token, or to all tokens.

    patch_size      side of a patch in pixels
    img_size        side, or (height, width), in pixels that the table of positions is for; images
                    of any other size get it interpolated, see position_table
    drop_path_rate  stochastic depth: 0 in the first block, growing linearly to this in the last
    embed_dim       D, times `width` and rounded to a multiple of num_heads
    num_registers   R register tokens, which take part in everything and have no position
    layer_scale     where the factors of LayerScale start, such as 1e-5; None: there are none

    Tokens are, in this order, the class token, R registers and the patches by rows: T = 1 + R + N.
    As published, Linear weights, the class token and the table of positions start as a truncated
    normal of 0.02, biases at 0, the patch embedding as torch's convolution. Registers start as the
    class token does. Raises ValueError.
    """

    def __init__(
        self,
        patch_size: int = 16,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_registers: int = 0,
        width: float = 1.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        sides = [img_size] if isinstance(img_size, int) else list(img_size)
        table_height, table_width = sides * 2 if len(sides) == 1 else sides
        if not 1 <= patch_size <= min(sides):
            raise ValueError(f"--patch_size {patch_size} must be from 1 to --img_size {img_size}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"--drop_path_rate {drop_path_rate} must be at least 0 and below 1")
        self.patch_size, self.depth, self.num_heads = patch_size, depth, num_heads
        self.num_registers = num_registers
        self.embed_dim = max(1, round(embed_dim * width / num_heads)) * num_heads
        self.num_features = dim = self.embed_dim
        self.grid = table_height // patch_size, table_width // patch_size  # rows, columns

        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim))
        if num_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, num_registers, dim))
        self.patch_embed = PatchEmbedding(patch_size, in_chans, dim)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, qkv_bias, rate, layer_scale) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        for parameter in self.parameters(recurse=False):  # the tokens and the table
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def position_table(self, height: int, width: int) -> Tensor:
        """Position embeddings of images of height x width pixels, (1, 1 + N, D), class token first.

        The table as it is where its grid is the image's (and the image is square, if the table is),
        otherwise bicubic interpolation by the factors (floor(height / p) + 0.1) / rows and
        (floor(width / p) + 0.1) / columns: released weights were trained with this 0.1 added.
        Raises ValueError on an image smaller than a patch.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        if min(rows, columns) < 1:
            raise ValueError(
                f"--patch_size {self.patch_size} exceeds images of {height}x{width} px"
            )
        if (rows, columns) == self.grid and (height == width or rows != columns):
            return self.pos_embed
        with without_autocast(self.pos_embed):  # in float32
            table = self.pos_embed.to(torch.promote_types(self.pos_embed.dtype, torch.float32))
            patches = table[0, 1:].unflatten(0, self.grid)
            patches = bicubic_matrix(self.grid[1], columns, table) @ patches
            patches = bicubic_matrix(self.grid[0], rows, table) @ patches.flatten(1)
            patches = patches.view(1, rows * columns, self.embed_dim)
            return torch.cat([table[:, :1], patches], dim=1).to(self.pos_embed.dtype)

    def tokens(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> what enters the first block, (B, T, D)."""
        positions = self.position_table(*x.shape[2:])
        first = self.cls_token + positions[:, :1]
        if self.num_registers:
            first = torch.cat([first, self.register_tokens], dim=1)
        patches = self.patch_embed(x) + positions[:, 1:]
        return torch.cat([first.expand(x.shape[0], -1, -1), patches], dim=1)

    def draw_branches(self, num_samples: int, device: torch.device) -> Sequence[Tensor | None]:
        """Stochastic depth: what each block adds of its branches, (2, B, 1, 1), or None for all of them.

        In training a branch of a sample is left out with the drop_path_rate of its block, else it is divided
        by 1 - drop_path_rate. All are drawn at once, since on a GPU each draw would be several launches.
        """
        rate = self.blocks[-1].drop_path_rate
        if not self.training or rate == 0:
            return [None] * self.depth
        keep = torch.linspace(1, 1 - rate, self.depth, device=device).view(-1, 1, 1, 1, 1)
        drawn = torch.bernoulli(keep.expand(-1, 2, num_samples, 1, 1)) / keep
        return drawn.unbind(0)

    def before_last_block(self, x: Tensor, shares: Sequence[Tensor | None]) -> Tensor:
        """Images (B, C, H, W) -> what enters the last block, (B, T, D). shares: of draw_branches."""
        x = self.tokens(x)
        for block, share in zip(self.blocks[:-1], shares[:-1], strict=True):
            x = block(x, shares=share)
        return x

    def forward_backbone(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the class token after the final LayerNorm, (B, D)."""
        shares = self.draw_branches(x.shape[0], x.device)
        x = self.before_last_block(x, shares)
        return self.norm(self.blocks[-1](x, class_only=True, shares=shares[-1])[:, 0])

    def forward_sizes(self, batches: Sequence[Tensor]) -> Tensor:
        """Batches of images, each of a size of its own -> class tokens (sum of B, D), rows in their order.

        The same as a pass of each, but all of them share the linear layers and norms of every block but the
        last, as those of DINOv2 do (arXiv:2304.07193, section 5): fewer launches, larger products.
        """
        shares = [self.draw_branches(images.shape[0], images.device) for images in batches]
        tokens = [self.tokens(images) for images in batches]  # (B, T, D) each
        packed, x = [batch.shape[:2] for batch in tokens], pack(tokens)  # (N, D)
        of_tokens = shares_of_tokens(shares, packed)
        for block, share in zip(self.blocks[:-1], of_tokens[:-1], strict=True):
            x = block(x, shares=share, packed=packed)
        last = [
            self.blocks[-1](batch, class_only=True, shares=share[-1])[:, 0]
            for batch, share in zip(unpack(x, packed), shares, strict=True)
        ]
        return self.norm(torch.cat(last))

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """forward_backbone of images, forward_sizes of a list of batches."""
        return self.forward_backbone(x) if isinstance(x, Tensor) else self.forward_sizes(x)

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> attention of the last block, (B, heads, T, T), rows sum to 1.

        [:, :, 0, 1 + num_registers:] is what the class token takes from the patches, by rows.
        """
        x = self.before_last_block(x, self.draw_branches(x.shape[0], x.device))
        return self.blocks[-1].attn.weights(self.blocks[-1].norm1(x))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Images (B, C, H, W) -> all tokens after each of the last n blocks and the last LayerNorm.

        n tensors (B, T, D), oldest first; T counts the registers. Raises ValueError.
        """
        if not 1 <= n <= self.depth:
            raise ValueError(f"--n_last_blocks {n} must be from 1 to the {self.depth} blocks")
        shares = self.draw_branches(x.shape[0], x.device)
        x, outputs = self.tokens(x), []
        for i, (block, share) in enumerate(zip(self.blocks, shares, strict=True)):
            x = block(x, shares=share)
            if i >= self.depth - n:
                outputs.append(self.norm(x))
        return outputs


def pack(batches: Sequence[Tensor]) -> Tensor:
    """Tokens of several batches, (B, T, D) each -> the tokens of all, (N, D), N the sum of B T."""
    return torch.cat([batch.flatten(0, 1) for batch in batches])


def unpack(x: Tensor, sizes: Sequence[torch.Size]) -> list[Tensor]:
    """The reverse of pack: (N, D) -> batches (B, T, D). sizes: (B, T) of each."""
    batches = x.split([size.numel() for size in sizes])
    return [batch.unflatten(0, size) for batch, size in zip(batches, sizes, strict=True)]


def shares_of_tokens(
    shares: Sequence[Sequence[Tensor | None]], sizes: Sequence[torch.Size]
) -> Sequence[Tensor | None]:
    """The shares of draw_branches of several batches, of each token as pack puts them: (2, N, 1) a block."""
    if shares[0][0] is None:
        return shares[0]
    batches = [
        torch.stack(list(share)).expand(-1, -1, -1, size[1], -1).flatten(2, 3)  # (depth, 2, B T, 1)
        for share, size in zip(shares, sizes, strict=True)
    ]
    return torch.cat(batches, dim=2).unbind(0)


def without_autocast(x: Tensor) -> torch.autocast:
    """No autocast inside, on the device of x."""
    kind = x.device.type
    return torch.autocast("cpu" if kind == "meta" else kind, enabled=False)


def bicubic_matrix(
    size: int, new_size: int, like: Tensor, step: float | Tensor | None = None
) -> Tensor:
    """Bicubic interpolation of `size` samples to new_size as a matrix, (new_size, size).

    Output i lies at (i + 0.5) size / (new_size + 0.1) - 0.5; Keys' kernel with a = -0.75, ends
    repeated, as in F.interpolate. A product has the same gradient in every run, also on a GPU. step:
    size / (new_size + 0.1), as a tensor where new_size is no number yet.
    """
    if (
        step is not None
        or torch.compiler.is_compiling()
        or type(like) not in (Tensor, nn.Parameter)
    ):
        return _bicubic_matrix(size, new_size, like.device, like.dtype, step)
    return _kept_bicubic_matrix(size, new_size, like.device, like.dtype)


@functools.lru_cache(maxsize=64)
def _kept_bicubic_matrix(size, new_size, device, dtype):
    """The same, which on a GPU would be 27 launches of every pass."""
    with torch.inference_mode(False), torch.no_grad():
        return _bicubic_matrix(size, new_size, device, dtype, None)


def _bicubic_matrix(size, new_size, device, dtype, step):
    if step is None:
        step = size / (new_size + 0.1)
    options = {"device": device, "dtype": dtype}
    centres = (torch.arange(new_size, **options) + 0.5) * step - 0.5
    samples = torch.arange(-2, size + 2, **options)  # two more at either end
    distance = (centres[:, None] - samples).abs()  # (new_size, size + 4)
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
    weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    weights[:, 2] += weights[:, 0] + weights[:, 1]
    weights[:, -3] += weights[:, -2] + weights[:, -1]
    return weights[:, 2:-2]


vit_micro = partial(VisionTransformer, embed_dim=96, num_heads=3, depth=4)  # for small images
vit_tiny = partial(VisionTransformer, embed_dim=192, num_heads=3)
vit_small = partial(VisionTransformer, embed_dim=384, num_heads=6)
vit_base = partial(VisionTransformer, embed_dim=768, num_heads=12)
vit_large = partial(VisionTransformer, embed_dim=1024, num_heads=16, depth=24)
deit_tiny, deit_small = vit_tiny, vit_small  # what DINO's first release called them

# What --arch takes.
ARCHITECTURES = {name: network for name, network in globals().items() if type(network) is partial}
