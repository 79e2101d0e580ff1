# SPDX-License-Identifier: Apache-2.0
"""RF-DETR.

from vitadapter_ops.compat.rfdetr import patch_rfdetr
patch_rfdetr()      # for models that exist as well as for new ones
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .._names import renamed
from ..linear import project
from . import _common
from ._patch import Patch, Replacement

__all__ = ["ms_deform_attn_core_pytorch", "patch_rfdetr"]


@renamed(spatial_shapes="value_spatial_shapes")
def ms_deform_attn_core_pytorch(
    value: Tensor,
    value_spatial_shapes: _common.SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    value_spatial_shapes_hw: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """RF-DETR's reference function, whose value has its pixels last.

    Args:
        value: [B, M, D, S].
        value_spatial_shapes: [L, 2], (H, W) of each level.
        sampling_locations: [B, Q, M, L, P, 2], or with both in one dimension [B, Q, M, L * P, 2].
        attention_weights: [B, Q, M, L * P], or [B, Q, M, L, P].
        value_spatial_shapes_hw: the shapes as integers, which need no device read.

    Returns:
        [B, Q, M * D], dtype of value.

    Raises:
        TypeError: a tensor is none.
        ValueError: sizes, dtypes or devices disagree.
    """
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    levels = _checks.level_count(shapes)
    _checks.is_tensor("value", value)
    _checks.rank("value", value, "B, M, D, S")
    sampling_locations = _by_level("sampling_locations", sampling_locations, 5, levels)
    attention_weights = _by_level("attention_weights", attention_weights, 4, levels)
    return _common.sample(value.permute(0, 3, 1, 2), shapes, sampling_locations, attention_weights)


def _by_level(name: str, tensor: Tensor, rank: int, levels: int) -> Tensor:
    """The tensor with L * P of its `rank` dimensions as L, P; one that has both stays as it is."""
    _checks.is_tensor(name, tensor)
    if tensor.dim() != rank:
        return tensor
    if tensor.shape[3] % max(levels, 1):
        raise ValueError(
            f"{name}: expected a multiple of {levels} points (levels in spatial_shapes), "
            f"got shape {list(tensor.shape)}"
        )
    return torch.unflatten(tensor, 3, (levels, -1))


def _forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    @renamed(
        value="input_flatten",
        spatial_shapes="input_spatial_shapes",
        padding_mask="input_padding_mask",
    )
    def forward(
        self: nn.Module,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
        input_spatial_shapes_hw: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Attends from `query` to sampled points of `input_flatten`; [B, Q, C]."""
        module: Any = self
        if module._export:
            # A graph for other runtimes, with torch's own operators.
            return original(
                self,
                query,
                reference_points,
                input_flatten,
                input_spatial_shapes,
                input_level_start_index,
                input_padding_mask,
                input_spatial_shapes_hw,
            )
        _common.check_tokens(self, query, input_flatten)
        output, _ = _common.attend(
            self,
            query,
            _common.project_value(module, input_flatten),
            input_spatial_shapes if input_spatial_shapes_hw is None else input_spatial_shapes_hw,
            reference_points,
            [module.n_points] * module.n_levels,
            padding=input_padding_mask,
        )
        return project(module.output_proj, output)

    return forward


def patch_rfdetr() -> Patch:
    """Routes RF-DETR's deformable attention to our operator, forward and backward.

    A module in export mode keeps the original's graph.

    Returns:
        A handle: `restore()`, or the end of a `with`, puts the originals back.

    Raises:
        ImportError: rfdetr is not installed.
    """
    module = importlib.import_module("rfdetr.models.ops.modules.ms_deform_attn")
    original = vars(module.MSDeformAttn)["forward"]
    # Not the reference function: it makes the graph in export mode, and nothing else calls it.
    return Patch([Replacement(module.MSDeformAttn, "forward", _forward(original))])
