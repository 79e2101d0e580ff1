# SPDX-License-Identifier: Apache-2.0
"""What test_bench_memory.py runs in child processes, in a module that a child can import."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from benchmarks.common.memory import is_out_of_memory, limited

MIB = 2**20


def allocate(mib: int) -> None:
    torch.ones(mib * MIB // 4)


def prepare_allocation(mib: int) -> Callable[[], None]:
    allocate(64)  # freed before the step: must not count
    return lambda: allocate(mib)


def prepare_limit(headroom_mib: int, mib: int) -> Callable[[], None]:
    """A step that may not allocate `mib` inside the block, and may after it."""

    def step() -> None:
        try:
            with limited(headroom_mib * MIB):
                allocate(mib)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            raise AssertionError(f"{mib} MiB were to be had with {headroom_mib} MiB of headroom")
        allocate(mib)

    return step


def prepare_gpu_allocation(mib: int) -> Callable[[], None]:
    return lambda: torch.ones(mib * MIB // 4, device="cuda").sum().item()


def prepare_error(text: str) -> Callable[[], None]:
    def step() -> None:
        raise ValueError(text)

    return step


def prepare_signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def prepare_exit(code: int) -> Callable[[], None]:
    return lambda: os._exit(code)
