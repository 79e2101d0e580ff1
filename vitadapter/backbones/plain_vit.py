# SPDX-License-Identifier: Apache-2.0
"""Plain vision transformer: one resolution, no class token, no final norm."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_ops.linear import project

from ..layers.drop_path import DropPath, drop_path_rates
from .protocol import Grid, Step
from .windows import SelfAttention, attend, in_windows

LAYER_NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Cuts the image into square patches and projects each to a token."""

    def __init__(self, embed_dim: int, patch_size: int, in_chans: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, in_chans, H, W] to a grid of tokens [B, D, H / patch, W / patch]."""
        return self.proj(images)


class Attention(SelfAttention):
    """Multi-head self-attention over the whole grid or inside square windows.

    A grid that windows do not tile is padded at the bottom and right after the qkv projection, and
    the padding is not masked: a padded key is exactly zero, so its logit is 0 and it takes its
    share of the softmax. Published weights were trained that way.

    Args:
        dim: token width D.
        num_heads: attention heads; divides dim.
        window_size: side of a window in tokens; None: global attention.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Maps tokens [B, h*w, D] of a grid `shape` = (h, w) to the same shape."""
        qkv = project(self.qkv, x)
        if self.window_size is None:
            out = attend(qkv, self.num_heads)
        else:
            attention = partial(attend, num_heads=self.num_heads)
            out = in_windows(attention, qkv, shape, self.window_size)
        return project(self.proj, out)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, N, D] to the same shape."""
        return project(self.fc2, F.gelu(project(self.fc1, x)))


class Block(nn.Module):
    """Pre-norm transformer block, each branch with stochastic depth and optional layer scale.

    Args:
        dim: token width D.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP relative to dim.
        drop_path: probability of dropping a branch.
        layer_scale: scale each branch by a learned vector; it starts at 1, so that weights trained
            without it load unchanged.
        window_size: as in `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: bool = True,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)
        self.gamma1 = nn.Parameter(torch.ones(dim)) if layer_scale else None
        self.gamma2 = nn.Parameter(torch.ones(dim)) if layer_scale else None
        # For ViTDet: maps tokens and grid to tokens, after both branches.
        self.residual: nn.Module | None = None

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Maps tokens [B, h*w, D] of a grid `shape` = (h, w) to the same shape."""
        x = x + self.drop_path(scaled(self.attn(self.norm1(x), shape), self.gamma1))
        x = x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))
        return x if self.residual is None else self.residual(x, shape)


class PlainViT(nn.Module):
    """ViT with a learned position grid (Dosovitskiy et al., ICLR 2021).

    `pos_embed` keeps the entry of the class token in front, so that published weights load; it is
    not used and receives a zero gradient. Linear layers, the patch projection and `pos_embed` start
    from a normal distribution with standard deviation 0.02, truncated; biases from 0.

    It is a `Backbone`: see protocol.py.

    Args:
        embed_dim: token width D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP relative to embed_dim.
        patch_size: side of a patch in pixels.
        pretrain_size: side of the pre-training image in pixels.
        drop_path_rate: stochastic depth of the last block; the first has none, linear between.
        layer_scale: as in `Block`.
        window_size: side of the windows, in tokens, of the blocks that are not global.
        global_blocks: indices of the blocks with global attention.
        in_chans: channels of the images.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        patch_size: int,
        pretrain_size: int,
        drop_path_rate: float,
        layer_scale: bool,
        window_size: int,
        global_blocks: Collection[int],
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.depth = depth
        self.patch_size = patch_size
        self.pretrain_grid = pretrain_size // patch_size
        self.patch_embed = PatchEmbed(embed_dim, patch_size, in_chans)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.pretrain_grid**2 + 1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                layer_scale=layer_scale,
                window_size=None if index in global_blocks else window_size,
            )
            for index, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def start(self, images: Tensor) -> tuple[Tensor, Grid, Sequence[Step]]:
        """Tokens, grid, and one callable for each block."""
        tokens, shape = self.tokenize(images)
        return tokens, shape, [partial(block, shape=shape) for block in self.blocks]

    def tokenize(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embeds patches and positions.

        Args:
            images: [B, in_chans, H, W], H and W multiples of the patch size.

        Returns:
            Tokens [B, h*w, D] and the grid (h, w).
        """
        patches = self.patch_embed(images)
        shape = (patches.shape[2], patches.shape[3])
        # Contiguous here, or every residual after it keeps the transposed layout.
        tokens = patches.flatten(2).transpose(1, 2).contiguous()
        return tokens + self.position_tokens(shape), shape

    def position_tokens(self, shape: tuple[int, int]) -> Tensor:
        """The position grid resized to `shape` = (h, w), bicubically: [1, h*w, D]."""
        return resize_grid(self.pos_embed[:, 1:], (self.pretrain_grid,) * 2, shape)


def resize_grid(tokens: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Resizes a grid of positions bicubically.

    Args:
        tokens: [1, rows * columns, D].
        grid: (rows, columns) of the given grid.
        shape: (h, w) of the result.

    Returns:
        [1, h * w, D].
    """
    positions = torch.unflatten(tokens.transpose(1, 2), 2, grid)
    positions = F.interpolate(positions, size=shape, mode="bicubic", align_corners=False)
    return positions.flatten(2).transpose(1, 2)


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """x with each channel multiplied by gamma [D], where there is one."""
    return x if gamma is None else gamma * x
