# SPDX-License-Identifier: Apache-2.0
"""The checks of the emulated CUDA kernels catch mistakes in them.

A copy of the source that makes one of many mistakes, or none, as it is told (mutants.py).
"""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

import children
import emulation
import mutants
from once import once
from vitadapter_ops import _extension

STEPS = Path(mutants.__file__).with_name("mutant_steps.py")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What the checks say of each mistake, by its name, and of none ("None")."""
    if shutil.which(emulation.CXX) is None:
        pytest.skip("needs a C++ compiler")
    folder = once(tmp_path_factory, "emulated-mutants", judge_all)
    return json.loads((folder / "verdicts.json").read_text())


def judge_all(folder):
    source = folder / "csrc"
    shutil.copytree(_extension.source_dir(), source)
    prelude = mutants.plant(source, mutants.EMULATED | mutants.TOO_SMALL)
    defines = ("VITADAPTER_VECTOR_REDUCTIONS=1", "VITADAPTER_ONLY_FP32")
    emulation.build(folder, source, *defines, include=prelude)
    done = children.python([str(STEPS), str(folder)])
    assert done.returncode == 0, done.stderr


def test_no_mistake_is_seen_where_there_is_none(verdicts):
    none = verdicts["None"]
    assert none["status"] == 0
    assert none["first error"] is None
    assert set(none["full blocks"]) == {None}


@pytest.mark.parametrize("name", mutants.EMULATED)
def test_a_mistake_in_the_kernels_is_caught(verdicts, name):
    # What is read before it is written is NaN, and as a pixel it leads out of the process's memory,
    # as do rows that do not exist.
    status = verdicts[name]["status"]
    assert status in (0, -signal.SIGSEGV, -signal.SIGABRT)
    assert status != 0 or verdicts[name]["first error"] is not None


@pytest.mark.parametrize("name", mutants.TOO_SMALL)
def test_a_launch_with_too_little_shared_memory_is_caught(verdicts, name):
    assert verdicts[name]["status"] == 0
    errors = verdicts[name]["full blocks"]
    assert len(errors) == 7 * 2
    for error in errors:
        assert re.fullmatch(r"a kernel wrote to byte \d+ of \d+ bytes of shared memory", error)


def test_every_mark_in_the_source_is_of_one_mistake():
    found = mutants.marks(_extension.source_dir())
    assert {name: len(places) for name, places in found.items()} == dict.fromkeys(
        [*mutants.EMULATED, *mutants.TOO_SMALL, *mutants.SANITIZED], 1
    )
