# SPDX-License-Identifier: Apache-2.0
"""The contract of the operators, on one page: schema, fallback, fake and autograd.

`ms_deform_attn` is native: csrc/ registers its CPU and CUDA kernels when a library is loaded, and
until then (or on any other device) the reference serves. `ms_deform_attn_reference` has the same
contract and is always the reference, so that it can be asked for by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, impl, register_autograd, register_fake

from . import reference

# spatial_shapes is H0, W0, H1, W1, ...; SymInt keeps one compiled graph for all image sizes.
_INPUTS = (
    "Tensor value, SymInt[] spatial_shapes, SymInt[] level_start_index, "
    "Tensor sampling_locations, Tensor attention_weights"
)
_NEEDS = "bool need_value, bool need_locations, bool need_weights"

# torch.library's Library is untyped.
LIB: Any = Library("vitadapter_ops", "DEF")  # type: ignore[no-untyped-call]


def _fake_forward(
    value: Tensor,
    spatial_shapes: list[int],
    level_start_index: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, sampling_locations.shape[1], heads * channels))


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    level_start_index: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    need_value: bool,
    need_locations: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    return (
        like(value, need_value),
        like(sampling_locations, need_locations),
        like(attention_weights, need_weights),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, ctx.level_start_index, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "ms_deform_attn: second-order gradients are not implemented; differentiate once, "
        "or use create_graph=False"
    )


def _define(name: str) -> None:
    LIB.define(f"{name}({_INPUTS}) -> Tensor")
    LIB.define(
        f"{name}_backward(Tensor grad_output, {_INPUTS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)"
    )
    impl(LIB, name, "CompositeExplicitAutograd")(reference.ms_deform_attn)
    impl(LIB, f"{name}_backward", "CompositeExplicitAutograd")(reference.ms_deform_attn_backward)
    qualified = f"vitadapter_ops::{name}"
    register_fake(qualified, _fake_forward, lib=LIB)
    register_fake(f"{qualified}_backward", _fake_backward, lib=LIB)

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        need_value, _, _, need_locations, need_weights = ctx.needs_input_grad
        value, sampling_locations, attention_weights = ctx.saved_tensors
        ops = torch.ops.vitadapter_ops
        op = getattr(ops, f"{name}_backward")
        if value.is_cuda and torch.are_deterministic_algorithms_enabled():
            # The CUDA kernel's atomics add in any order; the reference's index_add_ obeys the flag.
            op = ops.ms_deform_attn_reference_backward
        grad_value, grad_locations, grad_weights = op(
            grad_output,
            value,
            ctx.spatial_shapes,
            ctx.level_start_index,
            sampling_locations,
            attention_weights,
            need_value,
            need_locations,
            need_weights,
        )
        return (
            grad_value if need_value else None,
            None,
            None,
            grad_locations if need_locations else None,
            grad_weights if need_weights else None,
        )

    register_autograd(qualified, backward, setup_context=_setup_context, lib=LIB)
    register_autograd(f"{qualified}_backward", _no_double_backward, lib=LIB)


_define("ms_deform_attn")
_define("ms_deform_attn_reference")
