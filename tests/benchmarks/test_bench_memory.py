# SPDX-License-Identifier: Apache-2.0
"""benchmarks/common/memory.py: peaks in a child process, and the ways in which a child can end."""

from __future__ import annotations

import signal
import sys

import pytest

# The second one: a child must be able to import the functions it is handed by their module's name.
import child_steps
from benchmarks.common.memory import (
    ChildError,
    available_bytes,
    is_out_of_memory,
    peak_in_child,
)
from optional import require_cuda

MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS as on Linux")


@LINUX
def test_peak_counts_what_the_step_allocated_and_freed():
    peak = peak_in_child(child_steps.prepare_allocation, 300)
    assert peak.status == "ok"
    # The kernel counts pages per core and adds them up late: a few may be missing.
    assert 297 * MIB < peak.growth_bytes < 340 * MIB


@LINUX
def test_allocation_above_the_limit_is_out_of_memory():
    peak = peak_in_child(child_steps.prepare_allocation, 300, headroom=100 * MIB)
    assert peak.status == "out of memory"
    assert "allocate" in peak.detail
    assert peak.growth_bytes is None


@LINUX
def test_limit_is_lifted_afterwards():
    # In a child: what the tests before this one freed in this process could be allocated again.
    assert peak_in_child(child_steps.prepare_limit, 1, 64).status == "ok"


def test_error_in_the_child_arrives_with_its_traceback():
    with pytest.raises(ChildError, match="ValueError: wrong shape") as error:
        peak_in_child(child_steps.prepare_error, "wrong shape")
    assert "in step" in str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
@pytest.mark.parametrize(("name", "status"), [("SIGKILL", "out of memory"), ("SIGSEGV", "killed")])
def test_child_ended_by_a_signal_is_reported(name, status):
    peak = peak_in_child(child_steps.prepare_signal, int(getattr(signal, name)))
    assert peak.status == status
    assert name in peak.detail


def test_child_that_ends_silently_is_an_error():
    with pytest.raises(ChildError, match="exit code 3"):
        peak_in_child(child_steps.prepare_exit, 3)


@pytest.mark.parametrize(
    "text",
    ["[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "std::bad_alloc"],
)
def test_known_messages_are_out_of_memory(text):
    assert is_out_of_memory(RuntimeError(text))


def test_other_errors_are_not_out_of_memory():
    assert not is_out_of_memory(RuntimeError("expected 4 levels, got 3"))


@LINUX
def test_available_memory_is_known():
    assert available_bytes() > 0


@pytest.mark.gpu
def test_gpu_peak_counts_the_allocation():
    require_cuda()
    peak = peak_in_child(child_steps.prepare_gpu_allocation, 256, device="cuda")
    assert 256 * MIB <= peak.growth_bytes < 260 * MIB


@pytest.mark.gpu
def test_gpu_allocation_beyond_the_gpu_is_out_of_memory():
    require_cuda()
    assert (
        peak_in_child(child_steps.prepare_gpu_allocation, 2**24, device="cuda").status
        == "out of memory"
    )
