# SPDX-License-Identifier: Apache-2.0
"""What correct means, for tests and benchmarks: the output and all three gradients of one case."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import cases
import oracles
from tolerances import assert_as_accurate_as_eager
from vitadapter_ops import ms_deform_attn

NAMES = ("output", "gradient of value", "gradient of locations", "gradient of weights")


def op(backend: str) -> Callable[..., Tensor]:
    """Our operator on one backend, with the arguments of `oracles.grid_sample`."""

    def function(value, shapes, locations, weights, starts=None):
        return ms_deform_attn(
            value, shapes, locations, weights, level_start_index=starts, backend=backend
        )

    return function


def run(function: Callable[..., Tensor], inputs: cases.Inputs, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients, as NAMES has them, on the CPU."""
    tensors = [t.detach().clone().requires_grad_() for t in inputs.tensors]
    out = function(tensors[0], inputs.spatial_shapes, *tensors[1:], inputs.level_start_index)
    grads = torch.autograd.grad(out, tensors, cotangent.to(out))
    return [t.detach().cpu() for t in (out, *grads)]


def check(
    case: cases.Case, dtypes: str, compute: Callable[[cases.Inputs, Tensor], list[Tensor]]
) -> None:
    """Holds a case's results to the fp64 reference, with eager torch as the measure.

    Args:
        case: the shape.
        dtypes: a name in `cases.DTYPES`.
        compute: from inputs and the output's gradient, both on the CPU, to what NAMES lists.
    """
    dtype, points = cases.DTYPES[dtypes]
    inputs = case.inputs().to(dtype, points=points)
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.queries, case.heads * case.channels)
    cotangent = torch.randn(shape, generator=generator).to(dtype)
    exact = run(op("reference"), inputs.to(torch.float64), cotangent)
    eager = run(oracles.grid_sample, inputs, cotangent)
    results = compute(inputs, cotangent)
    for what, got, plain, expected in zip(NAMES, results, eager, exact, strict=True):
        wanted = dtype if what in NAMES[:2] else points
        assert got.dtype == wanted, f"{what}: {got.dtype}, not {wanted}"
        assert_as_accurate_as_eager(what, got, plain, expected)


def check_backend(case: cases.Case, dtypes: str, backend: str, device: str) -> None:
    """`check` for one of our backends on a device."""
    dtype, points = cases.DTYPES[dtypes]

    def compute(inputs, cotangent):
        return run(op(backend), inputs.to(dtype, device, points), cotangent.to(device))

    check(case, dtypes, compute)
