# SPDX-License-Identifier: Apache-2.0
"""A step on a GPU in three ways: without the host, with warm or with cold caches; and with it.

The launch of a small kernel takes longer than the kernel. So many calls are captured in one CUDA
graph, which the device runs without the host:

    warm    the same inputs again and again: what fits into L2 is found there
    cold    copies of the inputs in turn, of which L2 has lost each before its turn comes again
    call    eager calls one after the other by the wall clock, until the device is done: whichever
            of host and device is slower

What stays in "warm" and "cold" is the gap between two kernels of a graph, about a microsecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from benchmarks.common.memory import first_line, is_out_of_memory
from benchmarks.common.timing import Case, time_once

KINDS = WARM, COLD, CALL = "warm", "cold", "call"
# Of one replay: far more than what an event can resolve.
REPLAY_SECONDS = 1e-3
MOST_CALLS = 200

Step = Callable[[], object]


class NotCaptured(RuntimeError):
    """Why a step cannot be part of a CUDA graph."""


def use_own_stream(device: torch.device) -> None:
    """Makes a stream of its own the current one, for everything that will be captured.

    The default stream cannot be captured, and autograd runs a backward on the stream on which its
    forward ran: a forward outside of the graph must have been on the stream of the capture.
    """
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))


def answers(device: str) -> bool:
    """Whether a device still does anything: an illegal access ends all work of a process on it."""
    if torch.device(device).type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).item())
    except RuntimeError:
        return False


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies(footprint: int, l2: int) -> int:
    """How many inputs of `footprint` bytes to take in turn, so that twice L2 lies between uses."""
    return 1 + math.ceil(2 * l2 / max(footprint, 1))


def capture(steps: Sequence[Step], calls: int, device: torch.device, pool: object) -> Step:
    """Captures `calls` calls of `steps`, in turn, and returns what replays them.

    Every step has to have run before: whatever it loads, compiles or tunes cannot be captured.

    Args:
        steps: what to call.
        calls: how often, all together.
        device: the device, with the current stream from `use_own_stream`.
        pool: memory shared by graphs whose results nobody reads (torch.cuda.graph_pool_handle), or
            None: its own. After a capture that failed, none succeeds in the same.

    Raises:
        NotCaptured: a step waits for the device, or does something else that no graph can hold.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(device)):
            for number in range(calls):
                steps[number % len(steps)]()
    except RuntimeError as error:
        # Ending the capture fails too, and its error hides the first.
        cause = error.__context__ if isinstance(error.__context__, Exception) else error
        if is_out_of_memory(cause):
            raise cause from None
        raise NotCaptured(first_line(cause)) from error
    return graph.replay


def cases_of(
    steps: Sequence[Step], device: torch.device, pool: object, kinds: Sequence[str] = KINDS
) -> tuple[dict[str, Case], str]:
    """What to time of a step, by KINDS.

    Args:
        steps: the step with each copy of its inputs.
        device: see `capture`.
        pool: see `capture`.
        kinds: which of KINDS.

    Returns:
        The cases, and a note where they are no graphs.
    """
    first = steps[0]
    for step in steps:
        step()
    once = min(time_once(first, device) for _ in range(3))
    calls = min(MOST_CALLS, max(1, math.ceil(REPLAY_SECONDS / once)))
    in_turn = len(steps) * math.ceil(calls / len(steps))

    def several() -> None:
        for _ in range(calls):
            first()

    made: dict[str, Case] = {}
    note = ""
    try:
        if WARM in kinds:
            made[WARM] = Case(capture([first], calls, device, pool), first, calls=calls)
        if COLD in kinds:
            made[COLD] = Case(capture(steps, in_turn, device, pool), calls=in_turn)
    except NotCaptured as reason:
        flush = torch.empty(2 * l2_bytes(device), dtype=torch.uint8, device=device).zero_
        made = {WARM: Case(several, first, calls=calls), COLD: Case(first, flush)}
        note = f"no CUDA graph ({reason}): its device times include waiting for the host"
    made[CALL] = Case(several, first, calls=calls, clock="host")
    return {kind: made[kind] for kind in kinds}, note
