# SPDX-License-Identifier: Apache-2.0
"""Every instruction set that this processor has passes the tests of the CPU kernels."""

import os
import shutil

import pytest

import children
from optional import sweep

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"
)


@pytest.mark.parametrize("isa", sweep(children.ISAS, "baseline"))
def test_passes_the_tests_of_the_cpu_kernels(isa):
    children.require_isa(isa)
    # The interpreter's lock is the same for all, and its test needs a long call.
    only = children.CPU_TESTS_ONLY + " and not other_python_threads"
    done = children.pytest_on_cpu_kernels(only, VITADAPTER_CPU_ISA=isa)
    assert done.returncode == 0, f"{isa}:\n{done.stdout[-8000:]}{done.stderr[-2000:]}"


@pytest.mark.parametrize("isa", children.ISAS)
def test_module_shows_the_forced_instruction_set(isa):
    children.require_isa(isa)
    done = children.python(["-m", "vitadapter_ops"], VITADAPTER_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert f"{isa} kernels" in done.stdout


def test_unknown_instruction_set_is_an_error_that_names_the_valid_ones():
    error = children.error_of_unknown_isa()
    assert "VITADAPTER_CPU_ISA: expected one of " in error
    assert "baseline on this processor, got mmx" in error
