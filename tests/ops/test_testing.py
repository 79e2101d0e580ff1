# SPDX-License-Identifier: Apache-2.0
"""`vitadapter_ops.testing` as somebody uses it who writes a backend of his own."""

import pytest
import torch

from vitadapter_ops.testing import cases, gate, oracles

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


def test_wrong_uses_are_named():
    with pytest.raises(AssertionError, match=r"^compute: expected 4 results .*, got 1$"):
        _held(oracles.grid_sample, results=gate.NAMES[:1])
    with pytest.raises(ValueError, match="^dtypes: expected one of fp64, .*, got 'half'$"):
        _held(oracles.grid_sample, "half")
