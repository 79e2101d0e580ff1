# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one step.

On a GPU it is what PyTorch's allocator says. On a CPU, in a fresh process, so that nothing measured
earlier counts, it is the growth of the process's resident
memory: its high-water mark while the step ran, minus what was resident before. The child may not
take more address space than the machine has memory left, so that an allocation fails and is
reported, instead of the kernel ending some process of its choice.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Share of the available memory a child may take: the rest of the machine must go on living.
USABLE_SHARE = 0.9

# How a failed allocation reads when it is neither MemoryError nor torch's own class:
# the CPU allocator, the C++ runtime and oneDNN, in this order.
_OUT_OF_MEMORY_PHRASES = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "could not create a memory",
    "not enough memory",
)
# How it reads where the cause is not told.
_VAGUE_PHRASE = "could not create a primitive"


class ChildError(RuntimeError):
    """An error in the child other than running out of memory; the text is its traceback."""


@dataclass(frozen=True)
class Peak:
    """What one step took on top of what was held before it.

    Attributes:
        status: "ok", "out of memory", or "killed" (ended by a signal).
        growth_bytes: peak during the step minus `held_bytes`.
        held_bytes: held before the step (weights, inputs; on a CPU the whole process).
        method: how it was measured.
        detail: for a person, when status is not "ok".
    """

    status: str
    growth_bytes: int | None = None
    held_bytes: int | None = None
    method: str = ""
    detail: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        phrase in str(error) for phrase in _OUT_OF_MEMORY_PHRASES
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def available_bytes() -> int | None:
    """Memory this process could still take: the machine's, or its container's where less."""
    found: list[int] = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            found.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return min(found) if found else None


def _status_bytes(field: str) -> int | None:
    """A size from the kernel's account of this process; None where there is no /proc."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    return None


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _max_resident_bytes() -> int | None:
    """The largest resident size since the process started; None where unknown (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _return_freed_memory() -> None:
    """Hand freed memory back to the system, so that the step cannot reuse it unseen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def limited(headroom: int | None) -> Iterator[None]:
    """Let this process take at most `headroom` more bytes of address space inside the block.

    Address space that was mapped earlier and freed since can be reused on top of that.
    """
    in_use = _status_bytes("VmSize")
    try:
        import resource
    except ImportError:
        headroom = None
    if headroom is None or in_use is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = in_use + headroom
    for existing in (soft, hard):
        if existing != resource.RLIM_INFINITY:
            limit = min(limit, existing)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except RuntimeError as error:
        # oneDNN says only this when it gets no memory, but also for other reasons. The error's
        # frames still hold their tensors here, so the space left tells which it was.
        left = limit - (_status_bytes("VmSize") or 0)
        if _VAGUE_PHRASE in str(error) and left < max(64 * 2**20, headroom // 10):
            raise MemoryError(str(error)) from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _measure_cuda(step: Callable[[], object], device: torch.device) -> Peak:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return Peak("ok", peak - held, held, "torch.cuda.max_memory_allocated")


def _measure_cpu(step: Callable[[], object], headroom: int | None) -> Peak:
    if headroom is None:
        available = available_bytes()
        headroom = None if available is None else int(available * USABLE_SHARE)
    _return_freed_memory()
    resettable = _reset_high_water_mark()
    held = _status_bytes("VmRSS")
    if resettable and held is not None:
        with limited(headroom):
            step()
        peak = _status_bytes("VmHWM")
        assert peak is not None
        return Peak("ok", max(0, peak - held), held, "VmHWM minus VmRSS before")
    before = _max_resident_bytes()
    with limited(headroom):
        step()
    after = _max_resident_bytes()
    if before is None or after is None:
        return Peak("ok", None, None, "not measurable on this platform")
    # An earlier peak hides part of the step's growth: a lower bound, and named as one.
    return Peak("ok", after - before, before, "growth of ru_maxrss (lower bound)")


def measure(step: Callable[[], object], device: torch.device, headroom: int | None = None) -> Peak:
    """Peak memory of one call of `step`, in this process."""
    if device.type == "cuda":
        return _measure_cuda(step, device)
    return _measure_cpu(step, headroom)


def _child(
    connection: Connection,
    prepare: Callable[..., Callable[[], object]],
    args: tuple[Any, ...],
    device: str,
    headroom: int | None,
) -> None:
    answer: Peak | str
    try:
        answer = measure(prepare(*args), torch.device(device), headroom)
    except Exception as error:
        if is_out_of_memory(error):
            answer = Peak("out of memory", detail=first_line(error))
        else:
            answer = traceback.format_exc()
    connection.send(answer)
    connection.close()


def _of_signal(number: int) -> Peak:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if name == "SIGKILL":  # what the kernel sends when the machine has no memory left
        return Peak("out of memory", detail="ended by the system (SIGKILL)")
    return Peak("killed", detail=f"ended by {name}")


def peak_of(
    prepare: Callable[..., Callable[[], object]],
    *args: Any,
    device: str = "cpu",
    headroom: int | None = None,
) -> Peak:
    """`peak_in_child` on a CPU; here on a GPU, where only what a step allocates counts.

    Raises:
        ChildError: see there.
    """
    where = torch.device(device)
    if where.type != "cuda":
        return peak_in_child(prepare, *args, device=device, headroom=headroom)
    gc.collect()
    try:
        return measure(prepare(*args), where)
    except Exception as error:
        if not is_out_of_memory(error):
            raise ChildError(traceback.format_exc()) from error
        return Peak("out of memory", detail=first_line(error))
    finally:
        torch.cuda.empty_cache()


def peak_in_child(
    prepare: Callable[..., Callable[[], object]],
    *args: Any,
    device: str = "cpu",
    headroom: int | None = None,
) -> Peak:
    """Peak memory of one step in a fresh process.

    Args:
        prepare: a function at the top level of a module; called in the child with `args`, it
            builds everything, warms up, and returns the step. Only the step is measured.
        device: "cpu", or a CUDA device such as "cuda:0".
        headroom: most bytes the step may take on a CPU; None: most of what the machine has free.

    Raises:
        ChildError: the child failed for another reason than memory; carries its traceback.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(sender, prepare, args, device, headroom), daemon=True
    )
    process.start()
    sender.close()  # so that a child that dies is seen as the end of the pipe
    try:
        answer = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        code = process.exitcode
        if code is not None and code < 0:
            return _of_signal(-code)
        raise ChildError(
            f"the child ended with exit code {code} without reporting; see its messages above"
        ) from None
    finally:
        receiver.close()
        if process.is_alive():
            process.terminate()
            process.join()
    if isinstance(answer, str):
        raise ChildError(answer)
    assert isinstance(answer, Peak)
    return answer
