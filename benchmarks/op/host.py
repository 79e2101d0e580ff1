# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host before the kernel runs: checks, dispatch, allocation, launch.

Calls of a shape so small that its kernel is over before the next call comes, one after the other
without waiting for the device. On a CPU the kernel itself is part of the time. On a machine without
a GPU, Triton's calls end in a launch that does nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

import vitadapter_ops
from benchmarks.common.console import LOOK, columns
from benchmarks.common.timing import Timing
from vitadapter_ops import _dispatch, functional
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


@contextlib.contextmanager
def _launch_of_nothing() -> Iterator[None]:
    """Triton's operators as on a GPU, for tensors on a CPU, up to the launch."""
    import triton

    from vitadapter_ops.triton import launch

    target = SimpleNamespace(backend="cuda", arch=90, warp_size=32)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments: None

    backends = tuple(
        _dispatch.Backend("triton", "_triton", lambda call: None) if b.name == "triton" else b
        for b in _dispatch.BACKENDS
    )
    stub = SimpleNamespace(runtime=SimpleNamespace(driver=driver), compile=triton.compile)

    def forget():
        for each in (_dispatch._chosen, functional._plans, launch._known):
            each.clear()
        launch._prepare.cache_clear()

    forget()
    with (
        mock.patch.object(_dispatch, "BACKENDS", backends),
        mock.patch.object(launch, "triton", stub),
        mock.patch.object(launch.Source, "compile", return_value=Kernel()),
    ):
        yield
    forget()


def measure(device: str, batches: int) -> dict[Key, Timing]:
    """Seconds of a call, one sample for each batch; operators and backends take turns."""
    gpu = torch.device(device).type == "cuda"
    available = vitadapter_ops.available_backends()
    native = "cuda" if gpu else "cpu"
    backends = [native] if native in available else []
    stubbed: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if gpu and "triton" in available:
        backends.append("triton")
    elif not gpu:
        with contextlib.suppress(ImportError):
            from vitadapter_ops.triton import launch

            if not launch.INTERPRETED:
                backends.append("triton")
                stubbed = _launch_of_nothing()
    with stubbed:
        return _measure(steps(device, backends), batches, torch.cuda.synchronize if gpu else None)


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
