# SPDX-License-Identifier: Apache-2.0
"""What only a GPU shows: graphs, streams, devices, waiting, repeatability, large tensors."""

from __future__ import annotations

import pytest
import torch

import vitadapter_ops
from optional import require_cuda
from vitadapter_ops.testing import cases, tolerances

pytestmark = pytest.mark.gpu

CASE = cases.Case("gpu", ((16, 20), (8, 10)), 2, 200, 4, 32)
DTYPES = ("fp32", "bf16")
GIB = 2**30


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """A backend whose kernels run on a GPU."""
    require_cuda()
    if request.param not in vitadapter_ops.available_backends():
        pytest.fail(vitadapter_ops.explain_backend("cuda"))
    return request.param


def leaves_of(dtype, device="cuda", seed=0):
    value, points = cases.DTYPES[dtype]
    inputs = CASE.inputs(seed).to(value, device, points)
    return [each.requires_grad_() for each in inputs.tensors]


def train(backend, leaves):
    out = vitadapter_ops.ms_deform_attn(leaves[0], CASE.shapes, *leaves[1:], backend=backend)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def assert_all_close(got, expected):
    """Sums of atomics differ in their last bits."""
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.device), **tolerances.CLOSE_ON_GPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_are_captured_and_replayed_on_other_inputs(kernels, dtype):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        leaves = leaves_of(dtype)
        train(kernels, leaves)  # compiles and loads
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = train(kernels, leaves)
        for leaf, other in zip(leaves, leaves_of(dtype, seed=1), strict=True):
            leaf.data.copy_(other.data)
        graph.replay()
        assert_all_close(captured, train(kernels, leaves))
    torch.cuda.synchronize()


def test_nothing_waits_for_the_device(kernels):
    leaves = leaves_of("fp32")
    train(kernels, leaves)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(kernels, leaves)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_work_is_on_the_current_stream(kernels):
    expected = train(kernels, leaves_of("fp32"))
    late = leaves_of("fp32")
    leaves = [torch.full_like(each, 0.5).requires_grad_() for each in late]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: on another stream the work would be done by then
        for leaf, data in zip(leaves, late, strict=True):
            leaf.data.copy_(data.data)
        got = train(kernels, leaves)
    stream.synchronize()
    assert_all_close(got, expected)


def test_device_of_the_tensors_counts_and_not_the_current_one(kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        got = train(kernels, leaves_of("fp32", "cuda:1"))
        assert {each.device.index for each in got} == {1}
        assert_all_close(got, train(kernels, leaves_of("fp32", "cuda:0")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_backward_repeats_to_the_bit(kernels, dtype):
    value, locations, weights = leaves_of(dtype)
    # All points on the same few pixels: the most additions to one number.
    crowded = (locations.detach() * 0.05 + 0.5).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (train(kernels, [value, crowded, weights]) for _ in range(10))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_more_numbers_than_int32_counts(kernels):
    height, width, heads, channels = 2100, 2048, 8, 64
    assert height * width * heads * channels > 2**31
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB of GPU memory")
    rows = 4  # the last ones, beyond 2^31
    value = torch.zeros(
        1, height * width, heads, channels, dtype=torch.bfloat16, device="cuda"
    ).requires_grad_()
    tail = torch.randn(1, rows * width, heads, channels, device="cuda").to(torch.bfloat16)
    value.data[:, -rows * width :] = tail
    at = torch.rand(1, 64, heads, 1, 4, 2, device="cuda") * 0.5 + 0.25  # within the last rows
    weights = torch.rand(1, 64, heads, 1, 4, device="cuda")
    far = at.clone()
    far[..., 1] = (at[..., 1] * rows + height - rows) / height

    def run(value, shapes, at, backend):
        out = vitadapter_ops.ms_deform_attn(value, shapes, at, weights, backend=backend)
        (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
        return out.float(), grad[:, -rows * width :].float()

    out, grad = run(value, [(height, width)], far, kernels)
    near = tail.clone().requires_grad_()
    expected, expected_grad = run(near, [(rows, width)], at, "reference")
    # Coordinates of thousands of pixels in fp32 leave a thousandth of a pixel.
    torch.testing.assert_close(out, expected, **tolerances.CLOSE_FAR_AWAY)
    torch.testing.assert_close(grad, expected_grad, **tolerances.CLOSE_FAR_AWAY)
    assert grad.abs().sum() > 0
