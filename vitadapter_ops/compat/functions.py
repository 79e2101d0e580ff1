# SPDX-License-Identifier: Apache-2.0
"""The functions that models call for multi-scale deformable attention, under all their names.

Each has the signature of the project that named it and computes with our operator, forward and
backward. `patch_module` puts them in place of a project's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import _checks
from ..reference import compute_dtype
from ._common import SpatialShapes, points_of_levels, sample, sample_lists, value_names
from ._patch import Patch, Replacement

__all__ = [
    "MSDeformAttnFunction",
    "MultiScaleDeformableAttentionFunction",
    "MultiScaleDeformableAttnFunction",
    "deformable_attention_core_func",
    "deformable_attention_core_func_v2",
    "ms_deform_attn_core_pytorch",
    "multi_scale_deformable_attention",
    "multi_scale_deformable_attention_v2",
    "multi_scale_deformable_attn_pytorch",
    "patch_module",
]


class MSDeformAttnFunction:
    """What `torch.autograd.Function` subclasses of this name offer: `apply`, differentiable."""

    @staticmethod
    @value_names
    def apply(
        value: Tensor,
        value_spatial_shapes: SpatialShapes,
        value_level_start_index: Sequence[int] | Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """Multi-scale deformable attention with the arguments of the compiled extension.

        Args:
            value: [B, S, M, D].
            value_spatial_shapes: [L, 2], (H, W) of each level.
            value_level_start_index: [L], first pixel of each level; None: one level after the
                other.
            sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions.
            attention_weights: [B, Q, M, L, P].
            im2col_step: any positive integer; not needed: any batch is computed in one go.

        Returns:
            [B, Q, M * D], dtype of value.

        Raises:
            TypeError: a tensor is none, or an argument of another kind.
            ValueError: sizes, dtypes or devices disagree, or im2col_step is not positive.
        """
        _checks.positive("im2col_step", im2col_step)
        return sample(
            value,
            value_spatial_shapes,
            sampling_locations,
            attention_weights,
            value_level_start_index,
        )


# Names of the same six arguments in mmcv, detrex and GroundingDINO, and in transformers.
MultiScaleDeformableAttnFunction = MSDeformAttnFunction
MultiScaleDeformableAttentionFunction = MSDeformAttnFunction


@value_names
def ms_deform_attn_core_pytorch(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Deformable DETR's reference function, and its copies in Mask2Former, ViT-Adapter, DINOv3.

    Args:
        value: [B, S, M, D].
        value_spatial_shapes: [L, 2], (H, W) of each level; pairs of integers or a tensor.
        sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions.
        attention_weights: [B, Q, M, L, P].

    Returns:
        [B, Q, M * D], dtype of value.
    """
    return sample(value, value_spatial_shapes, sampling_locations, attention_weights)


@value_names
def multi_scale_deformable_attn_pytorch(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`ms_deform_attn_core_pytorch` as mmcv, detrex and GroundingDINO call it."""
    return sample(value, value_spatial_shapes, sampling_locations, attention_weights)


@value_names
def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`ms_deform_attn_core_pytorch` as transformers' Mask2Former and OneFormer call it."""
    return sample(value, value_spatial_shapes, sampling_locations, attention_weights)


@value_names
def deformable_attention_core_func(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`ms_deform_attn_core_pytorch` as RT-DETR calls it."""
    return sample(value, value_spatial_shapes, sampling_locations, attention_weights)


@value_names
def deformable_attention_core_func_v2(
    value: Tensor | Sequence[Tensor],
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """The function of RT-DETRv2 and D-FINE: every level has its own number of points.

    Args:
        value: [B, S, M, D] (RT-DETRv2), or for each level [B, M, D, H * W] (D-FINE).
        value_spatial_shapes: [L, 2], (H, W) of each level.
        sampling_locations: [B, Q, M, sum(num_points_list), 2], (x, y) as fractions.
        attention_weights: [B, Q, M, sum(num_points_list)].
        num_points_list: points on each level.
        method: "default" interpolates; "discrete" takes the nearest pixel, and as in the original
            limits both its coordinates by the height of the level; a location that is not finite
            contributes zero, as with "default".

    Returns:
        [B, Q, M * D], dtype of value.

    Raises:
        TypeError: a tensor is none, or num_points_list no sequence.
        ValueError: sizes, dtypes or devices disagree, or method is none of the two.
    """
    return _sample_v2(
        value_of_levels(value),
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points_list,
        method,
        by_height=True,
    )


@value_names
def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """`deformable_attention_core_func_v2` as transformers' RT-DETRv2 and D-FINE call it.

    "discrete" limits x by the width of the level and y by its height.
    """
    return _sample_v2(
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points_list,
        method,
        by_height=False,
    )


def value_of_levels(value: Tensor | Sequence[Tensor]) -> Tensor:
    """[B, S, M, D] from one tensor [B, M, D, H * W] for each level; a tensor stays what it is.

    Raises:
        TypeError: neither a tensor nor a sequence of tensors.
        ValueError: ranks, sizes, dtypes or devices of the levels differ.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, Sequence) or not value:
        got = "None" if value is None else type(value).__name__
        raise TypeError(f"value: expected a torch.Tensor, or one for each level, got {got}")
    for level, pixels in enumerate(value):
        name = f"value[{level}]"
        _checks.is_tensor(name, pixels)
        _checks.rank(name, pixels, "B, M, D, H * W")
        _checks.dtype(name, pixels, (value[0].dtype,), " (that of the first level)")
        _checks.device(name, pixels, value[0].device, "the first level")
        _checks.shape(
            name, pixels, (*value[0].shape[:3], pixels.shape[3]), "the first level but for H * W"
        )
    return torch.cat(list(value), -1).permute(0, 3, 1, 2)


def _sample_v2(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    method: str,
    by_height: bool,
) -> Tensor:
    """Both functions of RT-DETRv2; "discrete" limits x by the height where `by_height`."""
    if method == "discrete":
        _checks.is_tensor("sampling_locations", sampling_locations)
        _checks.dtype("sampling_locations", sampling_locations, _checks.FLOATING)
        sizes = _checks.pairs(spatial_shapes)
        counts = points_of_levels(num_points, len(sizes))
        # Others are refused below.
        if sampling_locations.shape[3:] == (sum(counts), 2):
            sampling_locations = _nearest(sampling_locations, sizes, counts, by_height)
    elif method != "default":
        raise ValueError(f"method: expected 'default' or 'discrete', got {method!r}")
    return sample_lists(value, spatial_shapes, sampling_locations, attention_weights, num_points)


def _nearest(
    locations: Tensor, sizes: list[tuple[int, int]], num_points: list[int], by_height: bool
) -> Tensor:
    """The centre of the pixel that each location is rounded to, within its level.

    A bilinear sample at a pixel's centre is that pixel. Without a gradient, as rounding has none.
    What is not finite has no nearest pixel and becomes NaN, which contributes zero.
    """
    centres = []
    compute = compute_dtype(locations.dtype)
    levels = torch.split(locations.detach().to(compute), num_points, 3)
    for level, (height, width) in zip(levels, sizes, strict=True):
        level = level.masked_fill(~level.isfinite(), math.nan)
        last = (height if by_height else width) - 1
        # Limited before the fraction is cut off: numbers beyond the integers have no rounding.
        column = (level[..., 0] * width + 0.5).clamp(0, last).trunc()
        row = (level[..., 1] * height + 0.5).clamp(0, height - 1).trunc()
        x, y = (column + 0.5) / width, (row + 0.5) / height
        centres.append(torch.stack((x, y), -1))
    return torch.cat(centres, 3)


def patch_module(module: ModuleType) -> Patch:
    """Puts our functions in place of those that `module` has under the same names.

    For code that is copied from one repository to the next and installed from none: pass the module
    that defines the function, and each module that imported it by name. A project whose reference
    function has other arguments under one of these names needs its own file of this package.

    Args:
        module: an imported module.

    Returns:
        A handle: `restore()` puts the originals back, and so does the end of a `with`.

    Raises:
        TypeError: not a module.
        ValueError: the module has none of these names.
    """
    if not isinstance(module, ModuleType):
        raise TypeError(f"module: expected an imported module, got {type(module).__name__}")
    ours = globals()
    names = [name for name in __all__ if name != "patch_module" and name in vars(module)]
    if not names:
        raise ValueError(
            f"module: expected one with at least one of {', '.join(__all__[:-1])}; "
            f"{module.__name__} has none"
        )
    return Patch([Replacement(module, name, ours[name]) for name in names])
