# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels in the instruction set that this process runs.

test_cpu_instruction_sets.py repeats this file for every other one that the machine has, and
tests/sanitize under the sanitizers.
"""

import ctypes
import os
import threading
import time

import pytest
import torch

from vitadapter_ops import _extension, available_backends, explain_backend, ms_deform_attn
from vitadapter_ops.testing import cases, gate, oracles
from vitadapter_ops.testing.tolerances import (
    CPU_FP64_ULPS,
    assert_as_accurate_as_eager,
    assert_same_definition,
)

NAMES = ("output", "gradient of value", "gradient of locations", "gradient of weights")
LEVELS = ((5, 7), (3, 4))


@pytest.fixture(autouse=True, scope="module")
def _library():
    if "cpu" not in available_backends():
        reason = _extension.why_no_jit("cpu")
        if reason is None:
            pytest.fail(explain_backend())
        pytest.skip(reason)


def run(inputs, cotangent, backend="cpu", wanted=(True, True, True)):
    """Output and gradients; None for a gradient that is not wanted."""
    tensors = [t.detach().requires_grad_(w) for t, w in zip(inputs.tensors, wanted, strict=True)]
    shapes, starts = inputs.spatial_shapes, inputs.level_start_index
    if backend == "eager":
        out = oracles.grid_sample(tensors[0], shapes, *tensors[1:], starts)
    else:
        out = ms_deform_attn(
            tensors[0], shapes, *tensors[1:], level_start_index=starts, backend=backend
        )
    wanted_tensors = [t for t in tensors if t.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted_tensors, cotangent.to(out)))
    return [out.detach(), *(next(grads) if t.requires_grad else None for t in tensors)]


def cotangent_of(case):
    return torch.randn(case.batch, case.queries, case.heads * case.channels, dtype=torch.float64)


def test_the_instruction_set_that_was_asked_for_runs():
    asked = os.environ.get("VITADAPTER_CPU_ISA")
    assert asked in (None, _extension.cpu_instruction_set())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 12, 24, 31, 32, 40, 64, 71, 128])
def test_every_width(channels, dtypes):
    dtype, points = cases.DTYPES[dtypes]
    case = cases.Case("width", LEVELS, channels=channels)
    inputs = case.inputs().to(dtype, points=points)
    cotangent = cotangent_of(case).to(dtype)
    exact = run(inputs.to(torch.float64), cotangent, "reference")
    eager, got = run(inputs, cotangent, "eager"), run(inputs, cotangent)
    for name, a, b, c in zip(NAMES, got, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, a, b, c)


# All are large enough for several tasks. How planes are shared out depends on how many there are.
SHARED = (
    cases.Case("many-planes", LEVELS, batch=2, queries=150, heads=8, channels=32),
    cases.Case("a-remainder-of-planes", LEVELS, batch=1, queries=400, heads=3, channels=40),
    cases.Case("one-plane", ((9, 8),), batch=1, queries=1000, heads=1, channels=64, points=8),
    cases.Case("one-plane-of-71-channels", LEVELS, batch=1, queries=700, heads=1, channels=71),
    cases.Case("planes-of-128-channels", LEVELS, batch=1, queries=300, heads=2, channels=128),
    cases.Case("fewer-pixels-than-bands", ((2, 3),), batch=1, queries=3000, heads=1, channels=8),
)
WANTED = {
    "all": (True, True, True),
    "value": (True, False, False),
    "locations": (False, True, False),
    "weights": (False, False, True),
}


@pytest.mark.parametrize("dtypes", ["fp64", "fp32", "bf16_points_fp32"])
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_same_bits_for_any_number_of_threads(case, dtypes, threads):
    dtype, points = cases.DTYPES[dtypes]
    inputs, cotangent = case.inputs().to(dtype, points=points), cotangent_of(case)
    threads(1)
    expected = run(inputs, cotangent)
    for number in (1, 2, 8):
        threads(number)
        for what, wanted in WANTED.items():
            got = run(inputs, cotangent, wanted=wanted)
            for name, a, b in zip(NAMES, got, expected, strict=True):
                assert a is None or torch.equal(a, b), f"{name}, {number} threads, wanted: {what}"


# With copies of value and, where queries are few, without; with masks, boxes, and several spans of
# channels.
SHARED_OFFSETS = (
    cases.OffsetCase("packed", LEVELS, (4, 2), 2, 150, 8, 32, masked=True),
    cases.OffsetCase("read-in-place", ((30, 40), (15, 20)), (4, 2), 1, 90, 3, 40, masked=True),
    cases.OffsetCase("one-plane", ((9, 8),), (8,), 1, 1000, 1, 71, boxes=True, scaled=True),
)


@pytest.mark.parametrize("dtypes", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("case", SHARED_OFFSETS, ids=str)
def test_fused_same_bits_for_any_number_of_threads(case, dtypes, threads):
    dtype, points = cases.DTYPES[dtypes]
    inputs = case.inputs().to(dtype, points=points)
    cotangents = [cotangent_of(case), torch.randn(inputs.attention_logits.shape)]
    threads(1)
    expected = gate.run_offsets(gate.from_offsets("cpu"), inputs, cotangents)
    exact = gate.run_offsets(gate.from_offsets("reference"), inputs.to(torch.float64), cotangents)
    eager = gate.run_offsets(oracles.from_offsets, inputs, cotangents)
    for name, a, b, c in zip(gate.OFFSET_NAMES, expected, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, a, b, c)
    for number in (2, 8):
        threads(number)
        got = gate.run_offsets(gate.from_offsets("cpu"), inputs, cotangents)
        for name, a, b in zip(gate.OFFSET_NAMES, got, expected, strict=True):
            assert torch.equal(a, b), f"{name}, {number} threads"


@pytest.mark.parametrize("points", [1, 3, 4, 7, 12, 16, 17, 40])
@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_softmax_of_any_length(points, dtypes):
    dtype, stored = cases.DTYPES[dtypes]
    case = cases.OffsetCase("softmax", ((3, 4),), (points,), 1, 50, 2)
    inputs = case.inputs(stored=stored).to(dtype, points=stored)
    logits = (inputs.attention_logits * 30).requires_grad_()
    value, reference, offsets, _ = inputs.tensors
    _, weights = gate.from_offsets("cpu")(inputs, value, reference, offsets, logits)
    exact = logits.double().softmax(-1)
    assert_as_accurate_as_eager("weights", weights, logits.softmax(-1), exact)


@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("case", [SHARED[0], SHARED[2]], ids=str)
def test_same_bits_from_run_to_run(case, deterministic, threads):
    inputs, cotangent = case.inputs(dtype=torch.float32), cotangent_of(case)
    threads(8)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = run(inputs, cotangent)
        for _ in range(5):
            for name, a, b in zip(NAMES, run(inputs, cotangent), first, strict=True):
                assert torch.equal(a, b), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("channels", [1, 3, 8, 31, 64])
@pytest.mark.parametrize("points", [1, 4, 8])
@pytest.mark.parametrize("levels", [LEVELS[:1], ((8, 12), (4, 6), (2, 3))], ids=["1", "3"])
def test_fp64_equals_the_reference_to_the_last_bits(levels, points, channels):
    """The output bit for bit; the gradients' sums over channels and queries have other orders."""
    case = cases.Case("fp64", levels, queries=40, channels=channels, points=points)
    inputs, cotangent = case.inputs(), cotangent_of(case)
    got, expected = run(inputs, cotangent), run(inputs, cotangent, "reference")
    assert torch.equal(got[0], expected[0])
    for name, a, b in zip(NAMES[1:], got[1:], expected[1:], strict=True):
        assert_same_definition(name, a, b, CPU_FP64_ULPS)


def ticks_during(call):
    """How often this thread wakes up while another is inside `call`."""
    inside = threading.Event()
    done = threading.Event()

    def work():
        inside.set()
        call()
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    ticks = 0
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    return ticks


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_other_python_threads_run_meanwhile(direction, threads):
    threads(1)
    case = cases.Case("long", ((64, 64),), 1, 20000, 8, 64, 8)
    inputs = case.inputs(dtype=torch.float32)
    tensors = [t.requires_grad_(direction == "backward") for t in inputs.tensors]

    def forward():
        return ms_deform_attn(tensors[0], inputs.spatial_shapes, *tensors[1:], backend="cpu")

    if direction == "forward":
        ticks = ticks_during(forward)
    else:
        out = forward()
        ticks = ticks_during(lambda: torch.autograd.grad(out, tensors, torch.ones_like(out)))
    # PyDLL keeps the interpreter's lock: the test can fail.
    held = ticks_during(lambda: ctypes.PyDLL(None).usleep(200_000))
    assert held < 5 < ticks
