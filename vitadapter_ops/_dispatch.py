# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call, and why. One predicate per backend selects, explains and raises."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import _extension
from .triton import availability

MAX_LEVELS = 64  # of all kernels; csrc/params.h: kMaxLevels


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


@dataclass(frozen=True)
class Call:
    """What the choice depends on: operator, device type, dtype of value, number of levels."""

    op: str
    device: str
    dtype: torch.dtype
    levels: int = 1


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: what users call it.
        suffix: what its operators in torch.ops.vitadapter_ops have behind their names.
        can_run: None, or the reason why it cannot run a call.
        by_name: None, or the reason why `auto` does not take it although it could run.
    """

    name: str
    suffix: str
    can_run: Callable[[Call], str | None]
    by_name: Callable[[Call], str | None] = lambda call: None


def _native(device: str) -> Callable[[Call], str | None]:
    def can_run(call: Call) -> str | None:
        if call.device != device:
            return f"it needs tensors on {device}, these are on {call.device}"
        if call.levels > MAX_LEVELS:
            return f"its kernels take at most {MAX_LEVELS} levels, got {call.levels}"
        library = _extension.load(device)
        if library.origin is None:
            return f"its library is not available: {library.error}"
        return None

    return can_run


def _triton(call: Call) -> str | None:
    if call.levels > MAX_LEVELS:
        return f"its kernels take at most {MAX_LEVELS} levels, got {call.levels}"
    return availability.why_not(call.device)


def _interpreted(call: Call) -> str | None:
    return "it would be interpreted, slowly" if call.device == "cpu" else None


def _always(call: Call) -> str | None:
    return None


# In the order in which `auto` tries them.
BACKENDS = (
    Backend("cuda", "", _native("cuda")),
    Backend("triton", "_triton", _triton, _interpreted),
    Backend("cpu", "", _native("cpu")),
    Backend("reference", "_reference", _always),
)


# What "auto" is taken for, in this thread.
_auto = contextvars.ContextVar("vitadapter_ops_auto", default="auto")


@contextlib.contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Within it every call of this thread that leaves the choice to "auto" runs on one backend.

    That is what modules, drop-ins and models do; a call that names a backend keeps it. Contexts
    nest, and end with an error as without. Other threads are not affected, nor is what was compiled
    or exported before; what is compiled or exported within keeps the backend. A backward runs where
    its forward did; what activation checkpointing computes again, where the backward is called.

    Args:
        name: "cuda", "triton", "cpu" or "reference"; "auto" undoes an outer context.

    Raises:
        TypeError: name is no str.
        ValueError: no backend has this name.

    A call within it raises BackendUnavailable where the backend cannot run it.
    """
    _check_name("name", name)
    token = _auto.set(name)
    try:
        yield
    finally:
        _auto.reset(token)


def wanted(backend: str) -> str:
    """The backend that a call names, or in its place what `force_backend` says for "auto"."""
    return _auto.get() if type(backend) is str and backend == "auto" else backend


def choose(backend: str, op: str, device: str, dtype: torch.dtype, levels: int) -> str:
    """The name of what serves a call of `op`; compiles the native library at its first use.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailable: the backend that was asked for cannot run.
    """
    return op + _find(wanted(backend), Call(op, device, dtype, levels)).suffix


# What torch.compiler.assume_constant_result does, which first imports all of torch's compiler: as
# long again as torch itself, in every process.
wanted._dynamo_marked_constant = True  # type: ignore[attr-defined]
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find(backend: str, call: Call) -> Backend:
    _check_name("backend", backend)
    if backend == "auto":
        return next(
            candidate
            for candidate in BACKENDS
            if candidate.can_run(call) is None and candidate.by_name(call) is None
        )
    candidate = next(each for each in BACKENDS if each.name == backend)
    reason = candidate.can_run(call)
    if reason is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot run: {reason}")
    return candidate


def _check_name(argument: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a str, got {type(name).__name__}")
    names = ["auto", *(candidate.name for candidate in BACKENDS)]
    if name not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {name!r}")


OPS = ("ms_deform_attn", "ms_deform_attn_from_offsets")


def available_backends() -> list[str]:
    """The backends that can run on this machine, in the order in which `auto` tries them.

    Compiles the native libraries if they are neither prebuilt nor cached.
    """
    devices = ["cpu"]
    devices += [gpu for gpu in ("cuda", "xpu") if getattr(torch, gpu).is_available()]
    return [
        backend.name
        for backend in BACKENDS
        if any(backend.can_run(Call(OPS[0], device, torch.float32)) is None for device in devices)
    ]


def explain_backend(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    op: str = "ms_deform_attn",
) -> str:
    """Says, a line for each backend, which one `auto` takes and why the others do not run.

    Within `vitadapter_ops.testing.force_backend` that is the one which it names.

    Args:
        device: where the tensors are.
        dtype: the dtype of value.
        op: "ms_deform_attn" or "ms_deform_attn_from_offsets".

    Raises:
        TypeError: dtype is none.
        ValueError: no operator has this name.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    call = Call(op, torch.device(device).type, dtype)
    asked = wanted("auto")
    by = "auto" if asked == "auto" else "force_backend"
    chosen = _find("auto", call).name if asked == "auto" else asked
    lines = [f"{op} on {call.device}, {str(dtype).removeprefix('torch.')}:"]
    for backend in BACKENDS:
        reason = backend.can_run(call)
        if reason is not None:
            state = f"cannot run: {reason}"
        elif backend.name == chosen:
            state = f"chosen by {by}" + _detail(backend.name)
        else:
            why = backend.by_name(call)
            state = "can run" if why is None else f"can run, but only by name: {why}"
        lines.append(f"  {backend.name:<10} {state}")
    return "\n".join(lines)


def _detail(name: str) -> str:
    if name not in ("cpu", "cuda"):
        return ""
    library = _extension.load(name)
    isa = f", {_extension.cpu_instruction_set()} kernels" if name == "cpu" else ""
    replaced = f"; {library.error}" if library.error is not None else ""
    return f" ({library.origin} library{isa}{replaced})"
