# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/check.py and plan.py: which steps there are, and all of them on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import children
from benchmarks.common.programs import module
from benchmarks.gpu import ceilings, check, plan
from benchmarks.gpu.plan import Plan
from benchmarks.models import adapter_vs_vit, attention
from benchmarks.op import cli
from processes import children_of, is_gone, wait_until
from vitadapter_ops.testing import cases


@pytest.fixture(autouse=True)
def _capability(monkeypatch):
    monkeypatch.setattr(plan, "gpu_capability", lambda: "9.0")


def plan_of(tmp_path, archives=()):
    return Plan(tmp_path / "out", tmp_path / "folder", archives)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert check.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"no CUDA device: torch {torch.__version__}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_rivals_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check.main(["--out", str(tmp_path), "--rivals", str(tmp_path)])
    assert "no .whl and no .tar.gz" in capsys.readouterr().err


def test_an_unknown_stage_is_refused_with_the_valid_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check.parse(["--out", str(tmp_path), "--stages", "smoke", "speed"])
    said = capsys.readouterr().err
    assert "speed" in said
    for stage in check.STAGES:
        assert stage in said


def test_every_stage_has_steps_and_what_is_timed_runs_alone(tmp_path):
    steps = plan_of(tmp_path).steps()
    assert list(dict.fromkeys(each.stage for each in steps)) == list(check.STAGES)
    alone = {each.stage for each in steps if each.alone}
    assert alone == {"ceilings", "times", "profile", "op", "attn", "model"}
    assert len({each.name for each in steps}) == len(steps)
    for each in steps:
        module = each.command[each.command.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None


def test_the_plan_fits_into_nine_minutes(tmp_path):
    """The budgets of what decides; what comes later gets the time that is left."""
    assert check.SECONDS < 540
    steps = {each.name: each for each in plan_of(tmp_path).steps()}
    smoke = max(steps["build-cuda"].seconds, steps["smoke-triton"].seconds)
    first = smoke + steps["smoke-cuda"].seconds
    first += sum(steps[name].seconds for name in ("ceilings", "times", "profile"))
    assert first <= check.SECONDS


def test_each_rival_is_installed_alone(tmp_path):
    archives = [Path("deformops-3.0.1-py3-none-any.whl"), Path("torch_ms_deform_attn-0.1.1.tar.gz")]
    made = plan_of(tmp_path, archives)
    steps = [each for each in made.steps() if each.name.startswith("rival-")]
    assert [each.name for each in steps] == [f"rival-{archive}" for archive in archives]
    for each, (archive, site) in zip(steps, made.sites.items(), strict=True):
        assert each.command[-2:] == (str(site), str(archive))
        assert each.environment == {"FORCE_CUDA": "1"}
    assert len(set(made.sites.values())) == len(archives)


def test_rivals_are_found_from_the_callers_folder(tmp_path, monkeypatch):
    (tmp_path / "archives").mkdir()
    for name in ("deformops-2.0.tar.gz", "deformops-3.0.1-py3-none-any.whl"):
        (tmp_path / "archives" / name).touch()
    monkeypatch.chdir(tmp_path)
    args = check.parse(["--out", "out", "--rivals", "archives"])
    assert [each.name for each in args.archives] == [
        "deformops-2.0.tar.gz",
        "deformops-3.0.1-py3-none-any.whl",
    ]
    assert all(each.is_absolute() for each in args.archives)
    names = [each.name for each in plan_of(tmp_path, args.archives).steps()]
    assert len(set(names)) == len(names)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert check.main(["--out", str(tmp_path / "file" / "out"), "--rehearse"]) == 2
    said = capsys.readouterr().err
    assert "--out: cannot write to" in said
    assert said.count("\n") == 1


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        check,
        "missing_module",
        lambda name: "rich is not importable" if name == "rich" else None,
    )
    assert check.main(["--out", str(tmp_path / "out"), "--rehearse"]) == 2
    assert "rich is not importable" in capsys.readouterr().err


def test_a_missing_package_can_be_named_as_none_is_imported_before():
    code = "import sys\nfrom benchmarks.gpu import check\nprint(*sys.modules)"
    done = children.python(["-c", code])
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "rich", "matplotlib", "pytest"} & set(done.stdout.split())


def test_commands_of_the_plan_are_understood(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(plan, "sanitizer", lambda: "compute-sanitizer")
    commands = {each.name: each.command for each in plan_of(tmp_path).steps()}
    args = cli.parse(commands["op"][3:])
    settings = cli.settings_of(args)
    assert settings.on_gpu
    assert settings.dtypes == ("fp32", "fp16", "bf16")
    assert settings.passes == ("forward", "backward", "both")
    assert settings.cases[0].name == "encoder-800x1333"
    assert settings.cases[0].locations == "local"
    assert len(settings.cases) == 2 * len(cases.GPU_BENCH)
    assert attention.parse(commands["attn"][3:]).device == "cuda"
    assert adapter_vs_vit.parse(commands["model"][3:])[0].cases == ["base", "large"]
    assert cli.parse(commands["host"][3:]).host
    assert commands["memcheck"][-1] == "small"
    assert "--report-api-errors" in commands["memcheck"]
    assert "--racecheck-detect-level" in commands["racecheck"]


def test_what_ceilings_measure_is_kept(tmp_path, monkeypatch):
    """The one stage that no rehearsal runs."""
    measured = [ceilings.Ceiling("copy", "GB/s", 2.0, 1.0, {"mib": 22})]
    monkeypatch.setattr(ceilings, "build", lambda folder, capability: folder)
    monkeypatch.setattr(ceilings, "measure", lambda program, seconds: measured)
    monkeypatch.setattr(ceilings.report, "origin", lambda device: {"device": device.type})
    made = plan_of(tmp_path)
    (step,) = [each for each in made.steps() if each.name == "ceilings"]
    assert ceilings.main(step.command[3:]) == 0
    kept = json.loads((made.out / step.writes[0]).read_text())
    assert (kept["device"], kept["ceilings"][0]["name"]) == ("cuda", "copy")


# --- run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_run_that_is_ended_ends_its_steps_and_keeps_what_they_found(tmp_path, number):
    out = tmp_path / "out"
    command = [*module("gpu.check"), "--out", str(out), "--rehearse"]
    command += ["--stages", "smoke"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    # A job in the background ignores SIGINT, which its children would inherit.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        process = subprocess.Popen(command, start_new_session=True, env=environment)
    finally:
        signal.signal(number, before)
    wait_until((out / "smoke-cuda.log").exists)
    started = children_of(process.pid)
    assert len(started) >= 2
    os.kill(process.pid, number)
    assert process.wait(30) == 128 + number
    assert all(map(is_gone, started))
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["ok"]
    assert {each["detail"] for each in summary["steps"] if each["stage"] == "smoke"} == {
        "interrupted"
    }
    assert [each.name for each in tmp_path.iterdir()] == ["out"]  # no temporary folder


@pytest.mark.exhaustive
def test_every_stage_runs_without_a_gpu_when_it_is_rehearsed(tmp_path):
    out = tmp_path / "out"
    command = [*module("gpu.check"), "--out", str(out), "--rehearse"]
    # One thread: other tests' processes may have the other cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ok"]
    assert summary["complete"]
    assert summary["rehearsal"]
    assert {each["stage"] for each in summary["steps"]} == set(check.STAGES)
    skipped = {each["name"] for each in summary["steps"] if each["status"] == "skipped"}
    assert skipped <= {"build-cuda", "build-ceilings", "ceilings", "racecheck"}
    for name in ("smoke-cuda", "smoke-triton", "times", "profile", "tests", "op-cpu", "attn-cpu"):
        assert json.loads((out / f"{name}.json").read_text())["date"]
    times = json.loads((out / "times.json").read_text())
    assert times["complete"]
    assert {each["pass"] for each in times["rows"]} >= {"forward", "backward", "points", "value"}
    assert [each.name for each in out.glob("*.log")] == ["gpu-check.log"]
