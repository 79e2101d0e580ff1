# SPDX-License-Identifier: Apache-2.0
"""`vitadapter_ops.testing` as somebody uses it who writes a backend of his own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vitadapter_ops import (
    BackendUnavailable,
    MSDeformAttn,
    _checks,
    available_backends,
    explain_backend,
    ms_deform_attn,
)
from vitadapter_ops.testing import cases, force_backend, gate, oracles

CASE = cases.SMALL[3]


def _held(attention, dtypes="fp32", results=gate.NAMES):
    """Holds a function to the gate, which is shown as many of its results as it has names."""

    def compute(inputs, cotangent):
        return gate.run(attention, inputs, cotangent)[: len(results)]

    gate.check(CASE, dtypes, compute)


@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_a_right_backend_passes(dtypes):
    _held(oracles.grid_sample, dtypes)


def _shifted(value, shapes, locations, weights, starts=None):
    return oracles.grid_sample(value, shapes, locations + 1e-3, weights, starts)


def _frozen_locations(value, shapes, locations, weights, starts=None):
    frozen = locations.detach() + 0 * locations
    return oracles.grid_sample(value, shapes, frozen, weights, starts)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (_shifted, "^output: error"),
        (_frozen_locations, "^gradient of locations: error"),
        (lambda *args: oracles.grid_sample(*args)[:, :-1], "^output: shape"),
        (lambda *args: oracles.grid_sample(*args).double(), "^output: torch.float64, not"),
        (lambda *args: oracles.grid_sample(*args) * float("nan"), "^output: not finite"),
    ],
)
def test_a_wrong_backend_is_refused(wrong, error):
    def compute(inputs, cotangent):
        tensors = [t.clone().requires_grad_() for t in inputs.tensors]
        out = wrong(tensors[0], inputs.spatial_shapes, *tensors[1:])
        grads = torch.autograd.grad(out, tensors, cotangent[:, : out.shape[1]].to(out))
        return [out.detach(), *grads]

    with pytest.raises(AssertionError, match=error):
        gate.check(CASE, "fp32", compute)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (
            lambda v, s, at, w, starts=None: oracles.grid_sample(v, s, at.detach(), w, starts),
            "^gradient of locations: there is none",
        ),
        (lambda *args: oracles.grid_sample(*args).detach(), "^output: has no gradient"),
        (lambda *args: oracles.grid_sample(*args)[:, :-1], "^output: shape"),
        (lambda *args: None, "^output: expected a tensor, got NoneType"),
        (
            lambda v, s, at, w, starts=None: oracles.grid_sample(v, s, at.flip(-1), w, starts),
            "^output: error",
        ),
    ],
)
def test_what_run_finds_wrong_is_named(wrong, error):
    with pytest.raises(AssertionError, match=error):
        _held(wrong)


def test_one_result_of_the_fused_operator_is_too_few():
    case = cases.OFFSETS[0]

    def compute(inputs, cotangents):
        return gate.run_offsets(lambda *args: oracles.from_offsets(*args)[0], inputs, cotangents)

    with pytest.raises(AssertionError, match=r"^expected output and weights, got Tensor"):
        gate.check_offsets(case, "fp32", compute)


def test_inputs_that_are_changed_are_nobody_elses():
    def spoil(inputs, cotangent):
        for tensor in inputs.tensors:
            tensor.zero_()
        return gate.run(oracles.grid_sample, inputs, cotangent)

    for _ in range(2):
        with pytest.raises(AssertionError):
            gate.check(CASE, "fp64", spoil)


def test_wrong_uses_are_named():
    with pytest.raises(AssertionError, match=r"^compute: expected 4 results .*, got 1$"):
        _held(oracles.grid_sample, results=gate.NAMES[:1])
    with pytest.raises(ValueError, match=r"^dtypes: expected one of fp64, .*, got 'half'$"):
        _held(oracles.grid_sample, "half")


# --- force_backend ------------------------------------------------------------------------------


def _auto():
    inputs = CASE.inputs(dtype=torch.float32)
    return ms_deform_attn(inputs.value, inputs.spatial_shapes, *inputs.tensors[1:])


def _is_the_reference():
    """Whether `_auto` has the bits of the reference, whose sums the CPU kernels do not repeat."""
    inputs = CASE.inputs(dtype=torch.float32)
    exact = gate.op("reference")(inputs.value, inputs.spatial_shapes, *inputs.tensors[1:])
    return torch.equal(_auto(), exact)


@pytest.fixture
def native():
    if "cpu" not in available_backends() or _is_the_reference():
        pytest.skip("needs the CPU library")


def test_auto_is_the_forced_backend_until_the_context_ends(native):
    with force_backend("reference"):
        assert _is_the_reference()
        with force_backend("auto"):
            assert not _is_the_reference()
        assert _is_the_reference()
    assert not _is_the_reference()
    with pytest.raises(KeyError), force_backend("reference"):
        raise KeyError
    assert not _is_the_reference()


def test_a_named_backend_and_another_thread_are_not_forced(native):
    inputs = CASE.inputs(dtype=torch.float32)
    arguments = inputs.value, inputs.spatial_shapes, *inputs.tensors[1:]
    named = gate.op("cpu")(*arguments)
    with force_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert torch.equal(gate.op("cpu")(*arguments), named)
        assert torch.equal(pool.submit(_auto).result(), named)


def test_a_module_runs_on_the_forced_backend_and_says_when_it_cannot():
    module = MSDeformAttn(24, n_levels=2, n_heads=3)
    query, value = torch.randn(1, 5, 24), torch.randn(1, 30, 24)
    points = torch.rand(1, 5, 2, 2)
    with force_backend("cuda"), pytest.raises(BackendUnavailable, match=r"^backend .cuda. cannot"):
        module(query, points, value, [(4, 6), (2, 3)])


@pytest.mark.parametrize(("name", "error"), [("cudnn", ValueError), (None, TypeError)])
def test_no_such_backend_can_be_forced(name, error):
    with pytest.raises(error, match=r"^name: expected"), force_backend(name):
        pass


def test_a_compiled_call_takes_the_forced_backend(native):
    torch.compiler.reset()
    with force_backend("reference"):
        compiled = torch.compile(_called, backend="eager", fullgraph=True)
        inputs = CASE.inputs(dtype=torch.float32)
        got = compiled(inputs.value, *inputs.tensors[1:])
        assert torch.equal(got, _auto())


def _called(value, locations, weights):
    return ms_deform_attn(value, list(CASE.shapes), locations, weights)


def test_dtypes_of_the_cases_are_those_of_the_operator():
    values = {value for value, _ in cases.DTYPES.values()}
    assert values == set(_checks.FLOATING) == set(launch_types())
    for value in _checks.FLOATING:
        points = {points for v, points in cases.DTYPES.values() if v == value}
        wide = torch.float64 if value == torch.float64 else torch.float32
        assert points == {value, wide}


def launch_types():
    pytest.importorskip("triton")
    from vitadapter_ops.triton import launch

    return launch._TYPES


def test_the_explanation_names_the_forced_backend():
    with force_backend("reference"):
        said = explain_backend()
    assert "reference  chosen by force_backend" in said
    assert "chosen by auto" not in said
