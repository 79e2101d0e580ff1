# SPDX-License-Identifier: Apache-2.0
"""The functions that models call for multi-scale deformable attention, under all their names.

Each has the signature of the project that named it and computes with our operator, forward and
backward. `patch_module` puts them in place of a project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..reference import compute_dtype
from ._common import SpatialShapes, sample, sample_lists
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
            value_level_start_index: [L], first pixel of each level.
            sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions.
            attention_weights: [B, Q, M, L, P].
            im2col_step: accepted and not needed: any batch is computed in one go.

        Returns:
            [B, Q, M * D], dtype of value.
        """
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


def multi_scale_deformable_attn_pytorch(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`ms_deform_attn_core_pytorch` as mmcv, detrex and GroundingDINO call it."""
    return sample(value, value_spatial_shapes, sampling_locations, attention_weights)


def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`ms_deform_attn_core_pytorch` as transformers' Mask2Former and OneFormer call it."""
    return sample(value, value_spatial_shapes, sampling_locations, attention_weights)


def deformable_attention_core_func(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`ms_deform_attn_core_pytorch` as RT-DETR calls it."""
    return sample(value, value_spatial_shapes, sampling_locations, attention_weights)


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
            limits both its coordinates by the height of the level.

    Returns:
        [B, Q, M * D], dtype of value.
    """
    if not isinstance(value, Tensor):
        value = torch.cat(list(value), -1).permute(0, 3, 1, 2)
    if method == "discrete":
        sides = [(height, height) for height, _ in _pairs(value_spatial_shapes)]
        sampling_locations = _nearest(
            sampling_locations, value_spatial_shapes, num_points_list, sides
        )
    else:
        _check_method(method)
    return sample_lists(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list
    )


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
    if method == "discrete":
        sampling_locations = _nearest(
            sampling_locations, value_spatial_shapes, num_points_list, _pairs(value_spatial_shapes)
        )
    else:
        _check_method(method)
    return sample_lists(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list
    )


def _check_method(method: str) -> None:
    if method != "default":
        raise ValueError(f"method: expected 'default' or 'discrete', got {method!r}")


def _pairs(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(height, width) for height, width in rows]


def _nearest(
    locations: Tensor,
    spatial_shapes: SpatialShapes,
    num_points: Sequence[int],
    limits: Sequence[tuple[int, int]],
) -> Tensor:
    """The centre of the pixel that each location is rounded to, within `limits` (H, W) of a level.

    A bilinear sample at a pixel's centre is that pixel. Without a gradient, as rounding has none.
    """
    centres = []
    compute = compute_dtype(locations.dtype)
    levels = torch.split(locations.detach().to(compute), list(num_points), 3)
    for level, (height, width), (rows, columns) in zip(
        levels, _pairs(spatial_shapes), limits, strict=True
    ):
        x = (level[..., 0] * width + 0.5).to(torch.int64).clamp(0, columns - 1)
        y = (level[..., 1] * height + 0.5).to(torch.int64).clamp(0, rows - 1)
        pixel = torch.stack((x, y), -1).to(compute) + 0.5
        centres.append(pixel / pixel.new_tensor([width, height]))
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
        ValueError: the module has none of these names.
    """
    ours = globals()
    names = [name for name in __all__ if name != "patch_module" and name in vars(module)]
    if not names:
        raise ValueError(
            f"module: expected one with at least one of {', '.join(__all__[:-1])}; "
            f"{module.__name__} has none"
        )
    return Patch([Replacement(module, name, ours[name]) for name in names])
