# SPDX-License-Identifier: Apache-2.0
"""Implementations of deformable attention that are timed beside ours, each one optional."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.memory import first_line
from benchmarks.common.report import versions, without_paths
from vitadapter_ops.testing import cases, gate, oracles

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # value, locations, weights


@dataclass(frozen=True)
class Implementation:
    """One implementation.

    Attributes:
        name: as --against, the tables and the results have it.
        bind: a call for inputs of one shape; what depends on nothing else is done here.
        module: what has to be importable.
        reason: whatever else is missing, or None.
        around: within what its steps run.
        dtypes: the dtypes of value that it is timed with.
    """

    name: str
    bind: Callable[[cases.Inputs], Call]
    module: str
    reason: Callable[[], str | None] = lambda: None
    around: Callable[[], contextlib.AbstractContextManager[None]] | None = None
    dtypes: tuple[torch.dtype, ...] = tuple({value for value, _ in cases.DTYPES.values()})

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        try:
            importlib.import_module(self.module)
        except (ImportError, OSError, SyntaxError) as error:
            # OSError: a library of its own does not load; SyntaxError: it is for a newer Python.
            return without_paths(first_line(error))
        return self.reason()

    @property
    def version(self) -> str | None:
        package = self.module.split(".")[0]
        return versions(package)[package]


def _ours(inputs: cases.Inputs, backend: str = "auto") -> Call:
    function = gate.op(backend)
    return lambda value, *points: function(value, inputs.spatial_shapes, *points)


def _why_no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "it is for a GPU"


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    options = torch.utils.deterministic
    fill, options.fill_uninitialized_memory = options.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        options.fill_uninitialized_memory = fill


def _grid_sample(inputs: cases.Inputs) -> Call:
    return lambda value, *points: oracles.grid_sample(value, inputs.spatial_shapes, *points)


def _compiled(inputs: cases.Inputs) -> Call:
    # Compiled for this very shape, with no trace of earlier ones; and so that the graph can be kept
    # for a second backward pass.
    torch.compiler.reset()
    functorch = importlib.import_module("torch._functorch.config")
    functorch.donated_buffer = False
    function = torch.compile(oracles.grid_sample, dynamic=False)
    return lambda value, *points: function(value, inputs.spatial_shapes, *points)


def _levels(inputs: cases.Inputs) -> tuple[Tensor, Tensor]:
    """Shapes and starts of the levels, as the original kernel takes them."""
    device = inputs.value.device
    shapes = torch.tensor(inputs.spatial_shapes, dtype=torch.long, device=device)
    return shapes, torch.tensor(inputs.starts, dtype=torch.long, device=device)


def _torch_ms_deform_attn(inputs: cases.Inputs) -> Call:
    function = importlib.import_module("torch_ms_deform_attn").ms_deform_attn
    levels = _levels(inputs)
    return lambda value, *points: function(value, *levels, *points)


def _torch_ms_deform_attn_in_fp32(inputs: cases.Inputs) -> Call:
    call = _torch_ms_deform_attn(inputs)
    return lambda value, *points: call(value.float(), *map(Tensor.float, points)).to(value.dtype)


def _mmcv(inputs: cases.Inputs) -> Call:
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    shapes, starts = _levels(inputs)
    if inputs.value.device.type == "cpu":  # it has no kernel there: its own grid_sample runs
        function = module.multi_scale_deformable_attn_pytorch
        return lambda value, *points: function(value, shapes, *points)
    apply = module.MultiScaleDeformableAttnFunction.apply
    step = len(inputs.value)  # images at a time: all
    return lambda value, *points: apply(value, shapes, starts, *points, step)


_DEFORMOPS = "deformops.registry"
# Two projects have this module name; each knows itself by its function.
_MSDA_TRITON = "msda_triton"


def _why_no_msda_triton(function: str) -> Callable[[], str | None]:
    def reason() -> str | None:
        if not hasattr(importlib.import_module(_MSDA_TRITON), function):
            return f"the {_MSDA_TRITON} that is installed is another project's"
        return _why_no_gpu()

    return reason


def _roulbac_msda_triton(inputs: cases.Inputs) -> Call:
    function = importlib.import_module(_MSDA_TRITON).multi_scale_deformable_attention
    levels = _levels(inputs)

    def call(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        # It takes one dtype for all.
        return function(value, *levels, locations.to(value.dtype), weights.to(value.dtype))

    return call


def _rziga_msda_triton(inputs: cases.Inputs) -> Call:
    # Not its public function, which answers every failure by running grid_sample.
    frontend = importlib.import_module(f"{_MSDA_TRITON}.frontend")
    function = frontend.triton_multiscale_deformable_attention
    shapes, _ = _levels(inputs)
    return lambda value, *points: function(value, shapes, *points, "zeros", False).flatten(2)


def _deformops(inputs: cases.Inputs, *, fp32_sums: bool = False) -> Call:
    registry = importlib.import_module(_DEFORMOPS)
    # Its own choice sums the gradient of a 16-bit value in 16 bits on sm_90; its Triton kernels,
    # asked for by name, sum in fp32.
    options = {"backend": registry.Backend.TRITON} if fp32_sums else {}
    # In what its kernels take, or every call casts them.
    levels = [each.to(torch.int32) for each in _levels(inputs)]

    def call(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        points = locations.to(value.dtype), weights.to(value.dtype).flatten(3)
        return registry.msda(value, *levels, *points, **options).flatten(2)

    return call


OURS = Implementation("vitadapter_ops", _ours, "vitadapter_ops")
COMPILED = Implementation("grid_sample-compiled", _compiled, "torch")
# Our own kernels for machines without nvcc, beside those that `auto` takes.
TRITON = Implementation(
    "vitadapter_ops-triton", lambda inputs: _ours(inputs, "triton"), "triton", _why_no_gpu
)
# On a CPU the backward always repeats to the bit.
DETERMINISTIC = Implementation(
    "vitadapter_ops-deterministic", _ours, "vitadapter_ops", _why_no_gpu, _deterministic
)
RIVALS = (
    Implementation("grid_sample", _grid_sample, "torch"),
    TRITON,
    DETERMINISTIC,
    COMPILED,
    Implementation("torch-ms-deform-attn", _torch_ms_deform_attn, "torch_ms_deform_attn"),
    # The other way to compute with 16 bits in a kernel that is made for fp32.
    Implementation(
        "torch-ms-deform-attn-fp32",
        _torch_ms_deform_attn_in_fp32,
        "torch_ms_deform_attn",
        dtypes=(torch.float16, torch.bfloat16),
    ),
    Implementation("onedl-mmcv", _mmcv, "mmcv.ops.multi_scale_deform_attn"),
    Implementation(
        "deformops",
        _deformops,
        _DEFORMOPS,
        _why_no_gpu,
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
    ),
    # What ours does; in fp32 the two are one.
    Implementation(
        "deformops-fp32",
        functools.partial(_deformops, fp32_sums=True),
        _DEFORMOPS,
        _why_no_gpu,
        dtypes=(torch.float16, torch.bfloat16),
    ),
    Implementation(
        "roulbac-msda-triton",
        _roulbac_msda_triton,
        _MSDA_TRITON,
        _why_no_msda_triton("multi_scale_deformable_attention"),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
    ),
    Implementation(
        "rziga-msda-triton",
        _rziga_msda_triton,
        _MSDA_TRITON,
        _why_no_msda_triton("multiscale_deformable_attention"),
        dtypes=(torch.float64, torch.float32, torch.float16),
    ),
)


def named(name: str) -> Implementation:
    return next(each for each in (OURS, *RIVALS) if each.name == name)


def is_rival(name: str) -> bool:
    """Whether an implementation is another project's; the ways of ours begin with OURS.name."""
    return not name.startswith(OURS.name)


def forward_step(call: Call, inputs: cases.Inputs) -> Callable[[], Tensor]:
    """The forward pass without a graph."""

    def step() -> Tensor:
        with torch.inference_mode():
            return call(*inputs.tensors)

    return step


def backward_step(
    call: Call, inputs: cases.Inputs, cotangent: Tensor | None = None
) -> Callable[[], object]:
    """The backward pass alone, all three gradients, as often as wanted on one kept graph."""
    leaves = _leaves(inputs)
    out = call(*leaves)
    given = cotangent_of(out) if cotangent is None else cotangent.to(out.dtype)
    return lambda: torch.autograd.grad(out, leaves, given, retain_graph=True)


def training_step(
    call: Call, inputs: cases.Inputs, cotangent: Tensor | None = None
) -> Callable[[], object]:
    """Forward with a graph, then backward; without a cotangent it makes one each time."""
    leaves = _leaves(inputs)

    def step() -> object:
        out = call(*leaves)
        given = cotangent_of(out) if cotangent is None else cotangent.to(out.dtype)
        return torch.autograd.grad(out, leaves, given)

    return step


def step_of(
    each: Implementation,
    call: Call,
    inputs: cases.Inputs,
    which: str,
    cotangent: Tensor | None = None,
) -> Callable[[], object]:
    """One pass of an implementation; `call` is bound to inputs of this shape."""
    if which == "forward":
        step: Callable[[], object] = forward_step(call, inputs)
    else:
        make = backward_step if which == "backward" else training_step
        step = make(call, inputs, cotangent)
    if each.around is None:
        return step
    around = each.around

    def within() -> object:
        with around():
            return step()

    return within


def _leaves(inputs: cases.Inputs) -> list[Tensor]:
    return [each.detach().clone().requires_grad_() for each in inputs.tensors]


def cotangent_of(out: Tensor) -> Tensor:
    generator = torch.Generator(out.device).manual_seed(0)
    return torch.randn(out.shape, generator=generator, dtype=out.dtype, device=out.device)
