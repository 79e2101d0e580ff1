# SPDX-License-Identifier: Apache-2.0
"""What a GPU can do of what the operator needs: builds and runs ceilings.cu, and shows its results.

    python -m benchmarks.gpu.ceilings folder                  # builds for this GPU, measures
    python -m benchmarks.gpu.ceilings folder --build-for 9.0  # only builds, also without a GPU

The folder keeps the program. One that was built elsewhere, for the same architecture and from the
same source, is used as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import report
from benchmarks.common.console import LOOK, columns, wide_console
from benchmarks.common.options import add_seconds
from benchmarks.common.programs import cuda_tool
from benchmarks.op.bandwidth import NotMeasured

SOURCE = Path(__file__).with_name("ceilings.cu")
BUILD_SECONDS = 120.0
SECONDS = 60.0


@dataclass(frozen=True)
class Ceiling:
    """One rate.

    Attributes:
        name: what is done, such as "copy", "gather" or "red.v4.f32".
        unit: of value and median.
        value: of the best run.
        median: of all runs.
        parameters: mib: the footprint; row_bytes; window: rows that a block chooses from, 0 for
            all of the footprint. Those of the name.
    """

    name: str
    unit: str
    value: float
    median: float
    parameters: dict[str, int]


def program_in(folder: Path, capability: tuple[int, int]) -> Path:
    """Where the program for one architecture is kept, compiled from the present source."""
    content = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:8]
    return folder.resolve() / "ceilings-sm_{}{}-{}".format(*capability, content)


def build(folder: Path, capability: tuple[int, int] | None = None) -> Path:
    """The program in `folder`, compiled if it is not there.

    Args:
        folder: made if needed.
        capability: of the GPU to compile for; the present one's by default.

    Raises:
        NotMeasured: there is no GPU to compile for, no nvcc, or it fails.
    """
    if capability is None:
        if not torch.cuda.is_available():
            raise NotMeasured(f"torch {torch.__version__} sees no GPU to measure")
        capability = torch.cuda.get_device_capability()
    program = program_in(folder, capability)
    if program.exists():
        program.chmod(program.stat().st_mode | 0o100)  # a copy may have lost it
        return program
    folder.mkdir(parents=True, exist_ok=True)
    partial = program.with_name(f"{program.name}.{os.getpid()}")
    arch = "{}{}".format(*capability)
    command = [_nvcc(), "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    try:
        _run([*command, str(SOURCE), "-o", str(partial)], BUILD_SECONDS)
        partial.replace(program)
    finally:
        partial.unlink(missing_ok=True)
    return program


def measure(program: Path, seconds: float = SECONDS) -> list[Ceiling]:
    """Runs the program on the first GPU; a few seconds.

    Args:
        program: from `build`.
        seconds: after which it is ended.

    Raises:
        NotMeasured: it fails, is late, or prints something else.
    """
    return parse(_run([str(program)], seconds))


def parse(text: str) -> list[Ceiling]:
    """What the program printed.

    Raises:
        NotMeasured: it is something else.
    """
    try:
        read = [Ceiling(**each) for each in json.loads(text)["ceilings"]]
        valid = bool(read) and all(
            isinstance(each.name, str)
            and isinstance(each.unit, str)
            and all(isinstance(rate, (int, float)) for rate in (each.value, each.median))
            and all(0 < rate < math.inf for rate in (each.value, each.median))
            and all(isinstance(number, int) for number in each.parameters.values())
            for each in read
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NotMeasured(f"ceilings.cu printed no ceilings: {error!r}") from error
    if not valid:
        raise NotMeasured("ceilings.cu printed no ceilings, or a rate that is none")
    return read


def table(ceilings: Sequence[Ceiling]) -> Table:
    """Those that have a footprint: a column for each."""
    footprints = sorted({each.parameters["mib"] for each in ceilings if "mib" in each.parameters})
    rows: dict[str, dict[int, float]] = {}
    for each in ceilings:
        if "mib" in each.parameters:
            rows.setdefault(_label(each), {})[each.parameters["mib"]] = each.value
    shown = Table(title="Ceilings of this GPU: GB/s over footprints, best run", **LOOK)
    columns(shown, "", *(f"{mib} MiB" for mib in footprints))
    for label, values in rows.items():
        cells = (f"{values[mib]:.0f}" if mib in values else "-" for mib in footprints)
        shown.add_row(label, *cells)
    return shown


def _label(each: Ceiling) -> str:
    parts = [each.name]
    if "row_bytes" in each.parameters:
        parts.append(f"{each.parameters['row_bytes']} B")
    if "window" in each.parameters:
        window = each.parameters["window"]
        parts.append(f"among {window} rows" if window else "anywhere")
    return ", ".join(parts)


def show(console: Console, ceilings: Sequence[Ceiling]) -> None:
    """The table, and below it one line for each kind of arithmetic."""
    console.print(table(ceilings))
    arithmetic: dict[str, list[str]] = {}
    for each in ceilings:
        if "mib" not in each.parameters:
            arithmetic.setdefault(each.name, []).append(f"{each.value:.3g} {each.unit}")
    for name, rates in arithmetic.items():
        console.print(f"{name}: {', '.join(rates)}", highlight=False)


def record(ceilings: Sequence[Ceiling], device: torch.device) -> dict[str, Any]:
    """What is published: the rates, and what they were measured on."""
    return {
        "schema": 1,
        "benchmark": "gpu-ceilings",
        **report.origin(device),
        "ceilings": [asdict(each) for each in ceilings],
    }


def why_not() -> str | None:
    """Why the program cannot be compiled here, or None."""
    missing = "ceilings.cu needs nvcc, which is neither on PATH nor in CUDA_HOME"
    return None if cuda_tool("nvcc") else missing


def _nvcc() -> str:
    found = cuda_tool("nvcc")
    if found is None:
        raise NotMeasured(str(why_not()))
    return found


def _run(command: Sequence[str], seconds: float) -> str:
    """Standard output of a command."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise NotMeasured(f"{name} was ended after {seconds:.0f} s") from error
    except OSError as error:
        raise NotMeasured(report.without_paths(f"{name} does not start: {error}")) from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        # A compiler's first error says more than its last line.
        said = [line for line in lines if re.search(r"\b(error|fatal)\b", line)] or lines[-1:]
        why = f": {said[0]}" if said else ""
        how = (
            f"was ended by signal {-done.returncode}"
            if done.returncode < 0
            else f"failed with exit status {done.returncode}"
        )
        raise NotMeasured(report.without_paths(f"{name} {how}{why}"))
    return done.stdout


def _capability(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a compute capability like 9.0, got {text!r}")
    return int(match[1]), int(match[2])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.ceilings", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where the program is kept")
    parser.add_argument("--build-for", type=_capability, metavar="X.Y", help="only build, for X.Y")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results to it")
    add_seconds(parser, SECONDS, "after which the program is ended")
    args = parser.parse_args(argv)
    try:
        program = build(args.folder, args.build_for)
        if args.build_for is not None:
            print(program)
            return 0
        ceilings = measure(program, args.seconds)
    except NotMeasured as error:
        print(f"ceilings: {error}", file=sys.stderr)
        return 1
    show(wide_console(), ceilings)
    if args.out is not None:
        report.write_json(args.out, record(ceilings, torch.device("cuda")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
