# SPDX-License-Identifier: Apache-2.0
"""What the other projects' functions and modules have in common."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks, _dispatch, _ops
from .._names import renamed
from ..functional import (
    grow,
    level_table,
    ms_deform_attn,
    ms_deform_attn_from_offsets,
    points_dtype,
)
from ..linear import project
from ..modules import check_projected, initial_offsets, offsets_and_logits
from ..reference import compute_dtype

SpatialShapes = _checks.SpatialShapes

# For functions that say of both whose they are.
value_names = renamed(
    spatial_shapes="value_spatial_shapes", level_start_index="value_level_start_index"
)


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
    """Locations or weights of 16 bits in the dtype of arithmetic, unless value is of that dtype.

    What is no tensor is left to the operator's checks.
    """
    given = isinstance(tensor, Tensor) and isinstance(value, Tensor)
    if given and tensor.dtype in _checks.SIXTEEN_BITS and tensor.dtype != value.dtype:
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
    for name, tensor, layout in (
        ("value", value, "B, S, M, D"),
        ("sampling_locations", sampling_locations, "B, Q, M, points, 2"),
        ("attention_weights", attention_weights, "B, Q, M, points"),
    ):
        _checks.is_tensor(name, tensor)
        _checks.rank(name, tensor, layout)
    sizes, starts = _checks.levels(spatial_shapes, level_start_index, value.shape[1])
    num_points = points_of_levels(num_points, len(sizes))
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
        torch.unflatten(sampling_locations, 3, (len(levels), group)),
        torch.unflatten(attention_weights, 3, (len(levels), group)),
        [starts[level] for level in levels],
    )


def points_of_levels(num_points: Sequence[int], levels: int) -> list[int]:
    """The number of points of each level as a list, checked.

    Raises:
        TypeError: no sequence.
        ValueError: not one positive integer for each level.
    """
    counts = _checks.integers("num_points_list", num_points)
    if len(counts) != levels or min(counts) < 1:
        raise ValueError(
            f"num_points_list: expected {levels} positive numbers (levels in spatial_shapes), "
            f"got {counts}"
        )
    return counts


def sample_backward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `sample` for compiled extensions, which are called without autograd.

    Args:
        value: as in `sample`, like the next four.
        spatial_shapes: see there.
        level_start_index: see there.
        sampling_locations: see there.
        attention_weights: see there.
        grad_output: [B, Q, M * D], dtype and device of value.

    Returns:
        The gradients of value, sampling_locations and attention_weights, in their dtypes.

    Raises:
        TypeError: a tensor is none.
        ValueError: sizes, dtypes or devices disagree.
    """
    for name, tensor in (
        ("value", value),
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
        ("grad_output", grad_output),
    ):
        _checks.is_tensor(name, tensor)
    _checks.rank("value", value, "B, S, M, D")
    sizes, starts = _checks.levels(spatial_shapes, level_start_index, value.shape[1])
    points = widened(value, sampling_locations)
    weights = widened(value, attention_weights)
    _checks.ms_deform_attn(value, len(sizes), points, weights)
    _checks.dtype("grad_output", grad_output, (value.dtype,), " (that of value)")
    _checks.device("grad_output", grad_output, value.device, "value")
    _checks.shape(
        "grad_output",
        grad_output,
        (value.shape[0], points.shape[1], value.shape[2] * value.shape[3]),
        "value and sampling_locations",
    )
    widest = points_dtype(value, points, weights)
    op = _dispatch.choose("auto", "ms_deform_attn", value.device.type, value.dtype, len(sizes))
    backward = f"{op}_backward"
    if torch.are_deterministic_algorithms_enabled():
        backward = _ops.deterministic_backward("ms_deform_attn", op, value)
    pixels = value.shape[1]
    flat, starts, grows = level_table(sizes, starts, pixels)
    grads = getattr(torch.ops.vitadapter_ops, backward)(
        grad_output,
        grow(value)[0] if grows else value,
        flat,
        starts,
        points.to(widest),
        weights.to(widest),
        True,
        True,
        True,
    )
    grad_value, grad_locations, grad_weights = grads
    return (
        grad_value[:, :pixels] if grows else grad_value,
        grad_locations.to(sampling_locations.dtype),
        grad_weights.to(attention_weights.dtype),
    )


def project_value(module: nn.Module, value: Tensor) -> Tensor:
    """The module's value_proj of value [B, S, C].

    Raises:
        ValueError: value has another dtype than the layer.
    """
    layer = module.get_submodule("value_proj")
    try:
        return project(layer, value)
    except RuntimeError as error:
        check_projected("value", value, "value_proj", layer, error)
        raise


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
    by_level: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What the modules do between the projections of value and output.

    Offsets and logits from the query, then locations, softmax and sampling in one step. Where the
    weights are returned and get a gradient, softmax is a step of its own: the output has to depend
    on the very tensor that is returned, for gradients to reach it.

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
        padding: [B, S] bool, True where the value is padding and reads as zero.
        return_weights: whether anyone wants the weights.
        by_level: return them as [B, Q, M, L, P]; all levels have P points.

    Returns:
        [B, Q, M * D] in the dtype of value, and the weights [B, Q, M, sum(num_points)] in the dtype
        that softmax would give, or None.

    Raises:
        TypeError: a tensor is none.
        ValueError: sizes, dtypes or devices disagree; in the names of these arguments, but for
            `padding_mask`.
    """
    check_reference_points(reference_points)
    _checks.level_count(spatial_shapes, len(num_points), "of the module")
    try:
        offsets, logits = offsets_and_logits(module, query)
    except RuntimeError as error:
        layer = module.get_submodule("sampling_offsets")
        check_projected("query", query, "sampling_offsets", layer, error)
        raise
    # As autocast does before a softmax, except on CPUs.
    device = value.device.type
    if return_weights and device != "cpu" and torch.is_autocast_enabled(device):
        logits = logits.to(compute_dtype(logits.dtype))
    total = sum(num_points)
    heads = logits.shape[-1] // total
    value = torch.unflatten(value, -1, (heads, -1))
    offsets = torch.unflatten(offsets, -1, (heads, total, 2))
    logits = torch.unflatten(logits, -1, (heads, total))
    if return_weights and logits.requires_grad:
        return _attend_in_steps(
            sample_lists, value, spatial_shapes, reference_points, offsets, logits, num_points,
            offset_scale, padding, by_level, level_start_index,
        )  # fmt: skip
    scale: float | Tensor | None = None
    # Half a box per point is the operator's default.
    if reference_points.shape[-1] == 4 and offset_scale != 0.5:
        scale = shares(logits.to(compute_dtype(value.dtype)), num_points, offset_scale)
    result = ms_deform_attn_from_offsets(
        value,
        spatial_shapes,
        reference_points,
        offsets,
        logits,
        level_start_index=level_start_index,
        padding_mask=padding,
        points_per_level=num_points,
        offset_scale=scale,
        return_weights=return_weights,
    )
    if isinstance(result, Tensor):
        return result, None
    output, weights = result
    return output, torch.unflatten(weights, -1, (len(num_points), -1)) if by_level else weights


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
    check_reference_points(reference_points)
    _checks.level_count(spatial_shapes, len(num_points), "of the module")
    # Two products: from one, the offsets would get a gradient of zero instead of none, and
    # optimizers tell the two apart.
    layers: Any = module
    offsets, logits = layers.sampling_offsets(query), layers.attention_weights(query)
    total = sum(num_points)
    heads = logits.shape[-1] // total
    return _attend_in_steps(
        partial(function, method="discrete"),
        torch.unflatten(value, -1, (heads, -1)),
        spatial_shapes,
        reference_points,
        torch.unflatten(offsets, -1, (heads, total, 2)),
        torch.unflatten(logits, -1, (heads, total)),
        num_points,
        offset_scale,
        padding,
        False,
    )


def _attend_in_steps(
    function: Callable[..., Tensor],
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    num_points: Sequence[int],
    offset_scale: float,
    padding: Tensor | None,
    by_level: bool,
    *starts: Sequence[int] | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax, locations, then `function`; the output, and the weights that it was made from."""
    batch, pixels = value.shape[:2]
    if padding is not None:
        _checks.padding_mask(padding, batch, pixels)
        _checks.device("padding_mask", padding, value.device, "value")
        value = value.masked_fill(padding[..., None, None], 0.0)
    if isinstance(spatial_shapes, Tensor) and not torch.compiler.is_compiling():
        spatial_shapes = _checks.pairs(spatial_shapes)  # read back once for all
    compute = compute_dtype(value.dtype)
    weights = logits.softmax(-1, dtype=compute).to(logits.dtype)
    if by_level:
        weights = torch.unflatten(weights, -1, (len(num_points), -1))
    points = locations(
        reference_points, offsets.to(compute), spatial_shapes, num_points, offset_scale
    )
    # What is returned, and not another view of it: it is what people ask the gradient of.
    used = weights.flatten(3)
    return function(value, spatial_shapes, points, used, num_points, *starts), weights


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
    rows = _checks.pairs(spatial_shapes)
    batch, queries = sampling_offsets.shape[:2]
    _checks.device("reference_points", reference_points, sampling_offsets.device, "query")
    _checks.reference_points(reference_points, batch, queries, len(num_points))
    levels, coordinates = reference_points.shape[2:]
    if levels > 1:
        # [B, Q, L, C] -> [B, Q, sum(num_points), C], every level as often as it has points.
        columns = [
            reference_points[:, :, level : level + 1].expand(-1, -1, points, -1)
            for level, points in enumerate(num_points)
        ]
        reference_points = torch.cat(columns, 2)
    reference_points = reference_points.unsqueeze(2)
    # Filled on the device, each side once: a tensor made from Python numbers would be copied from
    # the host, and every fill is a launch on a GPU.
    if coordinates == 2:
        filled = [sampling_offsets.new_full((1,), side) for row in rows for side in row[::-1]]
        sides = torch.cat(filled).view(-1, 1, 2)
        each = [side.expand(points, 2) for side, points in zip(sides, num_points, strict=True)]
        return reference_points + sampling_offsets / torch.cat(each)
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


def check_tokens(
    module: nn.Module, query: Tensor, value: Tensor, *, batch_first: bool = True
) -> None:
    """Checks what a module projects: query [B, Q, C], value [B, S, C].

    Args:
        module: has the layer `sampling_offsets`, and `value_proj` unless value is not projected.
        query: what offsets and logits are made from.
        value: what is sampled.
        batch_first: B before Q and S; else after it.

    Raises:
        TypeError: not a tensor.
        ValueError: rank, dtype, width, batch or device is not as it should be.
    """
    batch = 0 if batch_first else 1
    for name, tensor, length, layer in (
        ("query", query, "Q", "sampling_offsets"),
        ("value", value, "S", "value_proj"),
    ):
        _checks.is_tensor(name, tensor)
        layout = f"B, {length}, C" if batch_first else f"{length}, B, C"
        _checks.rank(name, tensor, layout)
        _checks.dtype(name, tensor, _checks.FLOATING)
        # Layers that take the place of a Linear may not say how wide their input is.
        projection = getattr(module, layer, module.get_submodule("sampling_offsets"))
        width = getattr(projection, "in_features", tensor.shape[2])
        if tensor.shape[2] != width:
            raise ValueError(
                f"{name}: expected {width} channels [{layout}], got shape {list(tensor.shape)}"
            )
    _checks.device("query", query, value.device, "value")
    if query.shape[batch] != value.shape[batch]:
        raise ValueError(
            f"query: expected {value.shape[batch]} images (from value), "
            f"got shape {list(query.shape)}"
        )


def check_reference_points(points: Tensor) -> None:
    """Checks what does not depend on other arguments.

    Raises:
        TypeError: not a tensor.
        ValueError: not a floating one of four dimensions.
    """
    _checks.is_tensor("reference_points", points)
    _checks.rank("reference_points", points, "B or 1, Q, L or 1, 2 or 4")
    _checks.dtype("reference_points", points, _checks.FLOATING)


def check_added(name: str, tensor: Tensor, query: Tensor) -> None:
    """Checks what is added to query, or to what is shaped as query.

    Raises:
        TypeError: not a tensor.
        ValueError: not a floating one on query's device, or of a shape that query can not take.
    """
    _checks.is_tensor(name, tensor)
    _checks.dtype(name, tensor, _checks.FLOATING)
    _checks.device(name, tensor, query.device, "query")
    own = (1,) * (query.dim() - tensor.dim()) + tuple(tensor.shape)
    if len(own) != query.dim() or any(
        size not in (1, wanted) for size, wanted in zip(own, query.shape, strict=True)
    ):
        raise ValueError(
            f"{name}: expected {list(query.shape)} (from query), got {list(tensor.shape)}"
        )


def check_sizes(**sizes: int) -> None:
    """Raises what `_checks.positive` raises for any of a constructor's sizes."""
    for name, size in sizes.items():
        _checks.positive(name, size)


def check_number(name: str, number: float) -> None:
    """Raises TypeError unless `number` is one, ValueError unless it is finite."""
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {number!r}")
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")


def check_heads(width: int, heads: int, name: str) -> None:
    """Raises ValueError unless `heads` divides `width`, as the projects' own modules do."""
    if width % heads != 0:
        raise ValueError(f"num_heads: expected a divisor of {name} = {width}, got {heads}")
