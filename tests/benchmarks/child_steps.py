# SPDX-License-Identifier: Apache-2.0
"""What test_bench_memory.py runs in child processes, in a module that a child can import."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

MIB = 2**20


def allocate(mib: int) -> None:
    torch.ones(mib * MIB // 4)


def prepare_allocation(mib: int) -> Callable[[], None]:
    allocate(64)  # freed before the step: must not count
    return lambda: allocate(mib)


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
