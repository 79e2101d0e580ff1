# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/profile.py: what ncu prints, what it refuses, and what becomes of each call."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

import children
from benchmarks.common import programs
from benchmarks.gpu import profile, profiled
from benchmarks.gpu.profile import METRICS, NoCounters
from processes import is_gone, wait_until

HEADER = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
DENIED = (
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU "
    "Performance Counters on the target device 0.\n"
)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """In place of profiled.py: says how it was called."""
    path = tmp_path / "program.py"
    path.write_text("import sys\nprint('ran', *sys.argv[1:])\n")
    monkeypatch.setattr(profile, "PROGRAM", (sys.executable, str(path)))
    return path


@pytest.fixture
def fake_ncu(tmp_path):
    """Makes an ncu that runs the program after its own arguments, and then Python code."""

    def make(code):
        path = tmp_path / "ncu"
        path.write_text(
            f"#!{sys.executable}\nimport subprocess, sys\n"
            f"program = sys.argv[sys.argv.index({sys.executable!r}):]\n"
            f"metrics = sys.argv[sys.argv.index('--metrics') + 1]\n"
            "rc = subprocess.run(program).returncode\n"
            f"sample = open({str(profile.SAMPLE)!r}).read()\n{code}\n"
        )
        path.chmod(0o755)
        return str(path)

    return make


def profile_all(tmp_path, ncu, seconds=60.0, rehearse=False):
    """Exit status, what was written, and what was printed."""
    args = argparse.Namespace(out=tmp_path / "profile.json", seconds=seconds, rehearse=rehearse)
    stream = io.StringIO()
    code = profile.profile_all(args, ncu, {"benchmark": "x"}, Console(file=stream, width=120))
    return code, json.loads(args.out.read_text()), stream.getvalue()


# --- what ncu prints ----------------------------------------------------------------------------


def test_every_kernel_has_its_counters_in_the_units_of_their_names():
    fill, backward = profile.parse(profile.SAMPLE.read_text())
    assert "FillFunctor<float>, std::array<char *, 1>>" in fill["kernel"]  # with commas and all
    assert fill["duration_us"] == pytest.approx(14.048)  # from nanoseconds
    assert backward["duration_us"] == pytest.approx(1203.264)
    assert backward["instructions"] == 211_408_912
    assert backward["l2_reduction_sectors"] == 91_025_408
    assert backward["registers"] == 110
    assert set(backward) == {"kernel", *METRICS}
    assert None not in backward.values()


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("1,203,264", "nsecond", 1203.264),
        ("1.20", "msecond", 1200.0),
        ("45.5", "Mbyte", 45.5e6),
        ("45,513,728", "byte", 45_513_728.0),
        ("96.12", "%", 96.12),
        ("n/a", "", None),
        ("(!) n/a", "", None),
        ("nan", "%", None),
        ("inf", "%", None),
        ("", "", None),
    ],
)
def test_numbers_have_separators_and_units_or_are_missing(text, unit, value):
    assert profile.number(text, unit) == (None if value is None else pytest.approx(value))


def test_a_metric_that_is_missing_or_unknown_to_us_is_no_error():
    rows = (
        '"0","k(int)","sm__throughput.avg.pct_of_peak_sustained_elapsed","%","12.5"\n'
        '"0","k(int)","dram__bytes.sum","byte","n/a"\n'
        '"0","k(int)","some__other.sum","","1"\n'
    )
    (launch,) = profile.parse(f"a line of the program\n{HEADER}{rows}==PROF== the end\n")
    found = {name for name, value in launch.items() if value is not None}
    assert found == {"kernel", "sm_pct"}
    assert profile.bound(launch) == "latency, SM 12%"
    assert profile.stall(launch) == "-"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no kernel was profiled"),
        ("==WARNING== No kernels were profiled.\n", "no kernel was profiled"),
        (HEADER, "no kernel was profiled"),
        ("==ERROR== Failed to  prepare\n", "Failed to prepare"),
    ],
)
def test_output_without_counters_says_why(text, message):
    with pytest.raises(NoCounters, match=message):
        profile.parse(text)


def test_metrics_that_ncu_does_not_find_are_named():
    text = r"==ERROR== Failed to find metric regex:^lts__throughput\.(avg|max)$"
    assert profile.unknown_metrics(text) == [METRICS["l2_pct"]]
    assert profile.unknown_metrics(text.replace("lts__throughput", "lts__through")) == []


def shown(calls):
    stream = io.StringIO()
    Console(file=stream, width=120).print(profile.table(calls))
    return stream.getvalue()


def test_table_says_what_bounds_each_kernel():
    launches = profile.parse(profile.SAMPLE.read_text())
    call = {"case": "encoder-800x1333", "dtype": "bf16", "pass": "backward", "status": "ok"}
    # All that is long at once has to fit.
    long = {**dict.fromkeys(METRICS, 55.5), "kernel": f"void {'k' * 60}<int>(int)"}
    long |= {"duration_us": 12345.6, "stall_short_scoreboard": 123.4, "instructions": 1e9}
    missing = {**dict.fromkeys(METRICS), "kernel": "k"}
    text = shown([{**call, "launches": [*launches, long, missing]}])
    fill, backward, latency, nothing = text.splitlines()[-4:]
    assert fill.split()[-5:] == ["DRAM", "72%", "long", "scoreboard", "1.87"]
    assert backward.split()[:2] == ["ms_deform_attn_backward_kernel", "1203.3"]
    assert backward.split()[-4:] == ["L2", "96%", "lg", "9.82"]
    assert "latency, SM 56%" in latency
    assert latency.rstrip().endswith("short scoreboard 123")
    assert nothing.split()[1:] == ["-"] * 11
    assert "…" not in text


# --- ncu ----------------------------------------------------------------------------------------


def test_ncu_is_found_on_path_in_cuda_home_or_where_its_packages_are(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    def make(folder):
        folder.mkdir(parents=True)
        path = folder / "ncu"
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)

    home, packages = tmp_path / "cuda", tmp_path / "packages"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    monkeypatch.setattr(profile, "PACKAGES", packages)
    assert str(packages) in profile.why_not()
    make(packages / "2024.3.2")
    newest = make(packages / "2025.10.0")
    make(packages / "2025.9.1")
    assert profile.find_ncu() == newest
    beside = make(home / "bin")
    assert profile.find_ncu() == beside
    first = make(tmp_path / "bin")
    assert profile.find_ncu() == first
    assert profile.why_not() is None


def test_four_calls_are_profiled_between_start_and_stop(tmp_path, program, fake_ncu):
    ncu = fake_ncu("print(sample)")
    command = profile.command_of(ncu, ["python", "x"])
    assert command[1:3] == ["--profile-from-start", "off"]
    assert command[-2:] == ["python", "x"]
    code, written, printed = profile_all(tmp_path, ncu)
    assert code == 0
    assert (written["complete"], written["no_counters"]) == (True, None)
    names = [(each["case"], each["dtype"], each["pass"]) for each in written["calls"]]
    assert names == list(profile.PROFILED)
    assert all(len(each["launches"]) == 2 for each in written["calls"])
    assert printed.count("L2 96%") == 4


@pytest.mark.parametrize("word", ["ERR_NVGPUCTRPERM", "LibraryNotLoaded"])
@pytest.mark.parametrize("status", [0, 1])
def test_where_counters_are_refused_one_line_says_so_and_nothing_failed(
    tmp_path, program, fake_ncu, word, status
):
    text = DENIED.replace("ERR_NVGPUCTRPERM", word)
    code, written, printed = profile_all(
        tmp_path, fake_ncu(f"print({text!r}); raise SystemExit({status})")
    )
    assert code == 0
    assert word in written["no_counters"]
    assert [each["status"] for each in written["calls"]] == ["no counters"]  # no other was tried
    assert written["complete"] is True
    assert printed.startswith(f"No counters here: {word}")


def test_a_metric_that_ncu_does_not_know_is_left_out(tmp_path, program, fake_ncu):
    name = METRICS["dram_pct"]
    code, written, _ = profile_all(
        tmp_path,
        fake_ncu(
            f"if {name!r} in metrics.split(','):\n"
            f"    sys.exit('==ERROR== Failed to find metric regex:^gpu__dram_throughput.(a)$')\n"
            f"print(''.join(x for x in sample.splitlines(True) if {name!r} not in x))"
        ),
    )
    assert code == 0
    assert [each["unknown_metrics"] for each in written["calls"]] == [[name]] * 4
    assert written["calls"][0]["launches"][1]["dram_pct"] is None
    assert written["calls"][0]["launches"][1]["l2_pct"] == 96.12


def test_a_program_that_fails_is_named_and_the_others_go_on(tmp_path, program, fake_ncu):
    program.write_text(
        "import sys\nif sys.argv[2] == 'fp32': sys.exit('RuntimeError: illegal address')\n"
    )
    ncu = fake_ncu(
        "if rc: print('==ERROR== The application returned an error code (1).'); sys.exit(rc)\n"
        "print(sample)"
    )
    code, written, printed = profile_all(tmp_path, ncu)
    assert code == 1
    assert [each["status"] for each in written["calls"]] == ["ok", "ok", "failed", "ok"]
    assert written["calls"][2]["detail"] == (
        "exit status 1; The application returned an error code (1).; RuntimeError: illegal address"
    )
    assert "encoder-800x1333, fp32, backward: failed: exit status 1" in printed


def test_a_call_that_hangs_leaves_time_to_the_others(tmp_path, program, fake_ncu):
    program.write_text(
        "import sys, time\nif sys.argv[1:4] == ['encoder-800x1333', 'bf16', 'forward']:\n"
        "    time.sleep(60)\n"
    )
    began = time.monotonic()
    code, written, _ = profile_all(tmp_path, fake_ncu("print(sample)"), seconds=4.0)
    assert code == 1
    assert [each["status"] for each in written["calls"]] == ["timed out", "ok", "ok", "ok"]
    assert time.monotonic() - began < 20


def test_no_call_starts_when_time_is_up(tmp_path, program):
    code, written, _ = profile_all(tmp_path, None, seconds=1e-9)
    assert code == 1
    assert written["complete"] is True
    assert {each["status"] for each in written["calls"]} == {"timed out"}


# --- rehearsed ----------------------------------------------------------------------------------


def test_rehearsal_runs_the_program_and_everything_but_ncu(tmp_path, program, monkeypatch, capsys):
    log = tmp_path / "log"
    program.write_text(f"import sys\nprint(*sys.argv[1:], file=open({str(log)!r}, 'a'))\n")
    out = tmp_path / "new" / "profile.json"
    handler = signal.getsignal(signal.SIGTERM)
    assert profile.main(["--out", str(out), "--rehearse"]) == 0
    assert signal.getsignal(signal.SIGTERM) == handler
    assert log.read_text().splitlines() == [
        f"{' '.join(each)} --rehearse" for each in profile.PROFILED[:2]
    ]
    written = json.loads(out.read_text())
    assert (written["benchmark"], written["rehearsal"]) == ("gpu-profile", True)
    assert written["versions"]["torch"] == str(torch.__version__)
    assert set(written["git"]) == {"commit", "uncommitted_changes"}
    assert "ms_deform_attn_backward_kernel" in capsys.readouterr().out


def test_the_program_knows_every_call_and_makes_it_on_a_cpu(monkeypatch):
    for each in profile.PROFILED:
        assert profiled.main([*each, "--rehearse"]) == 0
    calls = []
    monkeypatch.setattr(profiled, "run", lambda case, *call: calls.append((case.name, *call)))
    for each in profile.PROFILED:
        assert profiled.main(list(each)) == 0
    assert calls == [(*each, "cuda") for each in profile.PROFILED]


@pytest.mark.parametrize(
    "call", [["encoder", "bf16", "forward"], ["dinov3-S-896", "bf16", "forward", "--rehearse"]]
)
def test_a_call_of_a_shape_that_there_is_not_is_refused(capsys, call):
    with pytest.raises(SystemExit):
        profiled.main(call)
    said = capsys.readouterr().err
    assert "encoder-800x1333" in said
    assert repr(call[0]) in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert profile.main(["--out", str(tmp_path / "profile.json")]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_what_runs_ends_with_the_stage(tmp_path):
    program = tmp_path / "program.py"
    ready = tmp_path / "pid"
    program.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'half')!r}).write_text(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'half')!r}, {str(ready)!r})\n"
        "time.sleep(60)\n"
    )
    code = (
        "import sys\nfrom benchmarks.gpu import profile\n"
        f"profile.PROGRAM = (sys.executable, {str(program)!r})\n"
        f"sys.exit(profile.main(['--out', {str(tmp_path / 'out.json')!r}, '--rehearse']))\n"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(children.ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: ready.exists() or stage.poll() is not None)
        assert stage.poll() is None
        stage.send_signal(signal.SIGTERM)
        assert stage.wait(20) == 128 + signal.SIGTERM
    finally:
        stage.kill()
        stage.wait()
    assert is_gone(int(ready.read_text()))


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["plain", "nohup"])
def test_signals_exit_unless_they_are_ignored_and_keep_their_handlers(handler):
    before = signal.signal(signal.SIGHUP, handler)
    ends = contextlib.nullcontext() if handler == signal.SIG_IGN else pytest.raises(SystemExit)
    try:
        with ends, programs.exit_on(signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["plain", "nohup"])
def test_signals_that_are_noted_interrupt_nothing_and_keep_their_handlers(handler):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with programs.noted(signal.SIGHUP, signal.SIGTERM) as came:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert came == [*[signal.SIGHUP] * (handler == signal.SIG_DFL), signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
