# SPDX-License-Identifier: Apache-2.0
"""The image encoder of Uni-Perceiver, pre-trained on several modalities."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vitadapter_ops.linear import project

from ..layers.drop_path import DropPath, drop_path_rates
from .plain_vit import resize_grid
from .protocol import Grid, Step
from .windows import SelfAttention, attend, in_windows

# torch's default, unlike the other backbones.
LAYER_NORM_EPS = 1e-5
_VIDEO_FRAMES = 8


class Attention(SelfAttention):
    """Multi-head self-attention over the whole grid or inside square windows.

    A grid that windows do not tile is padded with zeros before the projection, so that a padded
    query, key or value is the projection's bias; it is not masked.

    Args:
        dim: token width D.
        num_heads: attention heads; divides dim.
        window_size: side of a window in tokens; None: global attention.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, shape: Grid) -> Tensor:
        """Maps tokens [B, h*w, D] of a grid `shape` = (h, w) to the same shape."""
        if self.window_size is None:
            return project(self.out_proj, self._attention(x))
        return project(self.out_proj, in_windows(self._attention, x, shape, self.window_size))

    def _attention(self, x: Tensor) -> Tensor:
        return attend(project(self.in_proj, x), self.num_heads)


class Layer(nn.Module):
    """Pre-norm transformer block with layer scale, which starts at 0, and stochastic depth.

    Args:
        dim: token width D.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP relative to dim.
        drop_path: probability of dropping a branch.
        window_size: as in `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        window_size: int | None,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(dim, num_heads, window_size)
        self.linear1 = nn.Linear(dim, int(mlp_ratio * dim))
        self.linear2 = nn.Linear(int(mlp_ratio * dim), dim)
        self.drop_path = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.gamma_1 = nn.Parameter(torch.zeros(dim))
        self.gamma_2 = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, shape: Grid) -> Tensor:
        """Maps tokens [B, h*w, D] of a grid `shape` = (h, w) to the same shape."""
        x = x + self.gamma_1 * self.drop_path(self.self_attn(self.norm1(x), shape))
        hidden = nn.functional.gelu(project(self.linear1, self.norm2(x)))
        return x + self.gamma_2 * self.drop_path(project(self.linear2, hidden))


class _PatchEmbed(nn.Module):
    """Patches, positions in the image and in time; an image is the first frame of a video."""

    def __init__(self, embed_dim: int, patch_size: int, grid: int, in_chans: int) -> None:
        super().__init__()
        self.grid = grid
        self.spatial_pos_embed = nn.Embedding(grid**2, embed_dim)
        self.temporal_pos_embed = nn.Embedding(_VIDEO_FRAMES, embed_dim)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Maps images to tokens [B, h*w, D] and the grid (h, w)."""
        patches = self.proj(images)
        shape = (patches.shape[2], patches.shape[3])
        places = torch.arange(self.grid**2, device=images.device)
        positions = resize_grid(self.spatial_pos_embed(places)[None], (self.grid,) * 2, shape)
        tokens = patches.flatten(2).transpose(1, 2).contiguous()
        return tokens + positions + self.temporal_pos_embed(places[:1]), shape


class _VisualEmbed(nn.Module):
    def __init__(self, embed_dim: int, patch_size: int, grid: int, in_chans: int) -> None:
        super().__init__()
        self.embeddings_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.patch_embed = _PatchEmbed(embed_dim, patch_size, grid, in_chans)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Maps images to normalised tokens [B, h*w, D] and the grid (h, w)."""
        tokens, shape = self.patch_embed(images)
        return self.embeddings_norm(tokens), shape


class UniPerceiver(nn.Module):
    """Image part of Uni-Perceiver (Zhu et al., CVPR 2022).

    It is a `Backbone`: see protocol.py. Weights start as torch's layers do, the layer scale from 0.

    Args:
        embed_dim: token width D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP relative to embed_dim.
        patch_size: side of a patch in pixels.
        pretrain_size: side of the pre-training image in pixels.
        drop_path_rate: stochastic depth of the last block; the first has none, linear between.
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
        window_size: int,
        global_blocks: Collection[int],
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.depth = depth
        self.patch_size = patch_size
        self.visual_embed = _VisualEmbed(
            embed_dim, patch_size, pretrain_size // patch_size, in_chans
        )
        self.layers = nn.ModuleList(
            Layer(
                embed_dim,
                num_heads,
                mlp_ratio,
                rate,
                None if index in global_blocks else window_size,
            )
            for index, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )

    def start(self, images: Tensor) -> tuple[Tensor, Grid, Sequence[Step]]:
        """Tokens, grid, and one callable for each block."""
        tokens, shape = self.visual_embed(images)
        return tokens, shape, [partial(layer, shape=shape) for layer in self.layers]
