# SPDX-License-Identifier: Apache-2.0
"""What an adapter needs of a vision transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

Grid = tuple[int, int]
Step = Callable[[Tensor], Tensor]


class Backbone(Protocol):
    """A vision transformer of one resolution; any module that has these works.

    Attributes:
        embed_dim: token width D.
        depth: number of blocks.
        patch_size: side of a patch in pixels.
        num_prefix_tokens: class and register tokens in front of the patch tokens, P.

    A backbone may also have `in_chans`, the number of channels of the images, else 3; and `norm`, a
    callable that maps tokens to tokens: its final norm, for the option norm_taps.
    """

    embed_dim: int
    depth: int
    patch_size: int
    num_prefix_tokens: int

    def start(self, images: Tensor) -> tuple[Tensor, Grid, Sequence[Step]]:
        """Embeds the images and says how to go on.

        Args:
            images: [B, in_chans, H, W], H and W multiples of the patch size.

        Returns:
            The tokens [B, P + h*w, D] before the first block, the grid (h, w), and one callable for
            each block, which maps tokens to tokens.
        """
        ...
