# SPDX-License-Identifier: Apache-2.0
"""What an adapter needs of a vision transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Protocol

from torch import Tensor, nn

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
    callable that maps tokens to tokens: its final norm, for the option norm_taps; and
    `default_cfg`, a dict with timm's `mean`, `std` and `input_size`, which the model then has too.
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


def check_backbone(backbone: Any) -> None:
    """Checks what an adapter is to be built around.

    Raises:
        TypeError: it is no module or compiled, lacks a part of `Backbone`, or has one of another
            type.
        ValueError: a size is not positive.
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(
            f"backbone: expected a torch.nn.Module, got {backbone!r}; ViTAdapter.from_timm takes "
            "the names of timm's models"
        )
    check_not_compiled("backbone", backbone)
    kind = type(backbone)
    missing = [name for name in (*Backbone.__annotations__, "start") if not hasattr(backbone, name)]
    if missing:
        advice = "ViTAdapter.from_timm takes timm's models"
        if kind.__module__.partition(".")[0] != "timm":
            advice = (
                "give it these (vitadapter.backbones.Backbone), or take the ViT from timm: "
                'ViTAdapter.from_timm("vit_base_patch14_dinov2.lvd142m", ...)'
            )
        raise TypeError(
            f"backbone: expected a module that follows the protocol Backbone, got {kind.__name__} "
            f"without {', '.join(missing)}; {advice}"
        )
    for name, least in (
        *(("embed_dim", 1), ("depth", 1), ("patch_size", 1), ("num_prefix_tokens", 0)),
        ("in_chans", 1),
    ):
        value = getattr(backbone, name, 3)
        if not isinstance(value, Integral):
            raise TypeError(f"backbone.{name}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"backbone.{name}: expected {least} or more, got {value}")
    if not callable(backbone.start):
        raise TypeError(f"backbone.start: expected a method, got {backbone.start!r}")


def check_not_compiled(name: str, model: nn.Module) -> None:
    """Raises TypeError, beginning with `name`, for a result of torch.compile.

    The adapter calls a ViT's parts one by one, which compiling its forward does not affect.
    """
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{name}: expected a module that is not compiled, got {type(model).__name__}; compile "
            "the adapter around it instead"
        )
