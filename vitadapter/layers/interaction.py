# SPDX-License-Identifier: Apache-2.0
"""Exchange between the ViT's tokens and the spatial pyramid: injector, extractor, interaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitadapter_ops.linear import project

from .attention.dense import Shapes
from .convolution import Conv2d
from .drop_path import DropPath

LAYER_NORM_EPS = 1e-6

# Builds the attention that reads from this many levels.
AttentionFactory = Callable[[int], nn.Module]
# One block of the ViT.
Step = Callable[[Tensor], Tensor]


class Injector(nn.Module):
    """Adds to the ViT's tokens what they attend to in the pyramid (paper sec. 3.4, eq. 1).

        x + gamma * Attention(norm(x), norm(c))

    Args:
        dim: token width D.
        attention: builds the attention layer for the pyramid's three levels.
        init: initial value of gamma; 0 leaves the pre-trained ViT's features untouched.
        norm_eps: of the layer norms.
    """

    def __init__(
        self,
        dim: int,
        attention: AttentionFactory,
        init: float = 0.0,
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.feat_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention(3)
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(
        self,
        x: Tensor,
        x_shapes: Shapes,
        c: Tensor,
        c_shapes: Shapes,
        points: Tensor | None = None,
        c_padding: Tensor | None = None,
    ) -> Tensor:
        """Maps ViT tokens x [B, N, D] and pyramid tokens c [B, S, D] to new x [B, N, D]."""
        query, feat = self.query_norm(x), self.feat_norm(c)
        out = self.attn(query, x_shapes, feat, c_shapes, points, *_given(c_padding))
        return x + self.gamma * out


class DWConv(nn.Module):
    """Depthwise 3x3 convolution of each level, with shared weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)

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

    def forward(self, x: Tensor, shapes: Shapes, padding: Tensor | None = None) -> Tensor:
        """Maps tokens [B, sum(H*W), D] of the levels `shapes` to the same shape.

        Those where `padding` [B, sum(H*W)] is True are zero for the convolution.
        """
        hidden = project(self.fc1, x)
        if padding is not None:
            hidden = hidden.masked_fill(padding[..., None], 0)
        return project(self.fc2, F.gelu(self.dwconv(hidden, shapes)))


class Extractor(nn.Module):
    """Updates the pyramid from the ViT's tokens (paper sec. 3.4, eq. 2 and 3).

        c = c + Attention(norm(c), norm(x));  c = c + DropPath(ConvFFN(norm(c)))

    Args:
        dim: token width D.
        attention: builds the attention layer for the ViT's single level.
        cffn_hidden: hidden width of the ConvFFN; None: no ConvFFN.
        drop_path: probability of dropping the ConvFFN branch; the attention branch always stays.
        norm_eps: of the layer norms.
    """

    def __init__(
        self,
        dim: int,
        attention: AttentionFactory,
        cffn_hidden: int | None = None,
        drop_path: float = 0.0,
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.feat_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention(1)
        self.ffn: ConvFFN | None = None
        if cffn_hidden is not None:
            self.ffn = ConvFFN(dim, cffn_hidden)
            self.ffn_norm = nn.LayerNorm(dim, eps=norm_eps)
            self.drop_path = DropPath(drop_path)

    def forward(
        self,
        c: Tensor,
        c_shapes: Shapes,
        x: Tensor,
        x_shapes: Shapes,
        points: Tensor | None = None,
        c_padding: Tensor | None = None,
        x_padding: Tensor | None = None,
    ) -> Tensor:
        """Maps pyramid tokens c [B, S, D] and ViT tokens x [B, N, D] to new c [B, S, D]."""
        query, feat = self.query_norm(c), self.feat_norm(x)
        c = c + self.attn(query, c_shapes, feat, x_shapes, points, *_given(x_padding))
        if self.ffn is not None:
            c = c + self.drop_path(self.ffn(self.ffn_norm(c), c_shapes, c_padding))
        return c


class Geometry(NamedTuple):
    """Where the tokens of one forward pass lie in the image.

    Attributes:
        x_shape: (h, w) of the ViT's grid.
        c_shapes: (H, W) of the pyramid's levels.
        x_points: centres of the ViT's tokens as fractions of the pyramid, [1, h*w, 1, 2].
        c_points: centres of the pyramid's tokens as fractions of the ViT's grid, [1, S, 1, 2].
        x_padding: [B, h*w] bool, True for tokens outside of an image's region; None: there are
            none.
        c_padding: [B, S], likewise.
    """

    x_shape: tuple[int, int]
    c_shapes: Shapes
    x_points: Tensor
    c_points: Tensor
    x_padding: Tensor | None = None
    c_padding: Tensor | None = None


class Interaction(nn.Module):
    """Injector, a range of the ViT's blocks, extractor; the last one owns extra extractors.

    Args:
        injector: from the pyramid into the ViT; None: the ViT stays as it is.
        extractor: from the ViT into the pyramid.
        extra_extractors: run after `extractor`, in sequence, on the same ViT tokens.
        freeze_vit: injector and blocks run without gradients.
        with_cp: recompute the activations of each part in the backward pass.
    """

    def __init__(
        self,
        injector: Injector | None,
        extractor: Extractor | None,
        extra_extractors: Sequence[Extractor] = (),
        *,
        freeze_vit: bool = False,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.injector = injector
        self.extractor = extractor
        # An empty ModuleList has no keys in the state_dict.
        self.extra_extractors = nn.ModuleList(extra_extractors)
        self.freeze_vit = freeze_vit
        self.with_cp = with_cp

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        steps: Sequence[Step],
        geometry: Geometry,
        prefix: int = 0,
        tap_norm: Step | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs one interaction.

        Args:
            x: ViT tokens [B, prefix + h*w, D].
            c: pyramid tokens [B, S, D].
            steps: the ViT blocks to run in between, as callables; owned by the ViT.
            geometry: where the tokens lie.
            prefix: number of class and register tokens, which only the ViT sees.
            tap_norm: normalises the ViT tokens that extractors get.

        Returns:
            The new x and c, and x as the extractors got it, but with the prefix, [B, prefix + h*w,
            D].
        """
        x_shape, c_shapes, x_points, c_points, x_padding, c_padding = geometry
        x_shapes = [x_shape]
        with torch.no_grad() if self.freeze_vit else nullcontext():
            if self.injector is not None:
                head, body = x[:, :prefix], x[:, prefix:]
                body = self._run(self.injector, body, x_shapes, c, c_shapes, x_points, c_padding)
                x = torch.cat((head, body), dim=1) if prefix else body
            for step in steps:
                x = self._run(step, x)
            tap = x if tap_norm is None else tap_norm(x)
        body = tap[:, prefix:]
        for extractor in (self.extractor, *self.extra_extractors):
            if extractor is not None:
                paddings = (c_padding, x_padding)
                c = self._run(extractor, c, c_shapes, body, x_shapes, c_points, *paddings)
        # No view: FSDP2 warns of a module that returns one.
        return x, c, tap

    def _run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        return run(function, *args, with_cp=self.with_cp)


def _given(padding: Tensor | None) -> tuple[Tensor, ...]:
    """The mask as a further argument, for attentions that may know none."""
    return () if padding is None else (padding,)


def run(function: Callable[..., Tensor], *args: Any, with_cp: bool) -> Tensor:
    """function(*args); with_cp: the backward pass computes its activations once more."""
    if with_cp and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def embed_levels(pyramid: Sequence[Tensor], level_embed: Tensor) -> Tensor:
    """Tokens of the pyramid's levels, each with its embedding added.

    Under autocast the convolutions' maps are 16 bits wide. Without gradients the tokens stay so,
    and with them every sum and norm of the pyramid; for training the sum widens them.

    Args:
        pyramid: maps [B, D, H, W].
        level_embed: [levels, D].

    Returns:
        [B, sum(H*W), D].
    """
    if not torch.is_grad_enabled():
        level_embed = level_embed.to(pyramid[0].dtype)
    embeddings = level_embed[:, :, None, None].unbind(0)
    return to_tokens([level + e for level, e in zip(pyramid, embeddings, strict=True)])


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
