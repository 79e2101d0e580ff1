# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/runner.py: what becomes of steps that end, fail, hang or cannot start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from benchmarks.common.programs import exit_on
from benchmarks.gpu.runner import ENDING, Run, Step
from processes import is_gone


def step(name, code, seconds=60.0, **options):
    return Step(name, (sys.executable, "-c", code), seconds, **options)


def run(tmp_path, *steps, seconds=60.0):
    code = Run(steps, tmp_path, {}, seconds, {"versions": {}}).run()
    summary = json.loads((tmp_path / "summary.json").read_text())
    return code, summary, {each["name"]: each for each in summary["steps"]}


def test_a_step_that_fails_does_not_keep_later_ones_from_running(tmp_path, capsys):
    code, summary, steps = run(
        tmp_path,
        step("build", "print('no compiler'); raise SystemExit(3)"),
        step("tests", "print('all passed')", alone=True),
    )
    assert code == 1
    assert (summary["ok"], summary["complete"]) == (False, True)
    assert (steps["build"]["status"], steps["build"]["rc"]) == ("failed", 3)
    assert (steps["tests"]["status"], steps["tests"]["rc"]) == ("ok", 0)
    log = (tmp_path / "gpu-check.log").read_text()
    assert log.index("no compiler") < log.index("all passed")
    assert "no compiler" in capsys.readouterr().out
    assert not (tmp_path / "build.log").exists()


def test_what_needs_a_failed_step_is_skipped_and_the_rest_is_not(tmp_path):
    code, _, steps = run(
        tmp_path,
        step("build", "raise SystemExit(1)"),
        step("smoke", "pass", needs=("build",)),
        step("ceilings", "pass"),
    )
    assert code == 1
    assert (steps["smoke"]["status"], steps["smoke"]["detail"]) == ("skipped", "build failed")
    assert steps["ceilings"]["status"] == "ok"


def test_a_step_beyond_its_budget_ends_with_all_that_it_started(tmp_path):
    sleeper = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {sleeper!r}])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    rc, _, steps = run(tmp_path, step("slow", code, 1.5), step("next", "pass", alone=True))
    assert rc == 1
    assert (steps["slow"]["status"], steps["slow"]["rc"]) == ("timed out", None)
    assert steps["next"]["status"] == "ok"
    lines = (tmp_path / "gpu-check.log").read_text().splitlines()
    assert is_gone(next(int(line) for line in lines if line.isdigit()))


def test_what_a_failed_step_left_behind_ends_before_the_next(tmp_path):
    sleeper = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys\n"
        f"print(subprocess.Popen([sys.executable, '-c', {sleeper!r}]).pid, flush=True)\n"
        "raise SystemExit(1)\n"
    )
    run(tmp_path, step("dies", code))
    lines = (tmp_path / "gpu-check.log").read_text().splitlines()
    assert is_gone(next(int(line) for line in lines if line.isdigit()))


def test_a_stages_result_says_how_long_it_took(tmp_path):
    result = tmp_path / "times.json"
    write = f"import time; time.sleep(0.3); open({str(result)!r}, 'w').write('{{\"rows\": []}}')"
    run(tmp_path, step("times", write, writes=("times.json",)))
    found = json.loads(result.read_text())
    assert found["rows"] == []
    assert found["stage_seconds"] >= 0.3


def test_nothing_starts_after_the_deadline_and_results_so_far_stay(tmp_path):
    result = tmp_path / "slow.json"
    write = f"import time; open({str(result)!r}, 'w').write('{{\"kept\": 1}}'); time.sleep(60)"
    slow = step("slow", write, writes=("slow.json",))
    result.write_text("of an earlier run")
    rc, _, steps = run(tmp_path, slow, step("late", "pass", alone=True), seconds=3)
    assert rc == 1
    assert steps["slow"]["status"] == steps["late"]["status"] == "timed out"
    assert steps["late"]["detail"] == "no time left"
    assert json.loads(result.read_text())["kept"] == 1


def test_a_signal_while_a_step_starts_ends_that_step_too(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)  # of those who do not wait either

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    steps = [step(name, "import time; time.sleep(60)", alone=True) for name in ("first", "next")]
    with exit_on(*ENDING), pytest.raises(SystemExit) as stop:
        run(tmp_path, *steps)
    assert stop.value.code == 128 + signal.SIGTERM
    (first,) = started
    assert first.poll() is not None
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["complete"]
    assert [(each["name"], each["detail"]) for each in summary["steps"]] == [
        ("first", "interrupted")
    ]


def test_results_of_an_earlier_run_do_not_stay(tmp_path):
    for name in ("times.json", "summary.json", "gpu-check.log"):
        (tmp_path / name).write_text("of an earlier run")
    run(tmp_path, step("times", "raise SystemExit(1)", writes=("times.json",)))
    assert not (tmp_path / "times.json").exists()
    assert "earlier" not in (tmp_path / "gpu-check.log").read_text()


def test_steps_run_side_by_side_unless_they_are_to_be_alone(tmp_path):
    names = ("a", "b", "timed", "c", "d")
    code = (
        "import pathlib, time\n"
        "folder, own = pathlib.Path({folder!r}), {own!r}\n"
        "(folder / own).touch()\n"
        "time.sleep(0.2)\n"
        "until = time.time() + 20\n"
        "while time.time() < until and not all((folder / n).exists() for n in {others!r}):\n"
        "    time.sleep(0.01)\n"
        "present = sorted(p.name for p in folder.iterdir())\n"
        "assert present == sorted({present!r}), present\n"
        "time.sleep(0.5)\n"
        "(folder / own).unlink()\n"
    )
    folder = tmp_path / "running"
    folder.mkdir()
    together = {
        "a": ["a", "b"],
        "b": ["a", "b"],
        "timed": ["timed"],
        "c": ["c", "d"],
        "d": ["c", "d"],
    }
    steps = [
        step(
            name,
            code.format(
                folder=str(folder), own=name, others=together[name], present=together[name]
            ),
            alone=name == "timed",
        )
        for name in names
    ]
    code, _, outcomes = run(tmp_path, *steps)
    assert code == 0, outcomes


def test_a_skipped_step_is_no_failure_and_a_missing_program_is_one(tmp_path):
    skipped = step("memcheck", "raise SystemExit(1)", skip="no compute-sanitizer")
    code, _, steps = run(tmp_path, skipped, step("next", "pass", needs=("memcheck",)))
    assert code == 0
    assert steps["memcheck"]["status"] == "skipped"
    assert steps["memcheck"]["detail"] == "no compute-sanitizer"
    assert steps["next"]["status"] == "ok"
    code, _, steps = run(tmp_path, Step("gone", ("no-such-program",), 5))
    assert code == 1
    assert steps["gone"]["status"] == "failed"
    assert "no-such-program" in steps["gone"]["detail"]


def test_what_a_stage_found_is_shown(tmp_path, capsys):
    lines = "print(*(f'line {n}' for n in range(9)), sep='\\n')"
    run(tmp_path, step("times", lines, shown=3), step("build", "print('quiet')"))
    said = capsys.readouterr().out
    assert "line 6\nline 7\nline 8\n" in said
    assert "line 5" not in said
    assert "quiet" not in said
