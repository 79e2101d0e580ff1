# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _ops
from ._call_cache import CallCache
from .reference import compute_dtype


class _Plan(NamedTuple):
    """What the checks of a call found out; a call of the same kind needs no more of them."""

    call: Callable[..., Any]  # the operator
    levels: tuple[list[int], ...]  # its arguments that describe the levels
    dtype: torch.dtype  # of the points
    grows: bool = False  # value, and the mask over it, get a pixel more


# Checks and the choice of a backend take three times as long as a look-up.
_plans: CallCache[_Plan] = CallCache()


def points_dtype(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> torch.dtype:
    """The one dtype in which kernels take locations and weights, neither of which it narrows."""
    # Each of the two has the dtype of value, or is fp32. Not by torch.promote_types, which a graph
    # of torch.export keeps, and which torch.compile cannot take there.
    if value.dtype != torch.float64 and sampling_locations.dtype == attention_weights.dtype:
        return sampling_locations.dtype
    return compute_dtype(value.dtype)


def level_table(
    sizes: list[tuple[int, int]], starts: list[int], pixels: int
) -> tuple[list[int], list[int], bool]:
    """The operators' spatial_shapes and level_start_index, and whether value has to grow.

    Kernels need a pixel on every level. One without gets a pixel of zeros behind all others: its
    points contribute nothing and get a gradient of zero.
    """
    empty = [height * width == 0 for height, width in sizes]
    if any(empty):
        sizes = [(1, 1) if none else size for none, size in zip(empty, sizes, strict=True)]
        starts = [pixels if none else start for none, start in zip(empty, starts, strict=True)]
    return [side for size in sizes for side in size], starts, any(empty)


def grow(value: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Both with a pixel of zeros more."""
    value = torch.nn.functional.pad(value, (0, 0, 0, 0, 0, 1))
    if padding_mask is not None:
        padding_mask = torch.nn.functional.pad(padding_mask, (0, 1))
    return value, padding_mask


def _only_reference(plain: bool, backend: str, *tensors: Tensor) -> None:
    """Raises BackendUnavailable where a kernel is asked for, and torch is to differentiate."""
    if plain or backend in ("auto", "reference"):
        return
    if _ops.is_differentiated_by_torch(*tensors):
        raise _dispatch.BackendUnavailable(
            f"backend {backend!r} cannot run: under torch.func's derivatives and in forward mode "
            "only 'reference' can, which 'auto' takes"
        )


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: _checks.SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    level_start_index: Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, eq. 2).

    Each output is a weighted sum of bilinear samples, over all levels l and points p:

        out[b, q, m] = sum_lp attention_weights[b, q, m, l, p]
                       * bilinear(value[b, level l, m], at sampling_locations[b, q, m, l, p])

    B batch, S pixels of all levels, Q queries, M heads, D channels per head, L levels, P points.
    The centre of pixel (i, j) is at ((j + 0.5) / W, (i + 0.5) / H) and the map is zero outside, as
    in `grid_sample(align_corners=False, padding_mode="zeros")`. A location that is not finite
    contributes zero and gets a zero gradient. Arithmetic is fp32, or fp64 for fp64. Differentiable
    once in value, locations and weights; gradients that are not required are not computed. Under
    torch.func's transforms and in forward mode the reference computes, and torch differentiates it,
    as often as asked for. Bitwise repeatable under `torch.use_deterministic_algorithms(True)`, and
    always on a CPU.

    Args:
        value: [B, S, M, D], float64, float32, float16 or bfloat16; levels concatenated along S,
            each row by row.
        spatial_shapes: (H, W) of each level in pixels, a sequence; integers may be numpy's, or
            tensors without a dimension. A tensor [L, 2] works too, at the cost of reading it back
            to the host: one synchronisation per call when it lies on a GPU.
        sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions of the level's width and height,
            any value. dtype of value, or float32.
        attention_weights: [B, Q, M, L, P], dtype of value, or float32. Not normalised here.
        level_start_index: first pixel of each level along S, L integers or a tensor (read back like
            spatial_shapes). None: one level after the other, which must then fill S.
        backend: "auto" takes the first that can run of "cuda", "triton", "cpu", "reference".

    Returns:
        [B, Q, M * D], dtype of value.

    Raises:
        TypeError: an argument that should be a tensor, a sequence or a name is none.
        ValueError: ranks, shapes, dtypes or devices disagree, or no backend has this name; the
            message names the argument, what was expected and what came.
        BackendUnavailable: the backend that was asked for cannot run; the message says why.
        NotImplementedError: a gradient of a gradient was asked for, outside torch.func.
    """
    backend = _dispatch.wanted(backend)
    kind = None
    if _ops.is_plain():
        tensors = (value, sampling_locations, attention_weights)
        kind = _checks.kind(tensors, spatial_shapes, level_start_index, None, backend)
    plan = None if kind is None else _plans.get(kind)
    if plan is None:
        plan = _plan(
            value,
            spatial_shapes,
            sampling_locations,
            attention_weights,
            level_start_index,
            backend,
            kind is not None,
        )
        if kind is not None:
            _plans[kind] = plan
    if plan.grows:
        value, _ = grow(value)
    return plan.call(
        value,
        *plan.levels,
        _as(plan.dtype, sampling_locations),
        _as(plan.dtype, attention_weights),
    )


def _plan(
    value: Tensor,
    spatial_shapes: _checks.SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_start_index: Sequence[int] | Tensor | None,
    backend: str,
    plain: bool,
) -> _Plan:
    """Checks the arguments of `ms_deform_attn`."""
    _checks.is_tensor("value", value)
    _checks.is_tensor("sampling_locations", sampling_locations)
    _checks.is_tensor("attention_weights", attention_weights)
    _checks.rank("value", value, "B, S, M, D")
    sizes, starts = _checks.levels(spatial_shapes, level_start_index, value.shape[1])
    _checks.ms_deform_attn(value, len(sizes), sampling_locations, attention_weights)
    widest = points_dtype(value, sampling_locations, attention_weights)
    op = _dispatch.choose(backend, "ms_deform_attn", value.device.type, value.dtype, len(sizes))
    _only_reference(plain, backend, value, sampling_locations, attention_weights)
    flat, starts, grows = level_table(sizes, starts, value.shape[1])
    return _Plan(_ops.caller(op, plain), (flat, starts), widest, grows)


def ms_deform_attn_from_offsets(
    value: Tensor,
    spatial_shapes: _checks.SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    level_start_index: Sequence[int] | Tensor | None = None,
    padding_mask: Tensor | None = None,
    points_per_level: Sequence[int] | None = None,
    offset_scale: float | Tensor | None = None,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-scale deformable attention from what a model's Linear layers produce, in one step.

    Locations, softmax and sampling together (Zhu et al., ICLR 2021, eq. 2 and sec. 4.1). With the
    points of all levels side by side, K of them, and k one of level l:

        weights[b, q, m] = softmax(attention_logits[b, q, m])                       over all K
        location_k = reference_xy[b, q, l] + sampling_offsets[b, q, m, k] / (W_l, H_l)
                  or reference_xy + sampling_offsets * offset_scale[k] * reference_wh  for boxes
        out[b, q, m] = sum_k weights_k * bilinear(value_l[b, :, m], at location_k)

    Offsets and logits may be fp16 or bf16: they are widened to fp32 in registers, and every
    location and weight is computed in fp32 (fp64 for fp64) and never stored. Kept for the backward
    are the arguments alone. Conventions, bitwise repeatability and first-order gradients are as in
    `ms_deform_attn`; reference_points get a gradient too.

    Args:
        value: [B, S, M, D], float64, float32, float16 or bfloat16; levels concatenated along S.
        spatial_shapes: (H, W) of each level in pixels; a tensor [L, 2] costs a synchronisation when
            it lies on a GPU.
        reference_points: [B or 1, Q, L or 1, 2]: (x, y) as fractions of the map; or [..., 4]: boxes
            (x, y, width, height), likewise. Any floating dtype; fp32 is what keeps its accuracy.
        sampling_offsets: [B, Q, M, K, 2], (x, y), in pixels of the level beside points, and in
            boxes times offset_scale beside boxes. Any floating dtype (fp64 only with fp64 value),
            any stride over B and Q.
        attention_logits: [B, Q, M, K], before the softmax; dtype and strides as sampling_offsets.
        level_start_index: first pixel of each level along S; None: one level after the other.
        padding_mask: [B, S] bool, True where value is padding: it reads as zero, whatever is
            stored, and gets no gradient.
        points_per_level: how many of the K points belong to each level, a sequence of L integers;
            None: K / L.
        offset_scale: for boxes only: the share of a box's width and height that an offset of 1
            stands for; one finite number, or a tensor [K] on value's device with one for each
            point, which must not require a gradient. None: 0.5 / P_l with P_l the level's points,
            as in Deformable DETR and RT-DETRv2. A negative one mirrors the offset. A tensor's
            entries are not read by the host: a point with one that is not finite contributes zero.
        return_weights: also return the attention weights; gradients flow through them.
        backend: "auto" takes the first that can run of "cuda", "triton", "cpu", "reference".

    Returns:
        [B, Q, M * D], dtype of value; with return_weights a pair of it and the weights
        [B, Q, M, K] in the dtype of attention_logits.

    Raises:
        TypeError: an argument that should be a tensor, a sequence or a name is none.
        ValueError: ranks, shapes, dtypes or devices disagree, points_per_level does not add up to
            K, offset_scale is given without boxes, or no backend has this name; the message names
            the argument, what was expected and what came.
        BackendUnavailable: the backend that was asked for cannot run; the message says why.
        NotImplementedError: a gradient of a gradient was asked for, outside torch.func, or one of
            offset_scale.
    """
    if not isinstance(return_weights, bool):
        raise TypeError(f"return_weights: expected a bool, got {type(return_weights).__name__}")
    backend = _dispatch.wanted(backend)
    kind = None
    if _ops.is_plain():
        kind = _checks.kind(
            (value, reference_points, sampling_offsets, attention_logits, padding_mask),
            spatial_shapes,
            level_start_index,
            points_per_level,
            backend,
        )
    plan = None if kind is None else _plans.get(kind)
    if plan is None:
        plan = _plan_from_offsets(
            value,
            spatial_shapes,
            reference_points,
            sampling_offsets,
            attention_logits,
            level_start_index,
            padding_mask,
            points_per_level,
            backend,
            kind is not None,
        )
        if kind is not None:
            _plans[kind] = plan
    compute = compute_dtype(value.dtype)
    if offset_scale is not None:
        total = sampling_offsets.shape[3]
        offset_scale = _checks.offset_scale(offset_scale, reference_points, total, compute)
        if (
            offset_scale is not None
            and offset_scale.requires_grad
            and torch.is_grad_enabled()
            and not _ops.is_differentiated_by_torch(offset_scale)
        ):
            raise NotImplementedError(
                "offset_scale: expected a tensor that requires no gradient, which is not "
                "implemented, got one that does"
            )
    if plan.grows:
        value, padding_mask = grow(value, padding_mask)
    out, weights = plan.call(
        value,
        *plan.levels,
        _as(compute, reference_points),
        _as(plan.dtype, sampling_offsets),
        _as(plan.dtype, attention_logits),
        padding_mask,
        offset_scale,
        return_weights,
    )
    if return_weights:
        return out, _as(attention_logits.dtype, weights)
    return out


def _plan_from_offsets(
    value: Tensor,
    spatial_shapes: _checks.SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_start_index: Sequence[int] | Tensor | None,
    padding_mask: Tensor | None,
    points_per_level: Sequence[int] | None,
    backend: str,
    plain: bool,
) -> _Plan:
    """Checks the arguments of `ms_deform_attn_from_offsets`."""
    for name, tensor in (
        ("value", value),
        ("reference_points", reference_points),
        ("sampling_offsets", sampling_offsets),
        ("attention_logits", attention_logits),
    ):
        _checks.is_tensor(name, tensor)
    _checks.rank("value", value, "B, S, M, D")
    batch, pixels = value.shape[:2]
    sizes, starts = _checks.levels(spatial_shapes, level_start_index, pixels)
    _checks.ms_deform_attn_from_offsets(
        value, len(sizes), reference_points, sampling_offsets, attention_logits
    )
    total = sampling_offsets.shape[3]
    counts = _checks.points_per_level(points_per_level, len(sizes), total)
    if padding_mask is not None:
        _checks.padding_mask(padding_mask, batch, pixels)
        _checks.device("padding_mask", padding_mask, value.device, "value")
    # Kernels take one dtype for both, that of value or of arithmetic; widening loses nothing.
    dtype = value.dtype
    if not sampling_offsets.dtype == attention_logits.dtype == dtype:
        dtype = compute_dtype(value.dtype)
    op = _dispatch.choose(
        backend, "ms_deform_attn_from_offsets", value.device.type, value.dtype, len(sizes)
    )
    _only_reference(plain, backend, value, reference_points, sampling_offsets, attention_logits)
    flat, starts, grows = level_table(sizes, starts, pixels)
    return _Plan(_ops.caller(op, plain), (flat, starts, counts), dtype, grows)
