# SPDX-License-Identifier: Apache-2.0
"""Exchange between the ViT's tokens and the spatial pyramid: injector, extractor, interaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention.dense import Shapes
from .drop_path import DropPath

LAYER_NORM_EPS = 1e-6

# Builds the attention that reads from this many levels.
AttentionFactory = Callable[[int], nn.Module]


class Injector(nn.Module):
    """Adds to the ViT's tokens what they attend to in the pyramid (paper sec. 3.4, eq. 1).

        x + gamma * Attention(norm(x), norm(c))

    Args:
        dim: token width D.
        attention: builds the attention layer for the pyramid's three levels.
        init: initial value of gamma; 0 leaves the pre-trained ViT's features untouched.
    """

    def __init__(self, dim: int, attention: AttentionFactory, init: float = 0.0) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attention(3)
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor, x_shapes: Shapes, c: Tensor, c_shapes: Shapes) -> Tensor:
        """Maps ViT tokens x [B, N, D] and pyramid tokens c [B, S, D] to new x [B, N, D]."""
        out = self.attn(self.query_norm(x), x_shapes, self.feat_norm(c), c_shapes)
        return x + self.gamma * out


class DWConv(nn.Module):
    """Depthwise 3x3 convolution of each level, with shared weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Maps tokens [B, sum(H*W), channels] of the levels `shapes` to the same shape."""
        return to_tokens([self.dwconv(level) for level in to_maps(x, shapes)])


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise convolution (paper sec. 3.4; Wang et al., 2022).

    Args:
        dim: token width D.
        hidden: hidden width.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DWConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Maps tokens [B, sum(H*W), D] of the levels `shapes` to the same shape."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), shapes)))


class Extractor(nn.Module):
    """Updates the pyramid from the ViT's tokens (paper sec. 3.4, eq. 2 and 3).

        c = c + Attention(norm(c), norm(x));  c = c + DropPath(ConvFFN(norm(c)))

    Args:
        dim: token width D.
        attention: builds the attention layer for the ViT's single level.
        cffn_hidden: hidden width of the ConvFFN; None: no ConvFFN.
        drop_path: probability of dropping the ConvFFN branch; the attention branch always stays.
    """

    def __init__(
        self,
        dim: int,
        attention: AttentionFactory,
        cffn_hidden: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attention(1)
        self.ffn: ConvFFN | None = None
        if cffn_hidden is not None:
            self.ffn = ConvFFN(dim, cffn_hidden)
            self.ffn_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
            self.drop_path = DropPath(drop_path)

    def forward(self, c: Tensor, c_shapes: Shapes, x: Tensor, x_shapes: Shapes) -> Tensor:
        """Maps pyramid tokens c [B, S, D] and ViT tokens x [B, N, D] to new c [B, S, D]."""
        c = c + self.attn(self.query_norm(c), c_shapes, self.feat_norm(x), x_shapes)
        if self.ffn is not None:
            c = c + self.drop_path(self.ffn(self.ffn_norm(c), c_shapes))
        return c


class Interaction(nn.Module):
    """Injector, a range of the ViT's blocks, extractor; the last one owns extra extractors.

    Args:
        injector: from the pyramid into the ViT.
        extractor: from the ViT into the pyramid.
        extra_extractors: run after `extractor`, in sequence, on the same ViT tokens.
        with_cp: recompute the activations of each part in the backward pass.
    """

    def __init__(
        self,
        injector: Injector,
        extractor: Extractor,
        extra_extractors: Sequence[Extractor] = (),
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.injector = injector
        self.extractor = extractor
        # An empty ModuleList has no keys in the state_dict.
        self.extra_extractors = nn.ModuleList(extra_extractors)
        self.with_cp = with_cp

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        blocks: Sequence[nn.Module],
        x_shape: tuple[int, int],
        c_shapes: Shapes,
    ) -> tuple[Tensor, Tensor]:
        """Runs one interaction.

        Args:
            x: ViT tokens [B, h*w, D].
            c: pyramid tokens [B, S, D].
            blocks: the ViT blocks to run in between; owned by the ViT.
            x_shape: (h, w) of the ViT's grid.
            c_shapes: (H, W) of the pyramid's levels.

        Returns:
            The new x and c.
        """
        x = self._run(self.injector, x, [x_shape], c, c_shapes)
        for block in blocks:
            x = self._run(block, x, x_shape)
        for extractor in (self.extractor, *self.extra_extractors):
            c = self._run(extractor, c, c_shapes, x, [x_shape])
        return x, c

    def _run(self, module: nn.Module, *args: Any) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)


def to_tokens(maps: Sequence[Tensor]) -> Tensor:
    """Concatenates maps [B, D, H, W] into tokens [B, sum(H*W), D]."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def to_maps(tokens: Tensor, shapes: Shapes) -> list[Tensor]:
    """Splits tokens [B, sum(H*W), D] into one map [B, D, H, W] for each of `shapes`."""
    levels = torch.split(tokens, [h * w for h, w in shapes], dim=1)
    return [
        torch.unflatten(level.transpose(1, 2), 2, (h, w))
        for (h, w), level in zip(shapes, levels, strict=True)
    ]
