# SPDX-License-Identifier: Apache-2.0
"""What correct means: the outputs and all gradients of one case, held to the fp64 reference.

`check` and `check_offsets` judge any function, `check_backend` and `check_offsets_backend` one of
our own backends. A result may be EAGER_FACTOR times as far from the fp64 one as eager torch's at
the same dtypes, and no further; whatever is wrong raises AssertionError, and an error beyond its
bound `tolerances.Inaccurate`, which is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitadapter_ops import ms_deform_attn, ms_deform_attn_from_offsets

from . import cases, oracles
from .tolerances import assert_as_accurate_as_eager, require

NAMES = ("output", "gradient of value", "gradient of locations", "gradient of weights")


def op(backend: str) -> Callable[..., Tensor]:
    """`ms_deform_attn` on one backend, with the arguments of `oracles.grid_sample`."""

    def function(
        value: Tensor,
        shapes: list[tuple[int, int]],
        locations: Tensor,
        weights: Tensor,
        starts: list[int] | None = None,
    ) -> Tensor:
        return ms_deform_attn(
            value, shapes, locations, weights, level_start_index=starts, backend=backend
        )

    return function


def run(function: Callable[..., Tensor], inputs: cases.Inputs, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients of a function, as NAMES has them, on the CPU.

    Args:
        function: with the arguments and the result of `oracles.grid_sample`.
        inputs: in the dtypes and on the device on which it is to run.
        cotangent: [B, Q, M * D], the gradient of the output; it is moved there.
    """
    tensors = [t.detach().clone().requires_grad_() for t in inputs.tensors]
    out = function(tensors[0], inputs.spatial_shapes, *tensors[1:], inputs.level_start_index)
    return _with_gradients(NAMES, (out,), tensors, (cotangent,))


def _with_gradients(
    names: Sequence[str],
    outs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Outputs and the gradients of `tensors`, on the CPU; names are those of all of them."""
    for name, out, cotangent in zip(names, outs, cotangents, strict=False):
        require(isinstance(out, Tensor), f"{name}: expected a tensor, got {type(out).__name__}")
        shape, expected = list(out.shape), list(cotangent.shape)
        require(shape == expected, f"{name}: shape {shape}, not {expected}")
        require(out.requires_grad, f"{name}: has no gradient")
    grads = torch.autograd.grad(
        outs,
        tensors,
        [cotangent.to(out) for cotangent, out in zip(cotangents, outs, strict=True)],
        allow_unused=True,
    )
    for name, grad in zip(names[len(outs) :], grads, strict=True):
        require(grad is not None, f"{name}: there is none")
    return [t.detach().cpu() for t in (*outs, *grads)]


def dense_permuted(tensor: Tensor) -> Tensor:
    """The same values with the strides of another order of dimensions, without gaps."""
    order = list(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


class _Backwards(TorchDispatchMode):
    """Records what our backward operators were asked for, and how large each result was."""

    def __init__(self, gradients: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gradients = gradients
        self.asked: list[tuple[tuple[bool, ...], list[int]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__.endswith("_backward.default"):
            self.asked.append((tuple(args[-self.gradients :]), [t.numel() for t in result]))
        return result


def check_needs(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], needs: tuple[bool, ...]
) -> None:
    """Holds a backward of ours to compute the gradients that are needed, and none that is not.

    Args:
        function: from `inputs` to the output, by one of our operators.
        inputs: all that may get a gradient.
        needs: which of them do.
    """

    def grads(needs: tuple[bool, ...]) -> list[Tensor | None]:
        tensors = [t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        out = function(*tensors)
        if out.requires_grad:
            torch.autograd.backward(out, torch.ones_like(out))
        return [t.grad for t in tensors]

    everything = grads((True,) * len(inputs))
    with _Backwards(len(inputs)) as record:
        got = grads(needs)
    if not any(needs):
        require(not record.asked, f"expected no backward, got {record.asked}")
        return
    require(len(record.asked) == 1, f"expected one backward, got {record.asked}")
    ((flags, sizes),) = record.asked
    require(flags == needs, f"expected a backward for {needs}, got {flags}")
    for i, (tensor, need) in enumerate(zip(inputs, needs, strict=True)):
        wanted = tensor.numel() if need else 0
        require(sizes[i] == wanted, f"gradient {i}: expected {wanted} elements, got {sizes[i]}")
        require((got[i] is not None) == need, f"gradient {i}: given is {not need}, not {need}")
        if need:
            torch.testing.assert_close(got[i], everything[i])


def check(
    case: cases.Case,
    dtypes: str,
    compute: Callable[[cases.Inputs, Tensor], Sequence[Tensor]],
    judge: str = "cpu",
) -> None:
    """Holds a case's results to the fp64 reference, with eager torch as the measure.

    Args:
        case: the shape.
        dtypes: a name in `cases.DTYPES`.
        compute: from inputs and the output's gradient [B, Q, M * D], both on the CPU in those
            dtypes, to what NAMES lists, on the CPU: `run` makes it of a function.
        judge: the device on which reference and eager torch run.

    Raises:
        AssertionError: a result is missing, has another shape or dtype, is not finite, or is less
            accurate than allowed; the message says which.
        ValueError: dtypes is no such name.
    """
    dtype, points = _dtypes(dtypes)
    # A copy: others get the same inputs, whatever `compute` does to them.
    inputs = cases.drawn(case).copy().to(dtype, points=points)
    cotangent = _cotangent(case, dtype)
    at_judge = cotangent.to(judge)
    exact = run(op("reference"), inputs.to(torch.float64, judge), at_judge)
    eager = run(oracles.grid_sample, inputs.to(dtype, judge, points), at_judge)
    wanted = (dtype, dtype, points, points)
    _judge(NAMES, wanted, compute(inputs, cotangent), eager, exact)


def _dtypes(name: str) -> tuple[torch.dtype, torch.dtype]:
    if name not in cases.DTYPES:
        raise ValueError(f"dtypes: expected one of {', '.join(cases.DTYPES)}, got {name!r}")
    return cases.DTYPES[name]


def _cotangent(case: cases.Case | cases.OffsetCase, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.queries, case.heads * case.channels)
    return torch.randn(shape, generator=generator).to(dtype)


def _judge(
    names: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    results: Sequence[Tensor],
    eager: list[Tensor],
    exact: list[Tensor],
) -> None:
    require(
        len(results) == len(names),
        f"compute: expected {len(names)} results ({', '.join(names)}), got {len(results)}",
    )
    for what, wanted, got, plain, expected in zip(
        names, dtypes, results, eager, exact, strict=True
    ):
        require(isinstance(got, Tensor), f"{what}: expected a tensor, got {type(got).__name__}")
        require(got.dtype == wanted, f"{what}: {got.dtype}, not {wanted}")
        assert_as_accurate_as_eager(what, got, plain, expected)


def check_backend(
    case: cases.Case, dtypes: str, backend: str, device: str, judge: str = "cpu"
) -> None:
    """`check` for one of our backends on a device."""
    dtype, points = _dtypes(dtypes)

    def compute(inputs: cases.Inputs, cotangent: Tensor) -> list[Tensor]:
        return run(op(backend), inputs.to(dtype, device, points), cotangent.to(device))

    check(case, dtypes, compute, judge)


OFFSET_NAMES = (
    "output",
    "weights",
    "gradient of value",
    "gradient of reference points",
    "gradient of offsets",
    "gradient of logits",
)


def from_offsets(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The fused operator on one backend, with the arguments of `oracles.from_offsets`."""

    def function(
        inputs: cases.OffsetInputs, value: Tensor, *points: Tensor
    ) -> tuple[Tensor, Tensor]:
        reference, offsets, logits = points
        results = ms_deform_attn_from_offsets(
            value,
            inputs.spatial_shapes,
            reference,
            offsets,
            logits,
            **inputs.keywords,
            return_weights=True,
            backend=backend,
        )
        assert isinstance(results, tuple)
        return results

    return function


def run_offsets(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: cases.OffsetInputs,
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Outputs and gradients of a function, as OFFSET_NAMES has them, on the CPU.

    Args:
        function: with the arguments and the results of `oracles.from_offsets`.
        inputs: in the dtypes and on the device on which it is to run.
        cotangents: the gradients of output [B, Q, M * D] and weights [B, Q, M, K].
    """
    tensors = [t.detach().clone().requires_grad_() for t in inputs.tensors]
    outs = function(inputs, *tensors)
    pair = isinstance(outs, tuple) and len(outs) == 2
    require(pair, f"expected output and weights, got {type(outs).__name__}")
    return _with_gradients(OFFSET_NAMES, outs, tensors, cotangents)


def check_offsets(
    case: cases.OffsetCase,
    dtypes: str,
    compute: Callable[[cases.OffsetInputs, list[Tensor]], Sequence[Tensor]],
) -> None:
    """`check` for the fused operator.

    Args:
        case: the shape.
        dtypes: a name in `cases.DTYPES`; points are offsets and logits.
        compute: from inputs and the gradients by output and weights, all on the CPU, to what
            OFFSET_NAMES lists, on the CPU: `run_offsets` makes it of a function.

    Raises:
        AssertionError: as `check`.
        ValueError: dtypes is no such name.
    """
    dtype, points = _dtypes(dtypes)
    inputs = case.inputs(stored=points).to(dtype, points=points)
    weights = torch.randn(inputs.attention_logits.shape, generator=torch.Generator().manual_seed(1))
    cotangents = [_cotangent(case, dtype), weights.to(points)]
    exact = run_offsets(from_offsets("reference"), inputs.to(torch.float64), cotangents)
    eager = run_offsets(oracles.from_offsets, inputs, cotangents)
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = (dtype, points, dtype, compute_dtype, points, points)
    _judge(OFFSET_NAMES, wanted, compute(inputs, cotangents), eager, exact)


def check_offsets_backend(case: cases.OffsetCase, dtypes: str, backend: str, device: str) -> None:
    """`check_offsets` for one of our backends on a device."""
    dtype, points = _dtypes(dtypes)

    def compute(inputs: cases.OffsetInputs, cotangents: list[Tensor]) -> list[Tensor]:
        inputs = inputs.to(dtype, device, points)
        return run_offsets(from_offsets(backend), inputs, [c.to(device) for c in cotangents])

    check_offsets(case, dtypes, compute)
