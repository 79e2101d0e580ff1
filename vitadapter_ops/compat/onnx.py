# SPDX-License-Identifier: Apache-2.0
"""ONNX: a model with our operators is exported as any other, or with TensorRT's plugin.

    torch.onnx.export(model, args, "model.onnx")      # GridSample and arithmetic: any runtime

    from vitadapter_ops.compat.onnx import translation_table
    torch.onnx.export(model, args, "model.onnx", dynamo=True,
                      custom_translation_table=translation_table("tensorrt"))

The latter gives `MultiscaleDeformableAttnPlugin_TRT` nodes with the five inputs of TensorRT's
plugin.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _dispatch
from .. import _ops as _ops  # registers the operators

__all__ = ["PLUGIN", "translation_table"]

PLUGIN = "MultiscaleDeformableAttnPlugin_TRT"


def translation_table(target: str = "standard") -> dict[Callable[..., Any], Callable[..., Any]]:
    """For the argument `custom_translation_table` of `torch.onnx.export(..., dynamo=True)`.

    Batch, queries and the sizes of the levels may be dynamic.

    Args:
        target: "tensorrt", or "standard": an empty table, as the exporter needs none.

    Raises:
        ModuleNotFoundError: onnxscript, which the exporter itself needs, is not installed.
        ValueError: target is neither.
    """
    if target not in ("standard", "tensorrt"):
        raise ValueError(f"target: expected 'standard' or 'tensorrt', got {target!r}")
    if target == "standard":
        return {}
    write, ops = _plugin_writer(), torch.ops.vitadapter_ops
    # What else there is comes down to this operator, see `_grid_sample.py`.
    names = {f"ms_deform_attn{backend.suffix}" for backend in _dispatch.BACKENDS}
    return {getattr(ops, name).default: write for name in sorted(names)}


def _plugin_writer() -> Callable[..., Any]:
    """Writes a node of the plugin; its arguments are those of the operator's schema."""
    onnxscript = importlib.import_module("onnxscript")
    op = onnxscript.opset18  # the oldest that the exporter writes
    plugin = onnxscript.values.Op(
        onnxscript.values.Opset("trt.plugins", 1), PLUGIN, op_schema=_plugin_schema()
    )

    def ints(*numbers: int) -> Any:
        return op.Constant(value_ints=list(numbers))

    def int32(numbers: Sequence[Any], *shape: int) -> Any:
        # Sizes that are not known yet are scalars of the graph.
        parts = [
            ints(number) if isinstance(number, int) else op.Reshape(number, ints(1))
            for number in numbers
        ]
        return op.Cast(op.Reshape(op.Concat(*parts, axis=0), ints(*shape)), to=6)

    # The exporter reads which arguments are attributes off the annotations.
    def write(
        value: Any,
        spatial_shapes: Sequence[int],
        level_start_index: Sequence[int],
        sampling_locations: Any,
        attention_weights: Any,
    ) -> Any:
        levels, width = len(level_start_index), int(value.shape[2]) * int(value.shape[3])
        out = plugin(
            value,
            int32(spatial_shapes, levels, 2),
            int32(level_start_index, levels),
            op.CastLike(sampling_locations, value),
            op.CastLike(attention_weights, value),
        )
        return op.Reshape(out, ints(0, 0, width))

    return write


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
