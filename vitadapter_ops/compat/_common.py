# SPDX-License-Identifier: Apache-2.0
"""What the other projects' functions and modules have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..functional import ms_deform_attn, ms_deform_attn_from_offsets
from ..modules import MSDeformAttn
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


def offsets_and_logits(module: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
    """The module's `sampling_offsets` and `attention_weights` of a query, in one product if it can.

    Not where a layer's forward was replaced, as accelerate does to fetch offloaded weights.
    """
    layers: Any = module
    offsets, logits = layers.sampling_offsets, layers.attention_weights
    if "forward" in vars(offsets) or "forward" in vars(logits):
        return offsets(query), logits(query)
    return MSDeformAttn._offsets_and_logits(layers, query)


def attend(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int],
    offset_scale: float = 0.5,
    level_start_index: Sequence[int] | Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """What the modules do between their projections: locations, softmax and sampling, in one step.

    Args:
        value: [B, S, M * D] as the projection gives it.
        spatial_shapes: (H, W) of each level.
        reference_points: [B or 1, Q, L or 1, 2]: (x, y) as fractions, offsets in pixels; or
            [..., 4]: (x, y, w, h), offsets in units of offset_scale / points of the box.
        sampling_offsets: [B, Q, M * sum(num_points) * 2] as the projection gives them.
        attention_logits: [B, Q, M * sum(num_points)] likewise.
        num_points: points on each level.
        offset_scale: with boxes, how much of one the points reach over.
        level_start_index: as in `sample`.
        padding: [B, S], nonzero where the value is padding and reads as zero.

    Returns:
        [B, Q, M * D], dtype of value.
    """
    return _attend(
        value,
        spatial_shapes,
        reference_points,
        sampling_offsets,
        attention_logits,
        num_points,
        offset_scale,
        level_start_index,
        padding,
        False,
    )[0]


def attend_with_weights(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int],
    offset_scale: float = 0.5,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend`, and the weights [B, Q, M, sum(num_points)] in the dtype that softmax would give."""
    # As autocast does before a softmax, except on CPUs.
    if value.device.type != "cpu" and torch.is_autocast_enabled(value.device.type):
        attention_logits = attention_logits.to(compute_dtype(attention_logits.dtype))
    return _attend(
        value,
        spatial_shapes,
        reference_points,
        sampling_offsets,
        attention_logits,
        num_points,
        offset_scale,
        None,
        padding,
        True,
    )


def _attend(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int],
    offset_scale: float,
    level_start_index: Sequence[int] | Tensor | None,
    padding: Tensor | None,
    return_weights: bool,
) -> tuple[Tensor, Tensor]:
    total = sum(num_points)
    heads = attention_logits.shape[-1] // total
    batch, queries, _ = attention_logits.shape
    scale: float | Tensor | None = None
    # Half a box per point is the operator's default.
    if reference_points.shape[-1] == 4 and offset_scale != 0.5:
        like = attention_logits.to(compute_dtype(value.dtype))
        scale = shares(like, num_points, offset_scale)
    result = ms_deform_attn_from_offsets(
        torch.unflatten(value, -1, (heads, -1)),
        spatial_shapes,
        reference_points,
        sampling_offsets.view(batch, queries, heads, total, 2),
        attention_logits.view(batch, queries, heads, total),
        level_start_index=level_start_index,
        padding_mask=None if padding is None else padding.to(torch.bool),
        points_per_level=num_points,
        offset_scale=scale,
        return_weights=return_weights,
    )
    return result if isinstance(result, tuple) else (result, attention_logits)


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


def star_of_offsets(heads: int, num_points: Sequence[int]) -> Tensor:
    """The published initial offsets [M * sum(num_points) * 2]: a ray of 1, 2, ... pixels a head."""
    angle = torch.arange(heads, dtype=torch.float32, device="cpu") * (2.0 * math.pi / heads)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.cat([torch.arange(1, points + 1, device="cpu") for points in num_points])
    return (direction[:, None] * steps[:, None]).flatten()


def init_like_deformable_detr(module: nn.Module, heads: int, num_points: Sequence[int]) -> None:
    """Initialises the projections that `module` has, as Deformable DETR does."""
    for name in ("sampling_offsets", "attention_weights"):
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        if name == "sampling_offsets":
            with torch.no_grad():
                linear.bias.copy_(star_of_offsets(heads, num_points))
    for name, linear in module.named_children():
        if name in ("value_proj", "output_proj"):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


def check_heads(width: int, heads: int, name: str) -> None:
    """Raises ValueError unless `heads` divides `width`, as the projects' own modules do."""
    if width % heads != 0:
        raise ValueError(f"num_heads: expected a divisor of {name} = {width}, got {heads}")
