# SPDX-License-Identifier: Apache-2.0
"""Hardware counters of four calls, read by ncu: what bounds their kernels.

    python -m benchmarks.gpu.profile --out profile.json
    python -m benchmarks.gpu.profile --out profile.json --rehearse    # two, and without ncu

A stage of the check. ncu runs profiled.py, which warms up and makes one call between
cudaProfilerStart and cudaProfilerStop; a backward launches several kernels. Clocks and caches are
left alone, as they are for times with warm caches. The file is written after each call. Where ncu
may not read counters, the file and one line say so, and nothing has failed.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import report
from benchmarks.common.console import LOOK, columns, wide_console
from benchmarks.common.options import add_seconds
from benchmarks.common.programs import cuda_tool, exit_on, module, noted

PROGRAM = module("gpu.profiled")
SAMPLE = report.REPOSITORY / "tests" / "benchmarks" / "ncu.csv"
# Where its packages install it.
PACKAGES = Path("/opt/nvidia/nsight-compute")

# Case, dtype and pass.
PROFILED = (
    ("encoder-800x1333", "bf16", "forward"),
    ("encoder-800x1333", "bf16", "backward"),
    ("encoder-800x1333", "fp32", "backward"),
    ("decoder-800x1333", "bf16", "forward"),
)
OF_PEAK, WHILE_ACTIVE = "avg.pct_of_peak_sustained_elapsed", "avg.pct_of_peak_sustained_active"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "long_scoreboard",
    "lg_throttle",
    "mio_throttle",
    "short_scoreboard",
    "math_pipe_throttle",
)
# Counters by name, as ncu has them.
METRICS = {
    "duration_us": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "issue_active_pct": f"smsp__issue_active.{WHILE_ACTIVE}",
    "sm_pct": f"sm__throughput.{OF_PEAK}",
    "l1_pct": f"l1tex__throughput.{WHILE_ACTIVE}",
    "l2_pct": f"lts__throughput.{OF_PEAK}",
    "dram_pct": f"gpu__dram_throughput.{OF_PEAK}",
    "l1_hit_pct": "l1tex__t_sector_hit_rate.pct",
    "l2_hit_pct": "lts__t_sector_hit_rate.pct",
    "l2_reduction_sectors": "lts__t_sectors_op_red.sum",
    "dram_bytes": "dram__bytes.sum",
    "warps_active_pct": f"sm__warps_active.{WHILE_ACTIVE}",
    "registers": "launch__registers_per_thread",
    **{f"stall_{name}": STALL.format(name) for name in STALLS},
}
THROUGHPUTS = {"sm_pct": "SM", "l1_pct": "L1", "l2_pct": "L2", "dram_pct": "DRAM"}
# Below this share of every peak, latency decides.
BUSY = 60.0
# To microseconds and bytes; every other unit is its own.
UNITS = {
    **{"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3},
    **{"second": 1e6, "s": 1e6, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
}
# What ncu says where it may not or cannot read counters at all.
REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded")

MET, FAILED, LATE, REFUSAL = "ok", "failed", "timed out", "no counters"


class NoCounters(ValueError):
    """The output holds no counters."""


# --- ncu ----------------------------------------------------------------------------------------


def find_ncu() -> str | None:
    """Ncu: on PATH, with the CUDA that torch finds, or where its own packages install it."""
    found = cuda_tool("ncu")
    if found is not None:
        return found
    several = [each for each in PACKAGES.glob("*/ncu") if os.access(each, os.X_OK)]
    newest = max(several, key=lambda each: _numbers(each.parent.name), default=None)
    return None if newest is None else str(newest)


def _numbers(version: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", version)]


def why_not() -> str | None:
    """Why this stage is left out, or None."""
    if find_ncu() is None:
        return f"ncu is neither on PATH, nor in CUDA_HOME, nor under {PACKAGES}"
    return None


def command_of(ncu: str | None, program: Sequence[str], unknown: Sequence[str] = ()) -> list[str]:
    """The program under ncu, without the metrics that this ncu does not know; or alone."""
    if ncu is None:
        return list(program)
    names = ",".join(each for each in METRICS.values() if each not in unknown)
    quiet = ("--clock-control", "none", "--cache-control", "none")
    output = ("--csv", "--print-units", "base", "--metrics", names)
    return [ncu, "--profile-from-start", "off", *quiet, *output, *program]


@dataclass(frozen=True)
class Ended:
    """What a program left; `rc` is None where it was ended, as time was up."""

    rc: int | None
    stdout: str
    stderr: str


def run(command: Sequence[str], seconds: float) -> Ended:
    """Runs a program, and ends it with all that it started when time is up."""
    with noted(signal.SIGTERM) as came:
        process = subprocess.Popen(
            command,
            cwd=report.REPOSITORY,
            # A locale with decimal commas would change the numbers.
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    late = False
    try:
        if came:
            raise SystemExit(128 + came[0])
        try:
            out, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            out, error = process.communicate()
    finally:  # also where this process is ended meanwhile
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(None if late else process.returncode, out, error)


# --- what it says -------------------------------------------------------------------------------


def parse(text: str) -> list[dict[str, Any]]:
    """Every kernel that was launched, with its counters; a counter that is missing is None.

    Args:
        text: what ncu prints with --csv: lines of its own and of the program, then one row for each
            kernel and metric.

    Raises:
        NoCounters: there is no such row.
    """
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    reader = csv.DictReader(line for line in lines[begin:] if line.startswith('"'))
    names = {metric: name for name, metric in METRICS.items()}
    launches: dict[str, dict[str, Any]] = {}
    for row in reader:
        name = names.get(row.get("Metric Name") or "")
        if name is None or row.get("Metric Value") is None:
            continue
        kernel = {"kernel": row["Kernel Name"], **dict.fromkeys(METRICS)}
        launch = launches.setdefault(row["ID"], kernel)
        launch[name] = number(row["Metric Value"], row.get("Metric Unit") or "")
    if not launches:
        raise NoCounters(said(text) or "no kernel was profiled")
    return list(launches.values())


def number(text: str, unit: str) -> float | None:
    """A value with thousands separators in microseconds, bytes or its unit; None for n/a."""
    try:
        value = float(text.replace(",", "").split()[0])
    except (ValueError, IndexError):
        return None
    value *= UNITS.get(unit, 1.0)
    return value if abs(value) < float("inf") else None  # False also for nan


def said(text: str) -> str | None:
    """The first error that ncu reports."""
    lines = (line.removeprefix("==ERROR==") for line in text.splitlines() if "==ERROR==" in line)
    return next((" ".join(line.split()) for line in lines), None)


def unknown_metrics(text: str) -> list[str]:
    """Our metrics that ncu says it does not find."""
    lines = [line for line in text.splitlines() if "Failed to find metric" in line]
    return [
        metric
        for metric in METRICS.values()
        if any(re.search(rf"\b{metric.split('.')[0]}\b", line) for line in lines)
    ]


def bound(launch: dict[str, Any]) -> str:
    """The busiest of what has a peak, or latency where nothing is busy."""
    share = max(((launch[name] or 0.0, title) for name, title in THROUGHPUTS.items()))
    if not share[0]:
        return "-"
    text = f"{share[1]} {share[0]:.0f}%"
    return text if share[0] >= BUSY else f"latency, {text}"


def stall(launch: dict[str, Any]) -> str:
    """What warps wait for most, in cycles for each instruction issued."""
    value, name = max((launch[f"stall_{name}"] or 0.0, name) for name in STALLS)
    words = name.removesuffix("_throttle").replace("_", " ")
    return f"{words} {value:.3g}" if value else "-"


def short(kernel: str) -> str:
    """A kernel's name without its types, arguments and namespaces."""
    name = re.sub(r"^void ", "", kernel)
    return re.split(r"[<(]", name)[0].split("::")[-1][:30] or kernel[:30]


def table(calls: Sequence[dict[str, Any]]) -> Table:
    """Every kernel of every call that has counters."""
    made = Table(title="Counters: of peak throughput, and hit rates, in %", **LOOK)
    names = ("kernel", "us", "SM", "L1", "L2", "DRAM", "L1\nhit", "L2\nhit", "warps")
    columns(made, *names, "regs", "bound by", "stalled most by")
    shown = (*THROUGHPUTS, "l1_hit_pct", "l2_hit_pct", "warps_active_pct")
    for call in calls:
        title = f"{call['case']} {call['dtype']} {call['pass']}"
        made.add_row(f"[italic]{title}[/]", "" if call["status"] == MET else call["status"])
        for launch in call["launches"]:
            cells = [_digits(launch["duration_us"], 1)]
            cells += [_digits(launch[name]) for name in (*shown, "registers")]
            made.add_row(short(launch["kernel"]), *cells, bound(launch), stall(launch))
    return made


def _digits(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# --- run ----------------------------------------------------------------------------------------


def profile(
    ncu: str | None, case: str, dtype: str, which: str, seconds: float, rehearse: bool
) -> dict[str, Any]:
    """One call under ncu; a metric that this ncu does not know costs a second run, and is None."""
    began = time.monotonic()
    call: dict[str, Any] = {"case": case, "dtype": dtype, "pass": which}
    program = [*PROGRAM, case, dtype, which, *["--rehearse"] * rehearse]
    ended = run(command_of(ncu, program), seconds)
    text = ended.stdout + ended.stderr
    unknown = unknown_metrics(text)
    if ended.rc is not None and 0 < len(unknown) < len(METRICS):
        left = max(1.0, seconds - (time.monotonic() - began))
        ended = run(command_of(ncu, program, unknown), left)
        text = ended.stdout + ended.stderr
    refused = next((word for word in REFUSED if word in text), None)
    status, detail, launches = FAILED, "", []
    if ended.rc is None:
        status, detail = LATE, f"after {seconds:.0f} s"
    elif refused is not None:
        status, detail = REFUSAL, said(text) or refused
    elif ended.rc != 0:
        last = ended.stderr.strip().splitlines()[-1:]
        detail = "; ".join(filter(None, (f"exit status {ended.rc}", said(text), *last)))
    else:
        try:
            launches = parse(SAMPLE.read_text() if rehearse else ended.stdout)
            status = MET
        except NoCounters as error:
            detail = str(error)
    call |= {"status": status, "detail": report.without_paths(detail[:300])}
    call |= {"seconds": round(time.monotonic() - began, 1), "unknown_metrics": unknown}
    return {**call, "launches": launches}


def profile_all(
    args: argparse.Namespace, ncu: str | None, record: dict[str, Any], console: Console
) -> int:
    """All calls, or none after ncu was refused the counters; 1 where one failed or was late."""
    wanted = PROFILED[:2] if args.rehearse else PROFILED
    deadline = time.monotonic() + args.seconds
    calls: list[dict[str, Any]] = []
    for each in wanted:
        # One that hangs leaves time to the others.
        seconds = min(deadline - time.monotonic(), 2 * args.seconds / len(wanted))
        if seconds <= 0:
            calls.append(
                {
                    **dict(zip(("case", "dtype", "pass"), each, strict=True)),
                    **{"status": LATE, "detail": "no time left", "seconds": 0.0},
                    **{"unknown_metrics": [], "launches": []},
                }
            )
        else:
            calls.append(profile(ncu, *each, seconds, args.rehearse))
        refused = calls[-1]["status"] == REFUSAL
        complete = refused or len(calls) == len(wanted)
        reason = calls[-1]["detail"] if refused else None
        report.write_json(
            args.out, {**record, "no_counters": reason, "calls": calls, "complete": complete}
        )
        if refused:
            console.print(f"No counters here: {reason}", highlight=False, markup=False)
            return 0
    for call in calls:
        if call["status"] != MET:
            names = f"{call['case']}, {call['dtype']}, {call['pass']}"
            line = f"{names}: {call['status']}: {call['detail']}"
            console.print(line, style="bold red", highlight=False, markup=False)
    console.print(table(calls))
    return 0 if all(call["status"] == MET for call in calls) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.profile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="for the results")
    parser.add_argument(
        "--rehearse", action="store_true", help="without ncu and GPU, with counters from a file"
    )
    add_seconds(parser, 60.0, "for all calls")
    args = parser.parse_args(argv)
    ncu = None
    if not args.rehearse:
        ncu = find_ncu()
        gpu = None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"
        reason = gpu or why_not()
        if reason is not None:
            print(f"profile: {reason}", file=sys.stderr)
            return 2
    origin = report.origin(torch.device("cpu" if args.rehearse else "cuda"))
    origin["versions"]["ncu"] = version_of(ncu)
    record = {
        "schema": 1,
        "benchmark": "gpu-profile",
        **origin,
        "rehearsal": args.rehearse,
    }
    with exit_on(signal.SIGTERM):  # so that what runs ends with this
        return profile_all(args, ncu, record, wide_console())


def version_of(ncu: str | None) -> str | None:
    if ncu is None:
        return None
    found = re.search(r"Version (\S+)", run([ncu, "--version"], 20).stdout)
    return None if found is None else found[1]


if __name__ == "__main__":
    sys.exit(main())
