# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention as a function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _dispatch


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
    once in value, locations and weights; gradients that are not required are not computed. Bitwise
    repeatable under `torch.use_deterministic_algorithms(True)`, and always on a CPU.

    Args:
        value: [B, S, M, D], float64, float32, float16 or bfloat16; levels concatenated along S,
            each row by row.
        spatial_shapes: (H, W) of each level in pixels. A tensor [L, 2] works too, at the cost of
            reading it back to the host: one synchronisation per call when it lies on a GPU.
        sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions of the level's width and height,
            any value. dtype of value, or float32.
        attention_weights: [B, Q, M, L, P], dtype of value, or float32. Not normalised here.
        level_start_index: first pixel of each level along S, L integers or a tensor (read back like
            spatial_shapes). None: one level after the other, which must then fill S.
        backend: "auto" takes the first that can run of "cuda", "cpu", "reference".

    Returns:
        [B, Q, M * D], dtype of value.

    Raises:
        ValueError: ranks, shapes, dtypes or devices disagree, or no backend has this name; the
            message names the argument, what was expected and what came.
        BackendUnavailable: the backend that was asked for cannot run; the message says why.
        NotImplementedError: second-order gradients were asked for.
    """
    _checks.is_tensor("value", value)
    _checks.is_tensor("sampling_locations", sampling_locations)
    _checks.is_tensor("attention_weights", attention_weights)
    _checks.rank("value", value, "B, S, M, D")
    sizes, starts = _checks.levels(spatial_shapes, level_start_index, value.shape[1])
    _checks.ms_deform_attn(value, len(sizes), sampling_locations, attention_weights)
    # Kernels take one dtype for both; widening to the larger one loses nothing.
    widest = torch.promote_types(sampling_locations.dtype, attention_weights.dtype)
    if value.dtype == torch.float64:
        widest = torch.float64
    op = getattr(
        torch.ops.vitadapter_ops,
        _dispatch.choose(backend, value.device.type, value.dtype, len(sizes)),
    )
    return op(
        value,
        [side for size in sizes for side in size],
        starts,
        sampling_locations.to(widest),
        attention_weights.to(widest),
    )
