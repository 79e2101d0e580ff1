# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu_check.py: what becomes of steps that end, fail, hang or cannot start."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _gpu_steps
import cases
import gpu_check
from gpu_check import Step


def step(name, code, seconds=60.0, **options):
    return Step(name, (sys.executable, "-c", code), seconds, **options)


def run(tmp_path, *groups, seconds=60.0):
    code = gpu_check.run_all(groups, tmp_path, {}, seconds, {"versions": {}})
    summary = json.loads((tmp_path / "summary.json").read_text())
    return code, summary, {each["name"]: each for each in summary["steps"]}


def test_a_step_that_fails_does_not_keep_later_ones_from_running(tmp_path, capsys):
    code, summary, steps = run(
        tmp_path,
        [step("build", "print('no compiler'); raise SystemExit(3)")],
        [step("tests", "print('all passed')")],
    )
    assert code == 1
    assert (summary["ok"], summary["complete"]) == (False, True)
    assert (steps["build"]["status"], steps["build"]["rc"]) == ("failed", 3)
    assert (steps["tests"]["status"], steps["tests"]["rc"]) == ("ok", 0)
    log = (tmp_path / "gpu-check.log").read_text()
    assert log.index("no compiler") < log.index("all passed")
    assert "no compiler" in capsys.readouterr().out
    assert not (tmp_path / "build.log").exists()


def test_a_step_beyond_its_budget_ends_with_all_that_it_started(tmp_path):
    sleeper = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {sleeper!r}])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    rc, _, steps = run(tmp_path, [step("slow", code, 1.5)], [step("next", "pass")])
    assert rc == 1
    assert (steps["slow"]["status"], steps["slow"]["rc"]) == ("timed out", None)
    assert steps["next"]["status"] == "ok"
    lines = (tmp_path / "gpu-check.log").read_text().splitlines()
    pid = next(int(line) for line in lines if line.isdigit())
    for _ in range(100):  # an orphan is taken care of by the system, in its own time
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the step's child still runs")


def test_nothing_starts_after_the_deadline(tmp_path):
    slow = step("slow", "import time; time.sleep(60)")
    rc, _, steps = run(tmp_path, [slow], [step("late", "pass")], seconds=0.5)
    assert rc == 1
    assert steps["late"]["status"] == "timed out"
    assert steps["late"]["detail"] == "no time left"


def test_steps_of_a_group_run_side_by_side(tmp_path):
    other = "import pathlib, time\nwhile not pathlib.Path({there!r}).exists(): time.sleep(0.01)\n"
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    wait = [
        step("a", f"open({first!r}, 'w')\n" + other.format(there=second), 20),
        step("b", f"open({second!r}, 'w')\n" + other.format(there=first), 20),
    ]
    assert run(tmp_path, wait)[0] == 0


def test_a_skipped_step_is_no_failure_and_a_missing_program_is_one(tmp_path):
    skipped = step("memcheck", "raise SystemExit(1)", skip="no compute-sanitizer")
    code, _, steps = run(tmp_path, [skipped])
    assert code == 0
    assert steps["memcheck"]["status"] == "skipped"
    assert steps["memcheck"]["detail"] == "no compute-sanitizer"
    code, _, steps = run(tmp_path, [Step("gone", ("no-such-program",), 5)])
    assert code == 1
    assert steps["gone"]["status"] == "failed"
    assert "no-such-program" in steps["gone"]["detail"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert f"no CUDA device: torch {torch.__version__}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_rivals_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--rivals", str(tmp_path)])
    assert "no .whl and no .tar.gz" in capsys.readouterr().err


def test_plan_fits_into_nine_minutes_and_eight_files(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    groups = gpu_check.steps_of(tmp_path, tmp_path, [])
    skipped = [each.name for group in groups for each in group if each.skip]
    assert skipped == ["rivals", "memcheck", "racecheck"]
    assert gpu_check.SECONDS < 540
    for group in groups:
        for each in group:
            assert Path(each.command[1]).is_file() or each.command[1] == "-m" or each.skip


def test_commands_of_the_plan_are_understood(tmp_path, monkeypatch):
    import attn
    import op

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: "compute-sanitizer")
    plan = {
        each.name: each.command
        for group in gpu_check.steps_of(tmp_path, tmp_path, [Path("a.whl")])
        for each in group
    }
    args = op.parse(plan["op"][2:])
    settings = op.settings_of(args)
    assert settings.on_gpu
    assert settings.dtypes == ("fp32", "fp16", "bf16")
    assert settings.passes == ("forward", "backward", "both")
    assert settings.cases[0].name == "encoder-800x1333"
    assert settings.cases[0].locations == "local"
    assert len(settings.cases) == 2 * len(cases.GPU_BENCH)
    assert attn.parse(plan["attn"][2:]).device == "cuda"
    assert op.parse(plan["host"][2:]).host
    assert plan["rivals"][-1] == "a.whl"
    assert plan["memcheck"][-1] == "small"


def test_names_of_the_small_subset_exist():
    assert set(_gpu_steps.LOCATED) <= {case.name for case in cases.SMALL}
    assert set(_gpu_steps.FUSED) <= {case.name for case in cases.OFFSETS}
    assert set(_gpu_steps.DTYPES) <= set(cases.DTYPES)


def test_kernels_that_cannot_be_built_fail_the_step(monkeypatch, capsys):
    broken = _gpu_steps._extension.Library(None, error="nvcc: no such file")
    monkeypatch.setattr(_gpu_steps._extension, "load", lambda device: broken)
    assert _gpu_steps.build("cuda") == 1
    assert "nvcc: no such file" in capsys.readouterr().out
