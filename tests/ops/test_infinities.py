# SPDX-License-Identifier: Apache-2.0
"""What infinities and NaN do is the same in every backend: docs/numerics.md."""

import pytest
import torch

import infinities
from vitadapter_ops.testing import gate

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "channels", "head_major"),
    [(FP32, 32, False), (FP32, 20, True), (FP64, 20, False), (BF16, 32, False)],
    ids=str,
)
@pytest.mark.parametrize("poison", infinities.POISONS)
def test_infinities_reach_what_the_definition_says(backend, poison, dtype, channels, head_major):
    device, name = backend

    def compute(inputs, cotangent):
        return gate.run(gate.op(name), inputs.to(dtype, device), cotangent.to(device))

    infinities.check(infinities.POISONS[poison], channels, dtype, compute, head_major)


# dtype, channels, head_major, boxes, masked
@pytest.mark.parametrize(
    ("dtype", "channels", "head_major", "boxes", "masked"),
    [
        (FP32, 32, False, False, False),
        (FP32, 32, False, False, True),
        (FP32, 20, True, True, True),
        (FP64, 20, False, False, True),
        (FP64, 32, True, True, False),
        (BF16, 20, False, False, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("poison", infinities.FUSED_POISONS)
def test_infinities_in_the_fused_operator(
    backend, poison, dtype, channels, head_major, boxes, masked
):
    device, name = backend

    def compute(inputs, cotangents):
        inputs = inputs.to(dtype, device)
        return gate.run_offsets(gate.from_offsets(name), inputs, [c.to(device) for c in cotangents])

    poison = infinities.FUSED_POISONS[poison]
    infinities.check_offsets(poison, channels, dtype, compute, boxes, masked, head_major)
