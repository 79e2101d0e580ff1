# SPDX-License-Identifier: Apache-2.0
"""Every backend equals the fp64 reference to within twice eager torch's error at the same dtype."""

import math

import pytest
import torch

from optional import sweep
from vitadapter_ops import ms_deform_attn
from vitadapter_ops.testing import cases, oracles, tolerances
from vitadapter_ops.testing.gate import NAMES, check_backend, op, run


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_small_shapes(case, backend, dtypes):
    device, name = backend
    check_backend(case, dtypes, name, device)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16_points_fp32"])
@pytest.mark.parametrize("case", sweep(cases.MODEL, "injector-S-512", "extractor-B-512"))
def test_vit_adapter_shapes(case, backend, dtypes):
    device, name = backend
    check_backend(case, dtypes, name, device)


def test_strided_inputs_and_gradient(backend):
    device, name = backend
    case = cases.Case("strided", ((4, 6), (2, 3)), queries=3, heads=2, points=2)
    inputs = case.inputs().to(torch.float32, device)
    value, locations, weights = inputs.tensors
    expected = ms_deform_attn(value, inputs.spatial_shapes, locations, weights, backend=name)
    head_major = value.transpose(1, 2).contiguous().transpose(1, 2)
    channels_strided = value.transpose(1, 3).contiguous().transpose(1, 3)
    wider = torch.cat((value, value), -1)[..., : value.shape[-1]]
    misaligned = torch.empty(value.numel() + 1, device=device)[1:].view(value.shape).copy_(value)
    points_permuted = locations.transpose(1, 2).contiguous().transpose(1, 2)
    for v in (head_major, channels_strided, wider, misaligned):
        leaf = v.detach().requires_grad_()
        out = ms_deform_attn(leaf, inputs.spatial_shapes, points_permuted, weights, backend=name)
        torch.testing.assert_close(out, expected, **tolerances.EQUAL)
        # sum() sends an expanded gradient with strides of zero.
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        plain = value.detach().requires_grad_()
        out = ms_deform_attn(plain, inputs.spatial_shapes, locations, weights, backend=name)
        (expected_grad,) = torch.autograd.grad(out, plain, torch.ones_like(out))
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("empty", ["batch", "queries", "points"])
def test_empty_inputs_give_empty_or_zero_results(backend, empty, dtype):
    device, name = backend
    case = cases.Case("empty", ((4, 3), (2, 2)), **{empty: 0})
    inputs = case.inputs().to(dtype, device)
    tensors = [t.requires_grad_() for t in inputs.tensors]
    out = ms_deform_attn(tensors[0], inputs.spatial_shapes, *tensors[1:], backend=name)
    assert out.shape == (case.batch, case.queries, case.heads * case.channels)
    assert (out == 0).all()
    out.sum().backward()
    for tensor in tensors:
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9])
@pytest.mark.parametrize("axis", [0, 1], ids=["x", "y"])
def test_non_finite_and_huge_locations_contribute_nothing(backend, bad, axis):
    device, name = backend
    inputs = cases.SMALL[3].inputs().to(torch.float32, device)
    dropped = (slice(None), slice(1, None, 2), ..., slice(0, 2))
    inputs.sampling_locations[(*dropped, axis)] = bad
    inputs.attention_weights[dropped] = float("nan")
    zeroed = inputs.attention_weights.clone()
    zeroed[dropped] = 0
    inside = inputs.sampling_locations.clone()
    inside[(*dropped, slice(None))] = 0.5
    tensors = [t.requires_grad_() for t in inputs.tensors]
    out = ms_deform_attn(tensors[0], inputs.spatial_shapes, *tensors[1:], backend=name)
    expected = ms_deform_attn(
        tensors[0].detach(), inputs.spatial_shapes, inside, zeroed, backend=name
    )
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors)
    assert (tensors[1].grad[(*dropped, slice(None))] == 0).all()
    assert (tensors[2].grad[dropped] == 0).all()


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 33, 64, 1000])
def test_locations_around_the_edges_of_the_map(backend, width):
    device, name = backend
    edges = torch.tensor([-0.5 / width, 0.0, 0.5 / width, 1 - 0.5 / width, 1.0, 1 + 0.5 / width])
    x = [edges]
    for direction in (-math.inf, math.inf):
        step = edges
        for _ in range(4):
            step = torch.nextafter(step, torch.tensor(direction))
            x.append(step)
    x = torch.cat(x)
    locations = torch.cartesian_prod(x, x).view(1, -1, 1, 1, 1, 2)
    # NaN around the level: whatever is read beside it shows.
    value = torch.full((1, 3 * width * width, 1, 4), math.nan)
    value[:, width * width : 2 * width * width] = torch.randn(1, width * width, 1, 4)
    value, locations = value.to(device), locations.to(device)
    weights = torch.ones(locations.shape[:-1], device=device)
    got = ms_deform_attn(
        value, [(width, width)], locations, weights, level_start_index=[width**2], backend=name
    )
    expected = ms_deform_attn(
        value.double(),
        [(width, width)],
        locations.double(),
        weights.double(),
        level_start_index=[width**2],
        backend="reference",
    )
    # A coordinate rounds to within an ulp of the width, and the map's slope is a few units.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=16 * width * 2**-23)


def test_infinite_pixels_outside_the_footprint_do_not_leak(backend):
    device, name = backend
    value = torch.full((1, 9, 1, 8), float("inf"), device=device)
    value[:, 0] = 1.0
    corner = torch.tensor([-0.1, -0.1], device=device).expand(1, 1, 1, 1, 1, 2)
    out = ms_deform_attn(
        value, [(3, 3)], corner, torch.ones(1, 1, 1, 1, 1, device=device), backend=name
    )
    torch.testing.assert_close(out, torch.full_like(out, 0.2 * 0.2))


def test_inputs_are_not_changed(backend):
    device, name = backend
    inputs = cases.SMALL[3].inputs().to(torch.float32, device)
    copies = [t.clone() for t in inputs.tensors]
    tensors = [t.requires_grad_() for t in inputs.tensors]
    out = ms_deform_attn(tensors[0], inputs.spatial_shapes, *tensors[1:], backend=name)
    out.backward(torch.ones_like(out))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_spatial_shapes_as_tensor_gives_the_same(backend):
    device, name = backend
    inputs = cases.SMALL[3].inputs().to(torch.float32, device)
    value, locations, weights = inputs.tensors
    shapes = torch.tensor(inputs.spatial_shapes, device=device)
    starts = torch.tensor([0, 96, 120], device=device)
    got = ms_deform_attn(value, shapes, locations, weights, level_start_index=starts, backend=name)
    expected = ms_deform_attn(value, inputs.spatial_shapes, locations, weights, backend=name)
    assert torch.equal(got, expected)


def test_more_levels_than_the_kernels_take_runs_on_the_reference():
    case = cases.Case("levels", ((2, 2),) * 65, points=1, queries=3)
    inputs = case.inputs()
    got = ms_deform_attn(
        inputs.value, inputs.spatial_shapes, inputs.sampling_locations, inputs.attention_weights
    )
    expected = oracles.grid_sample(
        inputs.value, inputs.spatial_shapes, inputs.sampling_locations, inputs.attention_weights
    )
    torch.testing.assert_close(got, expected)


def test_deterministic_algorithms_give_the_same_bits_every_time(backend):
    device, name = backend
    inputs = cases.SMALL[3].inputs().to(torch.float32, device)
    cotangent = torch.randn(2, 7, 24, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(op(name), inputs, cotangent)
        for _ in range(10):
            again = run(op(name), inputs, cotangent)
            for what, a, b in zip(NAMES, again, first, strict=True):
                assert torch.equal(a, b), what
    finally:
        torch.use_deterministic_algorithms(False)
