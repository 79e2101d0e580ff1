# SPDX-License-Identifier: Apache-2.0
"""The reference is the definition: it equals plain loops and grid_sample, and its derivative."""

import pytest
import torch

from vitadapter_ops import ms_deform_attn, reference
from vitadapter_ops.testing import cases, oracles
from vitadapter_ops.testing.tolerances import assert_same_definition


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_equals_plain_loops(case):
    inputs = case.inputs()
    got = reference.ms_deform_attn(
        inputs.value,
        inputs.flat_shapes,
        inputs.starts,
        inputs.sampling_locations,
        inputs.attention_weights,
    )
    assert_same_definition("output", got, oracles.plain_loops(inputs))


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_output_and_gradients_equal_grid_sample(case):
    inputs = case.inputs()
    tensors = [t.requires_grad_() for t in inputs.tensors]
    shapes, starts = inputs.spatial_shapes, inputs.level_start_index
    expected = oracles.grid_sample(tensors[0], shapes, *tensors[1:], starts)
    cotangent = torch.randn_like(expected)
    got = ms_deform_attn(
        tensors[0], shapes, *tensors[1:], level_start_index=starts, backend="reference"
    )
    assert_same_definition("output", got, expected)
    for name, a, b in zip(
        ("value", "locations", "weights"),
        torch.autograd.grad(got, tensors, cotangent),
        torch.autograd.grad(expected, tensors, cotangent),
        strict=True,
    ):
        assert_same_definition(f"gradient of {name}", a, b)


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_backward_equals_autograd_of_forward(case):
    inputs = case.inputs()
    tensors = [t.requires_grad_() for t in inputs.tensors]
    shapes = inputs.flat_shapes, inputs.starts
    out = reference.ms_deform_attn(tensors[0], *shapes, *tensors[1:])
    cotangent = torch.randn_like(out)
    expected = torch.autograd.grad(out, tensors, cotangent, allow_unused=True)
    got = reference.ms_deform_attn_backward(
        cotangent, tensors[0], *shapes, *tensors[1:], True, True, True
    )
    for name, a, b in zip(("value", "locations", "weights"), got, expected, strict=True):
        assert_same_definition(f"gradient of {name}", a.detach(), b)
