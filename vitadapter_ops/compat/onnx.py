# SPDX-License-Identifier: Apache-2.0
"""ONNX: our operators in `torch.onnx.export`, as standard nodes or as TensorRT's plugin.

    from vitadapter_ops.compat.onnx import translation_table
    torch.onnx.export(model, args, "model.onnx", dynamo=True, opset_version=20,
                      custom_translation_table=translation_table())

"standard" gives GridSample and arithmetic, which every runtime with opset 20 has. "tensorrt" gives
one `MultiscaleDeformableAttnPlugin_TRT` node with the five inputs of TensorRT's plugin.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _ops as _ops  # registers the operators

__all__ = ["OPSET", "PLUGIN", "translation_table"]

# The first opset whose GridSample knows "linear", as torch's exporter writes it.
OPSET = 20
PLUGIN = "MultiscaleDeformableAttnPlugin_TRT"


def translation_table(target: str = "standard") -> dict[Callable[..., Any], Callable[..., Any]]:
    """For the argument `custom_translation_table` of `torch.onnx.export`.

    Sizes of the levels and of their points are constants of the graph; batch and queries may be
    dynamic.

    Args:
        target: "standard" or "tensorrt".

    Raises:
        ModuleNotFoundError: onnxscript, which the exporter itself needs, is not installed.
        ValueError: target is neither.
    """
    if target not in ("standard", "tensorrt"):
        raise ValueError(f"target: expected 'standard' or 'tensorrt', got {target!r}")
    writer = _Writer(importlib.import_module("onnxscript"), plugin=target == "tensorrt")
    ops = torch.ops.vitadapter_ops
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    for suffix in ("", "_reference"):
        table[getattr(ops, f"ms_deform_attn{suffix}").default] = writer.ms_deform_attn
        table[getattr(ops, f"ms_deform_attn_from_offsets{suffix}").default] = writer.from_offsets
    return table


class _Writer:
    """Writes the nodes; its arguments are those of the operators' schemas in `_ops.py`."""

    def __init__(self, onnxscript: Any, plugin: bool) -> None:
        self.op = onnxscript.opset20
        self.tensorrt = onnxscript.values.Op(
            onnxscript.values.Opset("trt.plugins", 1), PLUGIN, op_schema=_plugin_schema()
        )
        self.plugin = plugin

        # The exporter reads which arguments are attributes off the annotations, and takes no
        # bound methods.
        def ms_deform_attn(
            value: Any,
            spatial_shapes: Sequence[int],
            level_start_index: Sequence[int],
            sampling_locations: Any,
            attention_weights: Any,
        ) -> Any:
            sizes = _sizes(spatial_shapes)
            each = [int(sampling_locations.shape[4])] * len(sizes)
            points = self._flat(sampling_locations, (0, 0, 0, -1, 2))
            weights = self._flat(attention_weights, (0, 0, 0, -1))
            width = _width(value)
            return self._sample(value, width, sizes, level_start_index, each, points, weights)

        def from_offsets(
            value: Any,
            spatial_shapes: Sequence[int],
            level_start_index: Sequence[int],
            points_per_level: Sequence[int],
            reference_points: Any,
            sampling_offsets: Any,
            attention_logits: Any,
            padding_mask: Any = None,
            offset_scale: Any = None,
            return_weights: bool = False,
        ) -> Any:
            op, sizes, width = self.op, _sizes(spatial_shapes), _width(value)
            if padding_mask is not None:
                zero = op.CastLike(op.Constant(value_float=0.0), value)
                value = op.Where(op.Unsqueeze(padding_mask, self._ints(2, 3)), zero, value)
            weights = op.Softmax(attention_logits, axis=-1)
            points = self._locations(
                reference_points, sampling_offsets, offset_scale, sizes, points_per_level
            )
            out = self._sample(
                value, width, sizes, level_start_index, points_per_level, points, weights
            )
            return out, weights

        self.ms_deform_attn = ms_deform_attn
        self.from_offsets = from_offsets

    def _ints(self, *numbers: int) -> Any:
        return self.op.Constant(value_ints=list(numbers))

    def _floats(self, numbers: Sequence[float], shape: Sequence[int], like: Any) -> Any:
        constant = self.op.Constant(value_floats=[float(number) for number in numbers])
        return self.op.CastLike(self.op.Reshape(constant, self._ints(*shape)), like)

    def _flat(self, tensor: Any, shape: Sequence[int]) -> Any:
        return self.op.Reshape(tensor, self._ints(*shape))

    def _columns(self, tensor: Any, axis: int, first: int, last: int) -> Any:
        return self.op.Slice(tensor, self._ints(first), self._ints(last), self._ints(axis))

    def _locations(
        self,
        reference: Any,
        offsets: Any,
        scale: Any,
        sizes: Sequence[tuple[int, int]],
        points: Sequence[int],
    ) -> Any:
        """[B, Q, M, K, 2] from references [B, Q, L or 1, 2 or 4] and offsets [B, Q, M, K, 2]."""
        op = self.op
        _, _, levels, coordinates = reference.shape
        if levels != 1:  # each level as often as it has points
            each = [level for level, count in enumerate(points) for _ in range(count)]
            reference = op.Gather(reference, self._ints(*each), axis=2)
        reference = op.Unsqueeze(reference, self._ints(2))
        if coordinates == 2:
            sides = [
                side
                for (height, width), count in zip(sizes, points, strict=True)
                for side in (width, height) * count
            ]
            step = op.Div(offsets, self._floats(sides, (1, 1, 1, -1, 2), offsets))
            return op.Add(reference, op.CastLike(step, reference))
        if scale is None:
            shares = [0.5 / count for count in points for _ in range(count)]
            scale = self._floats(shares, (1, 1, 1, -1, 1), offsets)
        else:
            scale = op.CastLike(op.Reshape(scale, self._ints(1, 1, 1, -1, 1)), offsets)
        step = op.Mul(
            op.CastLike(op.Mul(offsets, scale), reference), self._columns(reference, 4, 2, 4)
        )
        return op.Add(self._columns(reference, 4, 0, 2), step)

    def _sample(
        self,
        value: Any,
        width: tuple[int, int],
        sizes: Sequence[tuple[int, int]],
        starts: Sequence[int],
        points: Sequence[int],
        locations: Any,
        weights: Any,
    ) -> Any:
        """[B, Q, M * D] from value [B, S, M, D], locations [B, Q, M, K, 2] and their weights."""
        op, (heads, channels) = self.op, width
        if self.plugin:
            out = self._plugin(value, sizes, starts, points, locations, weights)
            return op.Reshape(out, self._ints(0, 0, heads * channels))
        # Of one image and head: maps [B * M, D, H, W], grids [B * M, Q, P, 2] in -1 .. 1.
        maps = op.Transpose(value, perm=[0, 2, 3, 1])
        locations = op.CastLike(op.Transpose(locations, perm=[0, 2, 1, 3, 4]), value)
        two, one = (self._floats([number], (1,), value) for number in (2, 1))
        grids = op.Sub(op.Mul(locations, two), one)
        weights = op.CastLike(op.Transpose(weights, perm=[0, 2, 1, 3]), value)
        shape = op.Shape(grids)
        queries = op.Slice(shape, self._ints(2), self._ints(3), self._ints(0))
        found, first = [], 0
        for (rows, columns), start, count in zip(sizes, starts, points, strict=True):
            level = self._columns(maps, 3, start, start + rows * columns)
            level = op.Reshape(level, self._ints(-1, channels, rows, columns))
            grid = self._columns(grids, 3, first, first + count)
            grid = op.Reshape(
                grid, op.Concat(self._ints(-1), queries, self._ints(count, 2), axis=0)
            )
            found.append(
                op.GridSample(level, grid, mode="linear", padding_mode="zeros", align_corners=0)
            )
            first += count
        samples = found[0] if len(found) == 1 else op.Concat(*found, axis=3)  # [B * M, D, Q, K]
        weights = op.Reshape(
            weights, op.Concat(self._ints(-1, 1), queries, self._ints(first), axis=0)
        )
        out = op.ReduceSum(op.Mul(samples, weights), self._ints(3), keepdims=0)
        out = op.Reshape(out, op.Concat(self._ints(-1, heads * channels), queries, axis=0))
        return op.Transpose(out, perm=[0, 2, 1])

    def _plugin(
        self,
        value: Any,
        sizes: Sequence[tuple[int, int]],
        starts: Sequence[int],
        points: Sequence[int],
        locations: Any,
        weights: Any,
    ) -> Any:
        if len(set(points)) != 1:
            raise ValueError(
                f"points_per_level: expected the same on all levels for {PLUGIN}, got {points}"
            )
        op, levels, count = self.op, len(sizes), points[0]

        def int32(numbers: Sequence[int], *shape: int) -> Any:
            return op.Cast(op.Reshape(self._ints(*numbers), self._ints(*shape)), to=6)

        return self.tensorrt(
            value,
            int32([side for size in sizes for side in size], levels, 2),
            int32(list(starts), levels),
            op.CastLike(self._flat(locations, (0, 0, 0, levels, count, 2)), value),
            op.CastLike(self._flat(weights, (0, 0, 0, levels, count)), value),
        )


def _plugin_schema() -> Any:
    defs = importlib.import_module("onnx.defs")
    tensor, integers = ["tensor(float)", "tensor(float16)"], "tensor(int32)"
    types = {
        "value": "T",
        "spatial_shapes": integers,
        "level_start_index": integers,
        "sampling_locations": "T",
        "attention_weights": "T",
    }
    return defs.OpSchema(
        PLUGIN,
        "trt.plugins",
        1,
        inputs=[defs.OpSchema.FormalParameter(name, kind) for name, kind in types.items()],
        outputs=[defs.OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", tensor, "")],
    )


def _width(value: Any) -> tuple[int, int]:
    """Heads and channels per head; only inputs of a translation have a shape."""
    return int(value.shape[2]), int(value.shape[3])


def _sizes(spatial_shapes: Sequence[int]) -> list[tuple[int, int]]:
    if not all(isinstance(side, int) for side in spatial_shapes):
        raise ValueError(
            "spatial_shapes: expected sizes that are constants of the graph; export with a fixed "
            "image size"
        )
    return list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
