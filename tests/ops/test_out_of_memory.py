# SPDX-License-Identifier: Apache-2.0
"""Without memory, an operator says what torch says: how much it tried to get.

In child processes that may take little more address space than they have.
"""

import re
import sys

import pytest
import torch

import children
import vitadapter_ops
from vitadapter_ops import _memory

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")

# Makes each call with the address space that is in use and `room` MiB more, and prints its error.
CHILD = """
import pathlib, resource
import torch
import vitadapter_ops
torch.set_num_threads(2)
torch.ones(1 << 20).exp().sum()  # the pool's threads are there
ops = torch.ops.vitadapter_ops
{setup}
for call in {calls!r}:
    status = pathlib.Path("/proc/self/status").read_text()
    used = int(status.split("VmSize:")[1].split()[0]) << 10
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + ({room} << 20), hard))
    try:
        exec(call)
        print("no error")
    except RuntimeError as error:
        print(type(error).__name__, error)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
"""

# One image of one pixel: value and points are views of little memory.
LOCATED = """
value = torch.ones(1, 1, 1, {channels})
locations = torch.full((), 0.5).expand(1, {queries}, 1, 1, {points}, 2)
weights = torch.full((), 0.5).expand(1, {queries}, 1, 1, {points})
given = (value, [1, 1], [0], locations, weights)
"""


def errors_of(calls, setup, room):
    code = CHILD.format(setup=setup, room=room, calls=list(calls))
    # Freed memory goes back at once, and is not there for the call.
    done = children.python(["-c", code], MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls)
    return lines


def assert_says(text, what, at_least):
    tried = re.match(
        r"RuntimeError .*DefaultCPUAllocator: can't allocate memory: "
        r"you tried to allocate (\d+) bytes",
        text,
    )
    assert tried, text
    assert text.endswith(f"(for {what})"), text
    assert int(tried[1]) >= at_least, text


@pytest.fixture(autouse=True)
def _needs_the_cpu_library():
    if "cpu" not in vitadapter_ops.available_backends():
        pytest.skip("needs the CPU library")


@LINUX
def test_an_output_that_does_not_fit():
    # Points as they are, the output 512 MiB.
    setup = LOCATED.format(queries=4096, channels=1 << 15, points=1)
    calls = (
        "ops.ms_deform_attn(*given)",
        "vitadapter_ops.ms_deform_attn(value, [(1, 1)], locations, weights)",
    )
    for text in errors_of(calls, setup, room=256):
        assert_says(text, "the output", 512 << 20)


@LINUX
def test_a_copy_that_does_not_fit():
    setup = LOCATED.format(queries=1 << 22, channels=1, points=16)
    (text,) = errors_of(["ops.ms_deform_attn(*given)"], setup, room=256)
    assert_says(text, "a contiguous copy", 512 << 20)


@LINUX
def test_a_gradient_that_does_not_fit():
    setup = """
def given(channels, points):
    locations = torch.full((1, 1 << 16, 1, 1, points, 2), 0.5)
    value = torch.ones(1, 1 << 16, 1, channels)
    grad = torch.ones(1, 1 << 16, channels)
    return grad, value, [256, 256], [0], locations, locations[..., 0] + 0

wide, deep = given(512, 1), given(1, 512)
value = wide[1].requires_grad_()
points = torch.rand(1, 16, 1, 2), torch.zeros(1, 16, 1, 4, 2), torch.zeros(1, 16, 1, 4)
out = vitadapter_ops.ms_deform_attn_from_offsets(value, [(256, 256)], *points)
value = value.detach()
"""
    calls = {
        "ops.ms_deform_attn_backward(*wide, True, False, False)": "value",
        "ops.ms_deform_attn_backward(*deep, False, True, False)": "sampling_locations",
        "ops.ms_deform_attn_backward(*deep, False, False, True)": "attention_weights",
        "out.sum().backward()": "value",
    }
    texts = errors_of(calls, setup, room=64)
    for text, name in zip(texts, calls.values(), strict=True):
        assert_says(text, f"the gradient of {name}", 128 << 20)


@LINUX
def test_scratch_that_does_not_fit():
    # A copy of each plane of a 16-bit value, in fp32: 256 MiB beside an output of some bytes.
    setup = """
value = torch.ones(1, 1 << 20, 2, 64, dtype=torch.bfloat16)
locations = torch.full((1, 8, 2, 1, 1 << 18, 2), 0.5, dtype=torch.bfloat16)
given = (value, [1 << 10, 1 << 10], [0], locations, locations[..., 0] + 0)
grad = torch.ones(1, 8, 128, dtype=torch.bfloat16)
"""
    calls = [
        f"torch.set_num_threads({threads}); {call}"
        for threads in (1, 2)
        for call in (
            "ops.ms_deform_attn(*given)",
            "ops.ms_deform_attn_backward(grad, *given, False, False, True)",
        )
    ]
    for text in errors_of(calls, setup, room=128):
        assert_says(text, "scratch of a CPU kernel", 128 << 20)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
        "of which 1.00 GiB is free. (for the output)",
        "CUDA out of memory. Tried to allocate 2147483648 bytes on cuda:0 (for the output)",
        "HIP out of memory. Tried to allocate 2.00 GiB. (for the output)",
    ],
)
def test_on_a_gpu_it_is_an_error_of_torchs_class(text):
    with pytest.raises(torch.cuda.OutOfMemoryError) as raised:
        _memory.explain(RuntimeError(text))
    assert str(raised.value) == text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_what_is_right_already_stays_as_it_is(error):
    with pytest.raises(type(error)) as raised:
        _memory.explain(error)
    assert raised.value is error


def test_handlers_of_torchs_class_see_what_an_operator_raises(monkeypatch):
    """As on a GPU, with the text that a CPU's allocator has."""
    monkeypatch.setattr(_memory, "_PHRASES", ("[enforce fail", "DefaultCPUAllocator"))
    value = torch.ones(1, 1, 1, 1)
    points = torch.ones(1, 1, 1, 1, 1, 2).expand(1, 1 << 44, -1, -1, -1, -1)
    levels, weights = ([1, 1], [0]), points[..., 0]
    ops = torch.ops.vitadapter_ops
    calls = {
        "eager": lambda: vitadapter_ops.ms_deform_attn(
            value, [(1, 1)], points, weights, backend="cpu"
        ),
        "raw": lambda: ops.ms_deform_attn(value, *levels, points, weights),
        "backward": lambda: ops.ms_deform_attn_backward(
            points[:, :, 0, 0, 0, :1], value, *levels, points, weights, *[True] * 3
        ),
        "recorded": lambda: ops.ms_deform_attn(
            value.clone().requires_grad_(), *levels, points, weights
        ),
    }
    for call in calls.values():
        with pytest.raises(torch.cuda.OutOfMemoryError, match="allocate"):
            call()
