# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/check.py: what becomes of steps that end, fail, hang or cannot start."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import smoke as _gpu_smoke
from benchmarks.gpu import steps as _gpu_steps
from benchmarks.gpu import tests as _gpu_tests
from benchmarks.gpu import times as _gpu_times
from benchmarks.gpu.check import Plan, Step
from vitadapter_ops.testing import cases


def step(name, code, seconds=60.0, **options):
    return Step(name, (sys.executable, "-c", code), seconds, **options)


def run(tmp_path, *steps, seconds=60.0):
    code = gpu_check.Run(steps, tmp_path, {}, seconds, {"versions": {}}).run()
    summary = json.loads((tmp_path / "summary.json").read_text())
    return code, summary, {each["name"]: each for each in summary["steps"]}


def is_gone(pid):
    for _ in range(200):  # an orphan is taken care of by the system, in its own time
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def children_of(pid):
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            after_name = stat.read_text().rpartition(")")[2].split()
            if int(after_name[1]) == pid:
                children.append(int(stat.parent.name))
    return children


# --- running steps ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_run_that_is_ended_ends_its_steps_and_keeps_what_they_found(tmp_path, number):
    out = tmp_path / "out"
    command = [*gpu_check.module("gpu.check"), "--out", str(out), "--rehearse"]
    command += ["--stages", "smoke"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    log = out / "smoke-cuda.log"
    for _ in range(1200):
        if log.exists():
            break
        time.sleep(0.05)
    children = children_of(process.pid)
    assert len(children) >= 2
    os.kill(process.pid, number)
    assert process.wait(30) == 128 + number
    assert all(map(is_gone, children))
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["ok"]
    assert {each["detail"] for each in summary["steps"] if each["stage"] == "smoke"} == {
        "interrupted"
    }
    assert [each.name for each in tmp_path.iterdir()] == ["out"]  # no temporary folder


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


# --- the plan -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _capability(monkeypatch):
    monkeypatch.setattr(gpu_check, "gpu_capability", lambda: "9.0")


def plan_of(tmp_path, archives=()):
    return Plan(tmp_path / "out", tmp_path / "folder", archives)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"no CUDA device: torch {torch.__version__}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_rivals_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--rivals", str(tmp_path)])
    assert "no .whl and no .tar.gz" in capsys.readouterr().err


def test_an_unknown_stage_is_refused_with_the_valid_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.parse(["--out", str(tmp_path), "--stages", "smoke", "speed"])
    said = capsys.readouterr().err
    assert "speed" in said
    for stage in gpu_check.STAGES:
        assert stage in said


def test_every_stage_has_steps_and_what_is_timed_runs_alone(tmp_path):
    steps = plan_of(tmp_path).steps()
    assert list(dict.fromkeys(each.stage for each in steps)) == list(gpu_check.STAGES)
    alone = {each.stage for each in steps if each.alone}
    assert alone == {"ceilings", "times", "profile", "op", "attn", "model"}
    assert len({each.name for each in steps}) == len(steps)
    for each in steps:
        module = each.command[each.command.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None


def test_the_plan_fits_into_nine_minutes(tmp_path):
    """The budgets of what decides; what comes later gets the time that is left."""
    assert gpu_check.SECONDS < 540
    steps = {each.name: each for each in plan_of(tmp_path).steps()}
    smoke = max(steps["build-cuda"].seconds, steps["smoke-triton"].seconds)
    first = smoke + steps["smoke-cuda"].seconds
    first += sum(steps[name].seconds for name in ("ceilings", "times", "profile"))
    assert first <= gpu_check.SECONDS


def test_each_rival_is_installed_alone(tmp_path):
    archives = [Path("deformops-3.0.1-py3-none-any.whl"), Path("torch_ms_deform_attn-0.1.1.tar.gz")]
    plan = plan_of(tmp_path, archives)
    steps = [each for each in plan.steps() if each.name.startswith("rival-")]
    assert [each.name for each in steps] == [f"rival-{archive}" for archive in archives]
    for each, (archive, site) in zip(steps, plan.sites.items(), strict=True):
        assert each.command[-2:] == (str(site), str(archive))
        assert each.environment == {"FORCE_CUDA": "1"}
    assert len(set(plan.sites.values())) == len(archives)


def test_rivals_are_found_from_the_callers_folder(tmp_path, monkeypatch):
    (tmp_path / "archives").mkdir()
    for name in ("deformops-2.0.tar.gz", "deformops-3.0.1-py3-none-any.whl"):
        (tmp_path / "archives" / name).touch()
    monkeypatch.chdir(tmp_path)
    args = gpu_check.parse(["--out", "out", "--rivals", "archives"])
    assert [each.name for each in args.archives] == [
        "deformops-2.0.tar.gz",
        "deformops-3.0.1-py3-none-any.whl",
    ]
    assert all(each.is_absolute() for each in args.archives)
    names = [each.name for each in plan_of(tmp_path, args.archives).steps()]
    assert len(set(names)) == len(names)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert gpu_check.main(["--out", str(tmp_path / "file" / "out"), "--rehearse"]) == 2
    said = capsys.readouterr().err
    assert "--out: cannot write to" in said
    assert said.count("\n") == 1


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_check,
        "missing_module",
        lambda name: "rich is not importable" if name == "rich" else None,
    )
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--rehearse"]) == 2
    assert "rich is not importable" in capsys.readouterr().err


def test_commands_of_the_plan_are_understood(tmp_path, monkeypatch):
    from benchmarks.models import adapter_vs_vit as model
    from benchmarks.models import attention as attn
    from benchmarks.op import cli as op

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: "compute-sanitizer")
    plan = {each.name: each.command for each in plan_of(tmp_path).steps()}
    args = op.parse(plan["op"][3:])
    settings = op.settings_of(args)
    assert settings.on_gpu
    assert settings.dtypes == ("fp32", "fp16", "bf16")
    assert settings.passes == ("forward", "backward", "both")
    assert settings.cases[0].name == "encoder-800x1333"
    assert settings.cases[0].locations == "local"
    assert len(settings.cases) == 2 * len(cases.GPU_BENCH)
    assert attn.parse(plan["attn"][3:]).device == "cuda"
    assert model.parse(plan["model"][3:])[0].sizes == ["base", "large"]
    assert op.parse(plan["host"][3:]).host
    assert plan["memcheck"][-1] == "small"
    assert "--report-api-errors" in plan["memcheck"]
    assert "--racecheck-detect-level" in plan["racecheck"]


def test_names_of_the_small_subset_exist():
    assert set(_gpu_steps.LOCATED) <= {case.name for case in cases.SMALL}
    assert set(_gpu_steps.FUSED) <= {case.name for case in cases.OFFSETS}
    assert set(_gpu_steps.DTYPES) <= set(cases.DTYPES)


def test_kernels_that_cannot_be_built_fail_the_step(monkeypatch, capsys):
    broken = _gpu_steps._extension.Library(None, error="nvcc: no such file")
    monkeypatch.setattr(_gpu_steps._extension, "load", lambda device: broken)
    assert _gpu_steps.main(["build", "cuda"]) == 1
    assert "nvcc: no such file" in capsys.readouterr().out


# --- the smoke stage ----------------------------------------------------------------------------

# A child as the smoke stage starts it, whose checks end in each way that there is.
CHILD = """
import json, os, sys
start = int(sys.argv[sys.argv.index("--start") + 1])
ways = {ways!r}
for number, way in enumerate(ways):
    if number < start:
        continue
    print(json.dumps({{"begins": number, "name": f"check {{number}}"}}), flush=True)
    if way == "dies":
        print("CUDA error: an illegal memory access", flush=True)
        os.abort()
    if way == "hangs":
        import time
        time.sleep(60)
    error = None if way == "passes" else "differs"
    found = {{"ends": number, "error": error, "near": way == "near", "s": 0.5}}
    print(json.dumps(found), flush=True)
    if way == "breaks":
        raise SystemExit({broken})
"""


def shard_of(tmp_path, *ways):
    code = CHILD.format(ways=ways, broken=_gpu_smoke.BROKEN)
    return _gpu_smoke.Shard("located fp32", (sys.executable, "-c", code), tmp_path)


def run_shard(shard, seconds=20.0):
    shard.start()
    until = time.monotonic() + seconds
    while not shard.finished and time.monotonic() < until:
        shard.poll()
        time.sleep(0.01)
    shard.end()


def test_a_check_that_ends_its_process_does_not_end_its_shard(tmp_path):
    shard = shard_of(tmp_path, "passes", "dies", "passes", "breaks", "passes", "near", "fails")
    run_shard(shard)
    assert shard.finished
    assert shard.done == 6
    assert [each.check for each in shard.failures] == ["check 1", "check 3", "check 5", "check 6"]
    assert "illegal memory access" in shard.failures[0].error
    assert [each.near for each in shard.failures] == [False, False, True, False]
    assert shard.seconds == 3.0


def test_a_shard_that_always_dies_is_given_up(tmp_path):
    shard = shard_of(tmp_path, *["dies"] * 20)
    run_shard(shard)
    assert shard.failures[-1].error == f"given up after {_gpu_smoke.MOST_RESTARTS + 1} processes"
    assert len(shard.failures) == _gpu_smoke.MOST_RESTARTS + 2


def test_a_shard_out_of_time_keeps_what_it_found(tmp_path):
    shard = shard_of(tmp_path, "passes", "fails", "hangs")
    run_shard(shard, seconds=2)
    assert shard.done == 2
    assert [each.check for each in shard.failures] == ["check 1", "check 2"]
    assert shard.failures[1].error == "out of time here"


def test_a_shard_that_cannot_start_says_why(tmp_path):
    shard = _gpu_smoke.Shard("located fp32", (sys.executable, "-c", "import no_such"), tmp_path)
    run_shard(shard)
    ((failure,), done) = shard.failures, shard.done
    assert done == 0
    assert "no_such" in failure.error


def test_an_error_near_the_bound_is_told_from_a_mistake(capsys, monkeypatch):
    exact = torch.ones(3, dtype=torch.float64)

    def check(error):
        def run():
            _gpu_smoke.gate.assert_as_accurate_as_eager(
                "output", (exact + error).float(), exact, exact
            )

        return run

    checks = [("right", check(0)), ("near", check(6e-7)), ("far", check(1e-3))]
    monkeypatch.setattr(_gpu_smoke, "checks_of", lambda *_: iter(checks))
    assert _gpu_smoke.run_shard("located fp32", "cpu", "cpu", 0, None) == 0
    ends = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1::2]]
    assert [each["error"] is None for each in ends] == [True, False, False]
    assert [each["near"] for each in ends] == [False, True, False]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_checks_cover_widths_operators_and_dtypes(backend):
    names = []
    for shard in _gpu_smoke.shards_of(backend, False):
        names += [name for name, _ in _gpu_smoke.checks_of(shard, backend, "cuda")]
    assert len(names) == len(set(names))
    assert len(names) >= {"cuda": 300, "triton": 150}[backend]
    for width in _gpu_smoke.WIDTHS:
        for operator in ("located", "offsets"):
            for dtypes in ("fp32", "bf16", "fp16_points_fp32"):
                prefix = f"{operator} {dtypes} D={width}"
                assert any(name.startswith((f"{prefix},", prefix)) for name in names), prefix
    assert ("located fp32 D=32, deterministic" in names) == (backend == "cuda")
    for special in _gpu_smoke.SPECIALS:
        assert special in names


# --- the tests stage ----------------------------------------------------------------------------


def test_failures_of_tests_are_kept_when_the_run_is_ended(tmp_path):
    test = tmp_path / "test_some.py"
    test.write_text(
        "import time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_slow(): time.sleep(60)\n"
    )
    out = tmp_path / "tests.json"
    command = [*gpu_check.module("gpu.tests"), "--rehearse", "--out", str(out), str(test)]
    command += ["--deselect", _gpu_tests.REHEARSED]
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


# --- the times stage ----------------------------------------------------------------------------


def test_decisive_shapes_are_drawn_as_the_benchmark_draws_them():
    for case in _gpu_times.decisive(rehearse=False):
        assert case.locations == "local"
    (case, _) = _gpu_times.decisive(rehearse=True)
    inputs = _gpu_times.draw(case, "bf16_points_fp32", "cpu")
    expected = case.inputs()
    assert inputs.value.shape == expected.value.shape
    assert inputs.value.dtype == torch.bfloat16
    assert inputs.sampling_locations.dtype == torch.float32
    assert inputs.sampling_locations.shape == expected.sampling_locations.shape
    spread = (inputs.sampling_locations.double() - expected.sampling_locations).abs().mean()
    assert spread < 0.6  # around the same positions: noise of two pixels on maps of 4 to 8
    sums = inputs.attention_weights.sum((3, 4))
    torch.testing.assert_close(sums, torch.ones_like(sums))


def row(name, which, us, case="encoder-800x1333", dtype="fp32"):
    return _gpu_times.Row(case, dtype, name, which, us)


def test_where_a_rival_wins_is_said_against_the_faster_of_our_kernels():
    rows = [
        row("vitadapter_ops", "forward", 10.0),
        row("vitadapter_ops-triton", "forward", 8.0),
        row("deformops", "forward", 9.0),
        row("vitadapter_ops", "backward", 10.0),
        row("deformops", "backward", 5.0),
        row("grid_sample", "backward", 7.0),
    ]
    said = _gpu_times.losses(rows)
    assert said == ["encoder-800x1333, fp32, backward: deformops 0.50x our time"]
    assert _gpu_times.losses(rows[:3]) == ["nowhere (1 comparisons)"]
    assert _gpu_times.losses(rows[:2]) == ["no rival was timed"]


def test_an_implementation_that_fails_does_not_cost_the_others(monkeypatch):
    def broken(inputs):
        raise RuntimeError("no kernel image is available")

    rival = _gpu_times.Implementation("broken", broken, "torch")
    (case, _) = _gpu_times.decisive(rehearse=True)
    rows = _gpu_times.measure_one(case, "fp32", "cpu", rival)
    rows += _gpu_times.measure_one(case, "fp32", "cpu", _gpu_times.OURS)
    named = {(each.implementation, each.which): each for each in rows}
    assert named["vitadapter_ops", "backward"].us > 0
    assert "no kernel image" in named["broken", ""].note
    for part in ("points", "value", "zeros"):
        assert named["vitadapter_ops", part].us > 0
    for name in (_gpu_times.FUSED, _gpu_times.CHAIN):
        assert named[name, "forward"].us > 0
        assert named[name, "both"].us > 0


def test_an_implementation_that_breaks_the_device_costs_its_own_rows(tmp_path, monkeypatch):
    """It breaks once: the program that begins anew has another process, and leaves it out."""
    out = tmp_path / "times.json"
    breaking = _gpu_times.Implementation("breaking", lambda inputs: None, "torch")
    other = _gpu_times.Implementation("other", _gpu_times.OURS.bind, "torch")
    chosen = [_gpu_times.OURS, breaking, other]
    monkeypatch.setattr(_gpu_times, "implementations", lambda rehearse: chosen)
    measured = []

    def measure_one(case, dtypes, device, each):
        measured.append(each.name)
        return [_gpu_times.Row(case.name, dtypes, each.name, "forward", 1.0)]

    class Begun(Exception):
        pass

    def begin_anew(program, command):
        raise Begun(command)

    monkeypatch.setattr(_gpu_times, "measure_one", measure_one)
    monkeypatch.setattr(_gpu_times, "answers", lambda device: measured[-1] != "breaking")
    monkeypatch.setattr(_gpu_times.os, "execv", begin_anew)
    with pytest.raises(Begun) as begun:
        _gpu_times.main(["--rehearse", "--out", str(out)])
    command = begun.value.args[0]
    assert "--resume" in command
    assert _gpu_times.main(command[3:]) == 0
    assert measured == ["vitadapter_ops", "breaking", "other", *["vitadapter_ops", "other"] * 3]
    found = json.loads(out.read_text())
    assert found["broke"] == ["breaking"]
    assert not found["complete"]
    assert len(found["rows"]) == len(measured)


# --- everything, on the CPU ---------------------------------------------------------------------


def test_every_stage_runs_without_a_gpu_when_it_is_rehearsed(tmp_path):
    out = tmp_path / "out"
    command = [*gpu_check.module("gpu.check"), "--out", str(out), "--rehearse"]
    # One thread: other tests' processes may have the other cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ok"]
    assert summary["complete"]
    assert summary["rehearsal"]
    assert {each["stage"] for each in summary["steps"]} == set(gpu_check.STAGES)
    skipped = {each["name"] for each in summary["steps"] if each["status"] == "skipped"}
    assert skipped <= {"build-cuda", "build-ceilings", "ceilings"}
    for name in ("smoke-cuda", "smoke-triton", "times", "profile", "tests", "op-cpu", "attn-cpu"):
        assert json.loads((out / f"{name}.json").read_text())["date"]
    times = json.loads((out / "times.json").read_text())
    assert times["complete"]
    assert {each["pass"] for each in times["rows"]} >= {"forward", "backward", "points", "value"}
    assert [each.name for each in out.glob("*.log")] == ["gpu-check.log"]
