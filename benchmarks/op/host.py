# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host before the kernel runs: checks, dispatch, allocation, launch.

Calls of a shape so small that its kernel is over before the next call comes, one after the other
without waiting for the device. On a CPU the kernel itself is part of the time. On a machine without
a GPU, Triton's calls end in a launch that does nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from rich.table import Table
from torch import Tensor

import vitadapter_ops
from benchmarks.common.console import LOOK, columns
from benchmarks.common.timing import Timing
from vitadapter_ops.testing import cases

LEVELS = ((4, 4), (2, 2), (1, 1), (1, 1))
CALLS = 200  # fewer than a device's queue holds: no call waits for it
FORWARD, BOTH = "forward", "forward+backward"
# At most so many microseconds for a call of a public function, by backend and pass.
TARGETS = {("native", FORWARD): 10.0, ("native", BOTH): 40.0, ("triton", FORWARD): 25.0}
NOTE = (
    f"Forward without gradients; median of batches of {CALLS} calls. "
    "raw: torch.ops.vitadapter_ops. torch's share of forward+backward: an autograd.Function that "
    "computes nothing, and torch.autograd.grad of it."
)

Key = tuple[str, str, str]  # what is called, backend, pass
Step = Callable[[], object]


class _Share(torch.autograd.Function):
    """Three tensors in, three gradients out, and nothing computed."""

    @staticmethod
    def forward(ctx, out, *tensors):
        ctx.save_for_backward(*tensors)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return None, *ctx.saved_tensors


def _training(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], grad: Tensor) -> Step:
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def steps(device: str, backends: list[str]) -> dict[Key, Step]:
    """Calls of each operator on each of the backends."""
    located = cases.Case("host", LEVELS, 1, 1, 1, 8).inputs().to(torch.float32, device)
    fused = cases.OffsetCase("host", LEVELS, (4,) * 4, 1, 1, 1, 8).inputs()
    fused = fused.to(torch.float32, device)
    raw = (located.value, located.flat_shapes, located.starts, *located.tensors[1:])
    grad = torch.ones(1, 1, 8, device=device)
    made: dict[Key, Step] = {}
    for backend in backends:

        def public(*tensors, backend=backend):
            value, *points = tensors
            return vitadapter_ops.ms_deform_attn(value, LEVELS, *points, backend=backend)

        def from_offsets(*tensors, backend=backend):
            value, *points = tensors
            return vitadapter_ops.ms_deform_attn_from_offsets(
                value, LEVELS, *points, backend=backend
            )

        for name, function, inputs in (
            ("ms_deform_attn", public, located.tensors),
            ("ms_deform_attn_from_offsets", from_offsets, fused.tensors),
        ):
            made[name, backend, FORWARD] = lambda f=function, inputs=inputs: f(*inputs)
            made[name, backend, BOTH] = _training(function, inputs, grad)
        suffix = "_triton" if backend == "triton" else ""
        for name, arguments in (
            ("ms_deform_attn", raw),
            ("ms_deform_attn_from_offsets", (*fused.arguments, False)),
        ):
            op = getattr(torch.ops.vitadapter_ops, f"{name}{suffix}").default
            made[f"raw {name}", backend, FORWARD] = lambda op=op, arguments=arguments: op(
                *arguments
            )
    made["torch's share", "", BOTH] = _training(
        lambda *leaves: _Share.apply(grad, *leaves), located.tensors, grad
    )
    return made


def _launch_nothing() -> None:
    """From here on Triton's operators run on a CPU's tensors as on a GPU's, up to the launch.

    It stays so until the process ends, as does what the library remembers of these calls.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from vitadapter_ops.triton import availability, launch

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments: None

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    availability.why_not = lambda device: None
    launch.Source.compile = lambda source, target: Kernel()


def _backends(gpu: bool) -> list[str]:
    """What to call on a device of this kind; without a GPU, Triton with no launch."""
    available = vitadapter_ops.available_backends()
    native = "cuda" if gpu else "cpu"
    found = [native] if native in available else []
    if gpu:
        return found + ["triton"] * ("triton" in available)
    with contextlib.suppress(ImportError):
        from vitadapter_ops.triton import launch

        if not launch.INTERPRETED:
            _launch_nothing()
            found.append("triton")
    return found


def measure(device: str, batches: int) -> dict[Key, Timing]:
    """Seconds of a call, one sample for each batch; operators and backends take turns.

    On a CPU for a process that does nothing else, see `_launch_nothing`.
    """
    gpu = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if gpu else None
    return _measure(steps(device, _backends(gpu)), batches, wait)


def _measure(
    made: dict[Key, Step], batches: int, wait: Callable[[], None] | None
) -> dict[Key, Timing]:
    samples: dict[Key, list[float]] = {key: [] for key in made}
    for turn in range(batches + 1):
        for key, step in made.items():
            if wait is not None:
                wait()
            with torch.set_grad_enabled(key[2] == BOTH):
                begin = time.perf_counter()
                for _ in range(CALLS):
                    step()
                seconds = (time.perf_counter() - begin) / CALLS
            if turn > 0:  # the first batch compiles
                samples[key].append(seconds)
    return {key: Timing(tuple(each)) for key, each in samples.items()}


def target(key: Key) -> float | None:
    """Microseconds that a call should take at most, where there is a goal."""
    name, backend, what = key
    kind = "native" if backend in ("cpu", "cuda") else backend
    return None if name.startswith("raw") else TARGETS.get((kind, what))


def table(timings: dict[Key, Timing]) -> Table:
    result = Table(title="Host time of a call", **LOOK)
    columns(result, "operator", "backend", "pass", "[us]", "p20-p80", "target")
    for key, timing in timings.items():
        low, middle, high = (1e6 * each for each in (timing.p20, timing.median, timing.p80))
        goal = target(key)
        result.add_row(
            *key, f"{middle:.1f}", f"{low:.1f}-{high:.1f}", "" if goal is None else f"{goal:g}"
        )
    return result
