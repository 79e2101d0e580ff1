# SPDX-License-Identifier: Apache-2.0
"""benchmarks/common: the options that all commands share, and what they do on a red gate."""

from __future__ import annotations

import argparse
import io
import subprocess

import pytest
import torch
from rich.console import Console

from benchmarks.common import gate, options, packages, report
from vitadapter_ops.testing import cases


@pytest.fixture
def parser():
    made = argparse.ArgumentParser()
    options.add_device(made)
    options.add_dtypes(made, help="dtypes of value")
    options.add_cases(made, [case.name for case in cases.BENCH])
    options.add_rounds(made, 30)
    options.add_warmup(made, None, "1 on a CPU")
    options.add_seconds(made, 1.0)
    options.add_output(made)
    return made


@pytest.fixture
def checkout(monkeypatch):
    state = {"commit": "0" * 40, "uncommitted_changes": False}
    monkeypatch.setattr(report, "git_state", lambda: state)
    return state


def refused(parser, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_filled_in(parser):
    args = parser.parse_args([])
    assert args.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert args.threads == torch.get_num_threads()
    assert (args.dtype, args.cases, args.rounds, args.warmup, args.seconds) == (
        *(None, None, 30, None, 1.0),
    )
    assert args.out == report.OUT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "cuda:99"], f"--device: torch {torch.__version__} sees"),
        (["--threads", "0"], "--threads: expected a whole number of at least 1, got '0'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--cases", "encoder"], "--cases: 'encoder' names none of injector-S-512"),
        (["--cases", "encoder*", "x"], "--cases: 'x' names none of injector-S-512"),
        (["--rounds", "-1"], "--rounds: expected a whole number of at least 1, got '-1'"),
        (["--warmup", "1.5"], "--warmup: expected a whole number of at least 1, got '1.5'"),
        (["--seconds", "nan"], "--seconds: expected a number above 0, got 'nan'"),
        (["--out", __file__], "is not a folder"),
        (["--publish", "--out", "x"], "--out: not allowed with argument --publish"),
        (["--out", "x", "--publish"], "--publish: not allowed with argument --out"),
    ],
)
def test_wrong_options_are_refused_by_name(parser, checkout, capsys, arguments, message):
    assert message in refused(parser, capsys, *arguments)


def test_cases_are_chosen_by_any_pattern_in_their_own_order(parser):
    args = parser.parse_args(["--cases", "encoder*", "injector-?-512"])
    chosen = [case.name for case in options.matching(cases.BENCH, args.cases)]
    assert chosen == ["injector-S-512", "injector-B-512", "injector-L-512", "encoder-detr"]
    assert options.matching(cases.BENCH, None) == cases.BENCH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", str(report.RESULTS)], "holds what is published: expected --publish"),
        (["--out", "/proc/no-such"], "cannot write to /proc/no-such"),
        (["--threads", "1000000"], "expected at most 4096, got '1000000'"),
    ],
)
def test_what_would_fail_after_the_work_is_refused_before(
    parser, checkout, capsys, arguments, message
):
    assert message in refused(parser, capsys, *arguments)


def test_a_copy_in_another_checkout_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "vendored").mkdir()
    monkeypatch.setattr(report, "REPOSITORY", tmp_path / "vendored")
    assert report.git_state() == {"commit": None, "uncommitted_changes": None}


def test_publishing_writes_to_the_tracked_folder(parser, checkout):
    assert parser.parse_args(["--publish"]).out == report.RESULTS


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"uncommitted_changes": True}, "--publish: expected a checkout whose only changes are"),
        ({"commit": None, "uncommitted_changes": None}, "is no git checkout"),
    ],
)
def test_nothing_is_published_that_no_commit_stands_for(parser, checkout, capsys, state, message):
    checkout |= state
    assert message in refused(parser, capsys, "--publish")


def test_a_result_file_is_named_after_benchmark_and_device(tmp_path):
    assert report.result_file(tmp_path, "op", "cuda:1") == tmp_path / "op-cuda.json"
    assert report.result_file(tmp_path, "op", "cpu", "csv") == tmp_path / "op-cpu.csv"


@pytest.mark.parametrize("error", [AssertionError, RuntimeError])
def test_a_failed_check_is_a_red_gate_that_names_what_is_wrong(error):
    wrong = pytest.raises(gate.RedGateError, match=r"^tiny, fp32: error 3 \[1\]$")
    with wrong as raised, gate.held("tiny, fp32"):
        raise error("error 3 [1]\nand more")
    stream = io.StringIO()
    gate.show_red(Console(file=stream, width=120), raised.value)
    expected = "Not timed, because the results are wrong: tiny, fp32: error 3 [1]\n"
    assert stream.getvalue() == expected


def test_a_package_that_was_never_installed_is_named():
    explained = pytest.raises(SystemExit, match=r"^rich is not installed. Run `make bench-op`$")
    with explained, packages.named_if_missing("Run `make bench-op`"):
        raise ModuleNotFoundError(name="rich")
    with pytest.raises(ModuleNotFoundError), packages.named_if_missing("Run `make bench-op`"):
        raise ModuleNotFoundError(name="rich.broken")
