# SPDX-License-Identifier: Apache-2.0
"""What the other projects' functions and modules have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..functional import ms_deform_attn, ms_deform_attn_from_offsets
from ..modules import initial_offsets, offsets_and_logits
from ..reference import compute_dtype

SpatialShapes = _checks.SpatialShapes


def sample(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_start_index: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """`ms_deform_attn` for callers who mix precisions: 16-bit points beside wider values widen.

    Args:
        value: [B, S, M, D].
        spatial_shapes: (H, W) of each level.
        sampling_locations: [B, Q, M, L, P, 2].
        attention_weights: [B, Q, M, L, P].
        level_start_index: first pixel of each level; None: one level after the other.

    Returns:
        [B, Q, M * D], dtype of value.
    """
    return ms_deform_attn(
        value,
        spatial_shapes,
        widened(value, sampling_locations),
        widened(value, attention_weights),
        level_start_index=level_start_index,
    )


def widened(value: Tensor, tensor: Tensor) -> Tensor:
    """Locations or weights of 16 bits in the dtype of arithmetic, unless value is of that dtype."""
    if tensor.dtype in (torch.float16, torch.bfloat16) and tensor.dtype != value.dtype:
        return tensor.to(compute_dtype(value.dtype))
    return tensor


def sample_lists(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    level_start_index: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """`sample` with its own number of points on each level, the levels' points in one row.

    No padding: a level with n points is listed as n / g levels of g points over the same pixels, g
    being the greatest common divisor of all.

    Args:
        value: [B, S, M, D].
        spatial_shapes: (H, W) of each level.
        sampling_locations: [B, Q, M, sum(num_points), 2].
        attention_weights: [B, Q, M, sum(num_points)].
        num_points: points on each level.
        level_start_index: as in `sample`.

    Returns:
        [B, Q, M * D], dtype of value.
    """
    _checks.rank("value", value, "B, S, M, D")
    _checks.rank("sampling_locations", sampling_locations, "B, Q, M, points, 2")
    _checks.rank("attention_weights", attention_weights, "B, Q, M, points")
    sizes, starts = _checks.levels(spatial_shapes, level_start_index, value.shape[1])
    if len(num_points) != len(sizes) or min(num_points) < 1:
        raise ValueError(
            f"num_points_list: expected {len(sizes)} positive numbers (levels in spatial_shapes), "
            f"got {list(num_points)}"
        )
    for name, points in (
        ("sampling_locations", sampling_locations.shape[3]),
        ("attention_weights", attention_weights.shape[3]),
    ):
        if points != sum(num_points):
            raise ValueError(
                f"{name}: expected {sum(num_points)} points (sum of num_points_list), got {points}"
            )
    group = math.gcd(*num_points)
    levels = [level for level, points in enumerate(num_points) for _ in range(points // group)]
    return sample(
        value,
        [sizes[level] for level in levels],
        torch.unflatten(sampling_locations, 3, (-1, group)),
        torch.unflatten(attention_weights, 3, (-1, group)),
        [starts[level] for level in levels],
    )


def attend(
    module: nn.Module,
    query: Tensor,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    num_points: Sequence[int],
    *,
    offset_scale: float = 0.5,
    level_start_index: Sequence[int] | Tensor | None = None,
    padding: Tensor | None = None,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What the modules do between the projections of value and output.

    Offsets and logits from the query, then locations, softmax and sampling in one step.

    Args:
        module: has the layers `sampling_offsets` and `attention_weights`.
        query: [B, Q, C].
        value: [B, S, M * D] as the projection gives it.
        spatial_shapes: (H, W) of each level.
        reference_points: [B or 1, Q, L or 1, 2]: (x, y) as fractions, offsets in pixels; or
            [..., 4]: (x, y, w, h), offsets in units of offset_scale / points of the box.
        num_points: points on each level.
        offset_scale: with boxes, how much of one the points reach over.
        level_start_index: as in `sample`.
        padding: [B, S], nonzero where the value is padding and reads as zero.
        return_weights: whether anyone wants the weights.

    Returns:
        [B, Q, M * D] in the dtype of value, and the weights [B, Q, M, sum(num_points)] in the dtype
        that softmax would give, or None.
    """
    offsets, logits = offsets_and_logits(module, query)
    # As autocast does before a softmax, except on CPUs.
    device = value.device.type
    if return_weights and device != "cpu" and torch.is_autocast_enabled(device):
        logits = logits.to(compute_dtype(logits.dtype))
    scale: float | Tensor | None = None
    # Half a box per point is the operator's default.
    if reference_points.shape[-1] == 4 and offset_scale != 0.5:
        scale = shares(logits.to(compute_dtype(value.dtype)), num_points, offset_scale)
    shape = (*logits.shape[:2], -1, sum(num_points))
    result = ms_deform_attn_from_offsets(
        torch.unflatten(value, -1, (logits.shape[-1] // sum(num_points), -1)),
        spatial_shapes,
        reference_points,
        offsets.view(*shape, 2),
        logits.view(shape),
        level_start_index=level_start_index,
        padding_mask=None if padding is None else padding.to(torch.bool),
        points_per_level=num_points,
        offset_scale=scale,
        return_weights=return_weights,
    )
    return result if isinstance(result, tuple) else (result, None)


def attend_to_nearest(
    function: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    num_points: Sequence[int],
    *,
    offset_scale: float,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attend` for the method "discrete" of `function`, one of RT-DETRv2's.

    Args:
        function: `functions.deformable_attention_core_func_v2`, or transformers' variant.
        module: as in `attend`, like the others.
        query: see there.
        value: see there.
        spatial_shapes: see there.
        reference_points: see there.
        num_points: see there.
        offset_scale: see there.
        padding: see there.

    Returns:
        As `attend`, always with the weights.
    """
    if padding is not None:
        value = value.masked_fill(padding.to(torch.bool).unsqueeze(-1), 0.0)
    # Two products: from one, the offsets would get a gradient of zero instead of none, and
    # optimizers tell the two apart.
    layers: Any = module
    offsets, logits = layers.sampling_offsets(query), layers.attention_weights(query)
    shape = (*logits.shape[:2], -1, sum(num_points))
    weights = logits.view(shape).softmax(-1)
    points = locations(
        reference_points, offsets.view(*shape, 2), spatial_shapes, num_points, offset_scale
    )
    value = torch.unflatten(value, -1, (weights.shape[2], -1))
    return function(value, spatial_shapes, points, weights, num_points, "discrete"), weights


def shares(like: Tensor, num_points: Sequence[int], offset_scale: float) -> Tensor:
    """offset_scale / points for each point of each level [sum(num_points)], on like's device."""
    return torch.cat([like.new_full((points,), offset_scale / points) for points in num_points])


def locations(
    reference_points: Tensor,
    sampling_offsets: Tensor,
    spatial_shapes: SpatialShapes,
    num_points: Sequence[int],
    offset_scale: float = 0.5,
) -> Tensor:
    """Where `attend` samples, for offsets [B, Q, M, sum(num_points), 2]; shaped as these."""
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    levels, coordinates = reference_points.shape[2:]
    if coordinates not in (2, 4) or levels not in (1, len(num_points)):
        raise ValueError(
            f"reference_points: expected [B, Q, {len(num_points)} or 1, 2 or 4], "
            f"got {list(reference_points.shape)}"
        )
    if levels > 1:
        # [B, Q, L, C] -> [B, Q, sum(num_points), C], every level as often as it has points.
        columns = [
            reference_points[:, :, level : level + 1].expand(-1, -1, points, -1)
            for level, points in enumerate(num_points)
        ]
        reference_points = torch.cat(columns, 2)
    reference_points = reference_points.unsqueeze(2)
    # Filled on the device: a tensor made from Python numbers would be copied from the host.
    if coordinates == 2:
        sides = [
            sampling_offsets.new_full((1,), side)
            for (height, width), points in zip(rows, num_points, strict=True)
            for side in (width, height) * points
        ]
        return reference_points + sampling_offsets / torch.cat(sides).view(-1, 2)
    share = shares(sampling_offsets, num_points, offset_scale).unsqueeze(-1)
    return reference_points[..., :2] + sampling_offsets * share * reference_points[..., 2:]


def init_like_deformable_detr(module: nn.Module, heads: int, num_points: Sequence[int]) -> None:
    """Initialises the projections that `module` has, as Deformable DETR does."""
    for name in ("sampling_offsets", "attention_weights"):
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        if name == "sampling_offsets":
            with torch.no_grad():
                linear.bias.copy_(initial_offsets(heads, num_points))
    for name, linear in module.named_children():
        if name in ("value_proj", "output_proj"):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


def check_heads(width: int, heads: int, name: str) -> None:
    """Raises ValueError unless `heads` divides `width`, as the projects' own modules do."""
    if width % heads != 0:
        raise ValueError(f"num_heads: expected a divisor of {name} = {width}, got {heads}")
