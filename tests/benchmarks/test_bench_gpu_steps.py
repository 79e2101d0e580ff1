# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/steps.py and tests.py: the stages that build, and that run the tests."""

from __future__ import annotations

import json
import subprocess

from benchmarks.common.programs import module
from benchmarks.gpu import steps, tests
from vitadapter_ops.testing import cases


def test_names_of_the_small_subset_exist():
    assert set(steps.LOCATED) <= {case.name for case in cases.SMALL}
    assert set(steps.FUSED) <= {case.name for case in cases.OFFSETS}
    assert set(steps.DTYPES) <= set(cases.DTYPES)


def test_kernels_that_cannot_be_built_fail_the_step(monkeypatch, capsys):
    broken = steps._extension.Library(None, error="nvcc: no such file")
    monkeypatch.setattr(steps._extension, "load", lambda device: broken)
    assert steps.main(["build", "cuda"]) == 1
    assert "nvcc: no such file" in capsys.readouterr().out


def test_failures_of_tests_are_kept_when_the_run_is_ended(tmp_path):
    test = tmp_path / "test_some.py"
    test.write_text(
        "import time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_slow(): time.sleep(60)\n"
    )
    out = tmp_path / "tests.json"
    command = [*module("gpu.tests"), "--rehearse", "--out", str(out), str(test)]
    command += ["--deselect", tests.REHEARSED]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if "test_bad" in line:
            break
    process.terminate()
    process.wait(20)
    found = json.loads(out.read_text())
    assert not found["complete"]
    assert found["counts"]["passed"] == 1
    assert [each["test"].split("::")[1] for each in found["failures"]] == ["test_bad"]
    assert "assert 1 == 2" in found["failures"][0]["said"]
