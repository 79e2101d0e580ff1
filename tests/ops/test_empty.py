# SPDX-License-Identifier: Apache-2.0
"""No images, no queries, no pixels, no points: zeros of the right shape, gradients included."""

import pytest
import torch

from vitadapter_ops import ms_deform_attn, ms_deform_attn_from_offsets

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# B, Q, levels, P; S is the levels' sum.
FULL = (2, 3, ((4, 5), (2, 3)), 4)
EMPTY = {
    "no-images": (0, *FULL[1:]),
    "no-queries": (2, 0, *FULL[2:]),
    "no-images-no-queries": (0, 0, *FULL[2:]),
    "no-points": (*FULL[:3], 0),
    "no-pixels": (2, 3, ((0, 5), (0, 0)), 4),
    "no-pixels-no-queries": (2, 0, ((0, 5), (0, 0)), 4),
    "nothing": (0, 0, ((0, 0),), 0),
}
HEADS, CHANNELS = 2, 3


def check(function, tensors, shape):
    """All zero, of the right shape, and a gradient of zero for every input."""
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = function(*leaves)
    assert out.shape == shape
    assert not out.any()
    out.sum().backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
    with torch.no_grad():
        assert function(*leaves).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [tuple, torch.tensor])
@pytest.mark.parametrize("empty", EMPTY)
def test_located(empty, form, dtype, backend):
    device, name = backend
    batch, queries, levels, points = EMPTY[empty]
    pixels = sum(h * w for h, w in levels)
    made = {"dtype": dtype, "device": device}
    tensors = (
        torch.randn(batch, pixels, HEADS, CHANNELS, **made),
        torch.rand(batch, queries, HEADS, len(levels), points, 2, **made),
        torch.rand(batch, queries, HEADS, len(levels), points, **made),
    )

    def function(value, locations, weights):
        return ms_deform_attn(value, form(levels), locations, weights, backend=name)

    check(function, tensors, (batch, queries, HEADS * CHANNELS))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("empty", EMPTY)
def test_from_offsets(empty, width, masked, backend):
    device, name = backend
    batch, queries, levels, points = EMPTY[empty]
    pixels, total = sum(h * w for h, w in levels), points * len(levels)
    tensors = (
        torch.randn(batch, pixels, HEADS, CHANNELS, device=device),
        torch.rand(1 if queries else batch, queries, 1, width, device=device),
        torch.randn(batch, queries, HEADS, total, 2, device=device),
        torch.randn(batch, queries, HEADS, total, device=device),
    )
    mask = torch.zeros(batch, pixels, dtype=torch.bool, device=device) if masked else None

    def function(value, reference, offsets, logits):
        out, weights = ms_deform_attn_from_offsets(
            value,
            levels,
            reference,
            offsets,
            logits,
            padding_mask=mask,
            return_weights=True,
            backend=name,
        )
        assert weights.shape == logits.shape
        return out

    check(function, tensors, (batch, queries, HEADS * CHANNELS))


def test_a_level_without_pixels_contributes_nothing(backend):
    """The others stay as they are, to the last bit."""
    device, name = backend
    levels = [(4, 5), (0, 7), (2, 3)]
    value = torch.randn(2, 26, HEADS, CHANNELS, device=device)
    locations = torch.rand(2, 3, HEADS, 3, 4, 2, device=device)
    weights = torch.rand(2, 3, HEADS, 3, 4, device=device)
    keep = [0, 2]

    def compute(levels, locations, weights, **keywords):
        leaves = [t.clone().requires_grad_() for t in (value, locations, weights)]
        out = ms_deform_attn(leaves[0], levels, *leaves[1:], backend=name, **keywords)
        return out, *torch.autograd.grad(out.sin().sum(), leaves)

    expected = compute(
        [levels[level] for level in keep], locations[:, :, :, keep], weights[:, :, :, keep]
    )
    for keywords in ({}, {"level_start_index": [0, 20, 20]}, {"level_start_index": [0, 26, 20]}):
        out, grad_value, *grads = compute(levels, locations, weights, **keywords)
        assert torch.equal(out, expected[0])
        assert torch.equal(grad_value, expected[1])
        for grad, want in zip(grads, expected[2:], strict=True):
            assert torch.equal(grad[:, :, :, keep], want)
            assert not grad[:, :, :, 1].any()


def test_nothing_under_func():
    value, locations = torch.randn(0, 20, 2, 3), torch.rand(0, 3, 2, 1, 4, 2)
    weights = torch.rand(0, 3, 2, 1, 4)

    def loss(value):
        return ms_deform_attn(value, [(4, 5)], locations, weights).sum()

    assert torch.func.grad(loss)(value).shape == value.shape
