# SPDX-License-Identifier: Apache-2.0
"""The compiled extension of Deformable DETR and of its many copies, without compiling it.

    import vitadapter_ops.compat.msda as MultiScaleDeformableAttention

or, before code that imports the extension by its own name,

    from vitadapter_ops.compat import msda
    msda.install()                      # import MultiScaleDeformableAttention
    msda.install("groundingdino._C")    # from groundingdino import _C

Works on every device and for every dtype of our operator; any positive `im2col_step` is accepted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor

from .. import _checks
from .._names import renamed
from ._common import SpatialShapes, sample, sample_backward
from ._patch import Patch, Replacement

__all__ = ["install", "ms_deform_attn_backward", "ms_deform_attn_forward"]


_named = renamed(sampling_locations="sampling_loc", attention_weights="attn_weight")


@torch.no_grad()
@_named
def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor | None,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """The forward pass; like the compiled one it records no gradient.

    Args:
        value: [B, S, M, D].
        spatial_shapes: [L, 2], (H, W) of each level.
        level_start_index: [L], first pixel of each level; None: one level after the other.
        sampling_loc: [B, Q, M, L, P, 2], (x, y) as fractions.
        attn_weight: [B, Q, M, L, P].
        im2col_step: any positive integer; not needed.

    Returns:
        [B, Q, M * D], dtype of value.

    Raises:
        TypeError: a tensor is none, or an argument of another kind.
        ValueError: sizes, dtypes or devices disagree, or im2col_step is not positive.
    """
    _checks.positive("im2col_step", im2col_step)
    return sample(value, spatial_shapes, sampling_loc, attn_weight, level_start_index)


@torch.no_grad()
@_named
def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor | None,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int = 64,
) -> list[Tensor]:
    """The gradients of `value`, `sampling_loc` and `attn_weight`, each in its tensor's dtype.

    Args:
        value: as in `ms_deform_attn_forward`, like the next four.
        spatial_shapes: see there.
        level_start_index: see there.
        sampling_loc: see there.
        attn_weight: see there.
        grad_output: [B, Q, M * D], dtype and device of value.
        im2col_step: any positive integer; not needed.

    Raises:
        TypeError: a tensor is none, or an argument of another kind.
        ValueError: sizes, dtypes or devices disagree, or im2col_step is not positive.
    """
    _checks.positive("im2col_step", im2col_step)
    return list(
        sample_backward(
            value, spatial_shapes, level_start_index, sampling_loc, attn_weight, grad_output
        )
    )


def install(name: str = "MultiScaleDeformableAttention") -> Patch:
    """Makes `import <name>` find this module's two functions, in this process.

    Call it before the project's own code is imported: what has imported another module by this name
    keeps that. Whatever else a compiled extension of this name would offer (detrex._C has DCNv3)
    raises AttributeError when it is used.

    Args:
        name: "MultiScaleDeformableAttention", "groundingdino._C", "detrex._C" or whatever the code
            imports.

    Returns:
        A handle: `restore()`, or the end of a `with`, puts back what was there, or nothing.

    Raises:
        TypeError: name is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a module, got {type(name).__name__}")
    shim = ModuleType(name, f"ms_deform_attn_forward and ms_deform_attn_backward of {__name__}.")
    shim.__spec__ = ModuleSpec(name, loader=None, origin=__name__)

    def missing(attribute: str) -> None:
        raise AttributeError(
            f"{name} was installed by {__name__}, which has only ms_deform_attn_forward and "
            f"ms_deform_attn_backward, not {attribute}"
        )

    vars(shim).update(
        ms_deform_attn_forward=ms_deform_attn_forward,
        ms_deform_attn_backward=ms_deform_attn_backward,
        __getattr__=missing,
    )
    return Patch([Replacement(sys.modules, name, shim)])
