# SPDX-License-Identifier: Apache-2.0
"""Resizing by matrix products is torch's bilinear interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitadapter.layers.bilinear import bilinear


@pytest.mark.parametrize("size", [(16, 24), (8, 12), (4, 6), (2, 3), (7, 11), (1, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_result_and_gradient_are_those_of_interpolate(size, batch):
    tokens = torch.randn(batch, 24, 5, dtype=torch.float64, requires_grad=True)
    x = tokens.transpose(1, 2).unflatten(2, (4, 6))
    expected = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    got = bilinear(x, size)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    gradients = [torch.autograd.grad((y * weight).sum(), tokens)[0] for y in (got, expected)]
    torch.testing.assert_close(*gradients)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_autocast_does_not_round():
    x = torch.randn(1, 5, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got = bilinear(x, (8, 12))
    expected = F.interpolate(x, size=(8, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_stays(dtype):
    assert bilinear(torch.randn(1, 5, 4, 6).to(dtype), (8, 12)).dtype == dtype
