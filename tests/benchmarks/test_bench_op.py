# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.op: the gate, what is printed and kept, and every way to refuse."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import children
import vitadapter_ops
from benchmarks.common import report
from benchmarks.common.console import wide_console
from benchmarks.common.gate import RedGateError
from benchmarks.common.memory import Peak
from benchmarks.op import bandwidth, cli, implementations, measure, scaling
from benchmarks.op.bandwidth import NotMeasured
from benchmarks.op.traffic import PASSES
from op_results import TINY, line_of, rival
from vitadapter_ops.testing import cases, gate, oracles

RUN = ["--device", "cpu", "--threads", "1", "--rounds", "2", "--locations", "local"]


@pytest.fixture
def tiny(monkeypatch):
    """One small case, and nothing that takes a process of its own."""

    def unmeasured(threads):
        raise NotMeasured("not now")

    monkeypatch.setattr(cases, "BENCH", (TINY,))
    monkeypatch.setattr(cases, "GPU_BENCH", ())
    monkeypatch.setattr(bandwidth, "measure", unmeasured)
    monkeypatch.setattr(measure, "measure_memory", lambda *args: Peak("ok", 3 << 20))


@pytest.fixture
def run(tmp_path):
    """Runs the command, which writes to `tmp_path`; returns its exit status."""
    return lambda *arguments: cli.main([*RUN, "--out", str(tmp_path), *arguments])


def wrong_output(out, value):
    return out * 1.001


def wrong_gradient(out, value):
    extra = value.sum() * 1e-2
    return out + (extra - extra.detach())


@pytest.mark.parametrize("mistake", [wrong_output, wrong_gradient])
def test_wrong_operator_is_not_timed(tiny, run, tmp_path, capsys, monkeypatch, mistake):
    right = gate.ms_deform_attn

    def wrong(value, *args, backend, **options):
        out = right(value, *args, backend=backend, **options)
        return mistake(out, value) if backend == "auto" else out

    monkeypatch.setattr(gate, "ms_deform_attn", wrong)
    for module in (measure, scaling):
        monkeypatch.setattr(module, "take_turns", lambda *args, **options: pytest.fail("timed"))
    for more in ([], ["--scaling"]):
        assert run("--against", *more) == 1
        assert "Not timed, because the results are wrong: tiny" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_red_dtype_does_not_keep_the_others_from_being_timed(tiny, run, capsys, monkeypatch):
    def check(case, dtype, device):
        if dtype == "bf16":
            raise RedGateError("tiny, bf16: bad")

    monkeypatch.setattr(measure, "check", check)
    assert run("--against", "--dtype", "bf16", "fp32") == 1
    shown = capsys.readouterr().out
    assert "Not timed, because the results are wrong: tiny, bf16: bad" in shown
    assert "vitadapter_ops   fp32" in shown
    assert "vitadapter_ops   bf16" not in shown


def test_python_without_assertions_is_refused():
    command = [sys.executable, "-O", "-m", "benchmarks.op"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "removes the checks" in done.stderr


def test_scaling_prints_costs_and_restores_the_threads(tiny, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "usable_cores", lambda: 2)
    assert run("--against", "--scaling") == 0
    printed = capsys.readouterr().out
    for axis, amounts in (("queries", "192:"), ("images", "4:"), ("threads, one head", "2:")):
        assert amounts in line_of(printed, axis, "backward")
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == 1


def test_a_rival_that_fails_or_errs_is_a_remark_and_not_a_crash(tiny, run, capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("no half today\nand more")

    def half(*args):
        return 0.5 * oracles.grid_sample(*args)

    monkeypatch.setattr(implementations, "RIVALS", (rival("failing", fail), rival("halving", half)))
    assert run() == 0
    printed = capsys.readouterr().out
    assert "failing, fp32: cannot run: no half today" in printed
    assert "halving, fp32: output differs from ours by 50%" in printed
    assert (
        line_of(printed.split("Where we lose")[0], "failing", "backward").split()[-5:] == ["-"] * 5
    )


def test_rivals_that_are_not_installed_are_left_out(tiny, run, capsys, monkeypatch):
    absent = rival("absent", None, module="no_such_module")
    monkeypatch.setattr(implementations, "RIVALS", (absent,))
    assert run("--passes", "forward") == 0
    assert "no rival was timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "encoder"], "'encoder' names none of tiny"),
        (["--against", "nobody"], "expected some of absent, grid_sample, got 'nobody'"),
        (["--against", "absent"], "absent is not installed (No module named 'no_such_module')"),
        (["--against", "absent"], "installed: grid_sample"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "tpu"], "expected cpu, cuda or cuda:N, got 'tpu'"),
        (["--no-gate"], "unrecognized arguments: --no-gate"),
        (["--csv", "rows.csv"], "unrecognized arguments: --csv"),
    ],
)
def test_wrong_arguments_are_refused_with_what_would_be_right(
    tiny, capsys, monkeypatch, arguments, message
):
    absent = rival("absent", None, module="no_such_module")
    monkeypatch.setattr(implementations, "RIVALS", (absent, implementations.RIVALS[0]))
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_are_appended_below_one_header(tiny, tmp_path):
    path = tmp_path / "folder" / "op-cpu.csv"
    for _ in range(2):
        assert cli.main([*RUN, "--against", "grid_sample", "--out", str(path.parent)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["implementation"], row["pass"]) for row in rows] == 2 * [
        (name, which) for which in PASSES for name in ("vitadapter_ops", "grid_sample")
    ]
    for row in rows:
        assert row["torch"] == torch.__version__
        assert row["cpu"]
        assert row["version"] not in ("", "unknown")
        assert row["locations"] == "local"
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["peak_mib"]) == 3
        assert float(row["gathered_gb_per_s"]) > 0
        assert None not in row.values()
    ours, theirs = rows[:2]
    assert float(ours["ratio"]) == 1
    expected = float(theirs["p50_ms"]) / float(ours["p50_ms"])
    assert float(theirs["ratio"]) == pytest.approx(expected, rel=1e-4)
    text = path.read_text()
    for place in (Path.home(), children.ROOT, Path(sys.prefix), tmp_path):
        assert str(place) not in text


def test_a_file_with_other_columns_is_refused_before_anything_is_timed(tiny, run, tmp_path, capsys):
    path = tmp_path / "op-cpu.csv"
    path.write_text("date,speed\n2020,1\n")
    with pytest.raises(SystemExit):
        run()
    error = capsys.readouterr().err
    assert "its columns are not those of this version" in error
    assert "speed" in error
    assert path.read_text() == "date,speed\n2020,1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="cache sizes and memory as Linux states them")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a compiler")
def test_run_with_bandwidths_and_memory(run, monkeypatch, capsys):
    monkeypatch.setattr(cases, "BENCH", (TINY,))
    assert run("--against", "--passes", "forward") == 0
    printed = capsys.readouterr().out
    assert "Loads with 1 thread, measured: L1 " in printed
    assert "Distance from the machine's limits" in printed
    ours = line_of(printed, "vitadapter_ops", "1.00x").split()
    assert float(ours[-1]) < 10  # MiB: the output has 3 KiB


def test_host_time_of_every_backend_that_runs_here():
    # In a process of its own: without a GPU, Triton's operators launch nothing from then on.
    command = [sys.executable, "-m", "benchmarks.op", "--device", "cpu", "--host", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=children.ROOT)
    assert done.returncode == 0, done.stderr
    assert "Host time of a call" in done.stdout
    rows = [line.split()[:3] for line in done.stdout.splitlines()]
    backends = [name for name in vitadapter_ops.available_backends() if name == "cpu"]
    if importlib.util.find_spec("triton") and not os.environ.get("TRITON_INTERPRET"):
        backends.append("triton")
    for backend in backends:
        for name in ("ms_deform_attn", "ms_deform_attn_from_offsets"):
            assert [name, backend, "forward"] in rows
            assert [name, backend, "forward+backward"] in rows
            assert ["raw", name, backend] in rows
    assert ["torch's", "share", "forward+backward"] in rows


def test_results_are_tracked_by_git_only_when_published(tiny, tmp_path, capsys, monkeypatch):
    git = {"commit": "0" * 40, "uncommitted_changes": False}
    monkeypatch.setattr(report, "git_state", lambda: git)
    for more, folder in (([], "OUT"), (["--publish"], "RESULTS")):
        monkeypatch.setattr(report, folder, tmp_path / folder)
        assert cli.main([*RUN, "--against", "--passes", "forward", *more]) == 0
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        assert names == ["op-cpu.csv", "op-cpu.json"]
        assert str(tmp_path / folder / "op-cpu.csv") in capsys.readouterr().out.replace("\n", "")


def test_json_of_a_run_has_what_the_rows_have(tiny, run, tmp_path):
    assert run("--against", "grid_sample", "--passes", "both") == 0
    written = json.loads((tmp_path / "op-cpu.json").read_text())
    assert [each["implementation"] for each in written["results"]] == [
        "vitadapter_ops",
        "grid_sample",
    ]
    assert {each["pass"] for each in written["results"]} == {"both"}
    assert written["bandwidth"] is None
    assert written["left_out"] == []


def test_no_shape_is_started_when_time_is_up(tiny, run, capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    assert run("--against", "--locations", "uniform", "local", "--at-most", "15") == 0
    assert "Left out, as time was up: tiny, local" in capsys.readouterr().out


def test_a_shape_that_fails_does_not_end_the_run(tiny, run, capsys, monkeypatch):
    def fail(settings, case, dtypes):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(measure, "measure_time", fail)
    assert run("--against") == 1
    printed = capsys.readouterr().out
    assert "illegal memory access" in printed
    assert "Not timed: tiny, local" in printed


def test_profile_is_for_a_gpu(tiny, capsys):
    with pytest.raises(SystemExit):
        cli.main([*RUN, "--profile"])
    assert "--profile: works on a GPU only" in capsys.readouterr().err


def test_profile_makes_one_call_between_start_and_stop(tiny, monkeypatch):
    events = []

    @contextlib.contextmanager
    def profiling():
        events.append("start")
        yield
        events.append("stop")

    right = implementations.step_of
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "profile", profiling)
    monkeypatch.setattr(
        implementations, "step_of", lambda *args: lambda: (events.append("call"), right(*args)())
    )
    settings = cli.settings_of(cli.parse([*RUN, "--passes", "backward"]))
    measure.profile(settings, wide_console())
    assert events == ["call", "start", "call", "stop"]
