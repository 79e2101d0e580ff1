# SPDX-License-Identifier: Apache-2.0
"""Resizing by matrix products is torch's bilinear interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitadapter.layers.bilinear import add_bilinear


def _interpolate(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _channels_last(*shape: int, **options):
    return torch.randn(*shape, **options).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(16, 24), (8, 12), (4, 6), (2, 3), (7, 11), (1, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("in_place", [False, True])
def test_sum_and_gradients_are_those_with_interpolate(size, batch, in_place):
    tokens = torch.randn(batch, 24, 5, dtype=torch.float64, requires_grad=True)
    leaf = _channels_last(batch, 5, *size, dtype=torch.float64).requires_grad_()
    x = tokens.transpose(1, 2).unflatten(2, (4, 6))
    expected = leaf + _interpolate(x, size)
    got = add_bilinear(leaf * 1, x, in_place=in_place)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    gradients = [torch.autograd.grad((y * weight).sum(), (tokens, leaf)) for y in (got, expected)]
    torch.testing.assert_close(*gradients)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(8, 12), (4, 6)], ids=str)
def test_base_is_written_to_only_when_it_may_be(size):
    x, base = _channels_last(1, 5, 4, 6), _channels_last(1, 5, *size)
    before = base.clone()
    expected = add_bilinear(base, x)
    assert torch.equal(base, before)
    torch.testing.assert_close(add_bilinear(base, x, in_place=True), expected)


def test_autocast_does_not_round():
    x, base = torch.randn(1, 5, 4, 6), torch.randn(1, 5, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        got = add_bilinear(base, x)
    torch.testing.assert_close(got, base + _interpolate(x, (8, 12)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_stays(dtype):
    x, base = torch.randn(1, 5, 4, 6).to(dtype), torch.randn(1, 5, 8, 12).to(dtype)
    assert add_bilinear(base, x).dtype == dtype
