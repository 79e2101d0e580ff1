# SPDX-License-Identifier: Apache-2.0
"""BEiT and BEiTv2: relative position biases, no position embedding, no key bias."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitadapter_ops.linear import is_plain_tensor, is_untouched, linear, project

from ..images import of_traced_size
from ..layers.drop_path import DropPath, drop_path_rates
from .plain_vit import LAYER_NORM_EPS, Mlp, PatchEmbed
from .protocol import Grid, Step
from .windows import SelfAttention, attend, in_windows

LAYER_SCALE = 1e-6
# Distances from the class token, to it, and from it to itself.
CLASS_DISTANCES = 3


class Attention(SelfAttention):
    """Self-attention with a learned bias for each distance between query and key.

    Args:
        dim: token width D.
        num_heads: attention heads; divides dim.
        side: the bias table serves a square of side x side tokens.
        windowed: attend inside windows of that size. A grid that they do not tile is padded with
            zeros before the qkv projection, and not masked: a padded key is zero, a padded value is
            the value bias. Otherwise the tokens are one class token and exactly one such square.
    """

    def __init__(self, dim: int, num_heads: int, side: int, windowed: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.side = side
        self.window_size = side if windowed else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        distances = (2 * side - 1) ** 2 + (0 if windowed else CLASS_DISTANCES)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, num_heads))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, shape: Grid) -> Tensor:
        """Maps tokens [B, N, D] to the same shape; N = h*w in windows, else 1 + h*w."""
        logits_bias = self.position_bias()

        def attention(tokens: Tensor) -> Tensor:
            qkv = self._project(tokens)
            return attend(qkv, self.num_heads, logits_bias.to(qkv.dtype))

        if self.window_size is None:
            return project(self.proj, attention(x))
        return project(self.proj, in_windows(attention, x, shape, self.window_size))

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values with their biases, by one product where qkv is a plain layer."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        layer: Any = self.qkv
        if (
            type(layer) is nn.Linear
            and layer.bias is None
            and is_plain_tensor(layer.weight)
            and is_plain_tensor(bias)
            and is_untouched(layer)
        ):
            return linear(x, layer.weight, bias)
        qkv: Tensor = layer(x)
        # Under autocast the product is 16 bits wide, and so is the sum that F.linear makes.
        return qkv + bias.to(qkv.dtype)

    def position_bias(self) -> Tensor:
        """The biases of all pairs, [1, heads, N, N].

        Row (i - k + side - 1) * (2 * side - 1) + j - l + side - 1 of the table holds the bias
        between query (i, j) and key (k, l). Sliding windows over the table give all pairs without
        an index of N x N entries.
        """
        side, table = self.side, self.relative_position_bias_table
        grid = table[: (2 * side - 1) ** 2].view(2 * side - 1, 2 * side - 1, -1)
        pairs = grid.unfold(0, side, 1).unfold(1, side, 1).flip(-2, -1)
        bias = pairs.permute(2, 0, 1, 3, 4).reshape(1, -1, side * side, side * side)
        if self.window_size is not None:
            return bias
        from_class, to_class, same = table[-CLASS_DISTANCES:].unsqueeze(-1).unsqueeze(-1)
        first = from_class.expand(-1, 1, side * side)[None]
        column = to_class.expand(-1, side * side, 1)[None]
        bias = torch.cat((column, bias), dim=-1)
        return torch.cat((torch.cat((same[None], first), dim=-1), bias), dim=-2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Published files hold the index that `position_bias` does without.
        state_dict.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale and stochastic depth.

    Args:
        dim: token width D.
        attention: the block's attention.
        mlp_ratio: hidden width of the MLP relative to dim.
        drop_path: probability of dropping a branch.
    """

    def __init__(self, dim: int, attention: Attention, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.gamma_2 = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    def forward(self, x: Tensor, shape: Grid) -> Tensor:
        """Maps tokens [B, N, D] of a grid `shape` = (h, w) to the same shape."""
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), shape))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class BEiT(nn.Module):
    """BEiT (Bao et al., ICLR 2022) and BEiTv2 (Peng et al., 2022), which differ in weights only.

    It is a `Backbone`: see protocol.py. Linear layers start from a normal distribution with
    standard deviation 0.02, truncated; position biases and other biases from 0.

    Args:
        embed_dim: token width D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP relative to embed_dim.
        patch_size: side of a patch in pixels.
        drop_path_rate: stochastic depth of the last block; the first has none, linear between.
        window_sizes: side of each block's windows in tokens; None: global attention with a class
            token, for images of exactly img_size.
        img_size: side of the image in pixels; used without windows only.
        in_chans: channels of the images.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        patch_size: int,
        drop_path_rate: float,
        window_sizes: Sequence[int] | None,
        img_size: int,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.depth = depth
        self.patch_size = patch_size
        self.img_size = None if window_sizes else img_size
        self.num_prefix_tokens = 0 if window_sizes else 1
        self.patch_embed = PatchEmbed(embed_dim, patch_size, in_chans)
        if window_sizes is None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        sides = window_sizes or [img_size // patch_size] * depth
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                Attention(embed_dim, num_heads, side, windowed=window_sizes is not None),
                mlp_ratio,
                rate,
            )
            for side, rate in zip(sides, drop_path_rates(drop_path_rate, depth), strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def start(self, images: Tensor) -> tuple[Tensor, Grid, Sequence[Step]]:
        """Tokens, grid, and one callable for each block.

        Raises:
            ValueError: the model serves one image size, and these images have another.
        """
        if self.img_size is not None and tuple(images.shape[2:]) != (self.img_size,) * 2:
            raise ValueError(
                f"images: expected {self.img_size}x{self.img_size} pixels (img_size: this BEiT's "
                f"position biases serve one size), got {images.shape[2]}x{images.shape[3]}; cut "
                "larger images into such windows, or build the model with another img_size"
            )
        if self.img_size is not None:
            images = of_traced_size(images)
        patches = self.patch_embed(images)
        shape = (patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).transpose(1, 2).contiguous()
        if self.num_prefix_tokens:
            tokens = with_class_token(self.cls_token, tokens)
        return tokens, shape, [partial(block, shape=shape) for block in self.blocks]


def with_class_token(token: Tensor, tokens: Tensor) -> Tensor:
    """The class token [1, 1, D] before each image's tokens [B, N, D]: [B, 1 + N, D]."""
    # Flat, or for one image the gradient is a part of all tokens' with their strides, of which
    # DistributedDataParallel warns.
    return torch.cat((token.flatten().expand(tokens.shape[0], 1, -1), tokens), dim=1)
