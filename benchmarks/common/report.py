# SPDX-License-Identifier: Apache-2.0
"""What every result records beside its numbers: machine, versions, commit, date.

torch.utils.collect_env has the same as prose for a bug report: lscpu's whole text, no clocks.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"  # published, tracked
OUT = REPOSITORY / "benchmarks" / "out"  # of any run, ignored by git
GIB = 1024**3

_GPU_QUERY = (
    "driver_version",
    "clocks.current.sm",
    "clocks.max.sm",
    "clocks.current.memory",
    "power.limit",
    "temperature.gpu",
)


def _output_of(*command: str, cwd: Path | None = None) -> str | None:
    """Standard output of a command, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        name = _output_of("sysctl", "-n", "machdep.cpu.brand_string")
        if name:
            return name
    return platform.processor() or platform.machine() or "unknown CPU"


def ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def os_name() -> str:
    """System and version; of the kernel's only the first two numbers, the rest is its build."""
    name = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    with contextlib.suppress(OSError, AttributeError):
        name += f" ({platform.freedesktop_os_release()['PRETTY_NAME']})"
    return name


def gpu_clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, power limit and driver of one GPU, as nvidia-smi prints them."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    # By its own name: nvidia-smi's numbers ignore CUDA_VISIBLE_DEVICES, torch's do not.
    which = () if uuid is None else ("-i", f"GPU-{str(uuid).removeprefix('GPU-')}")
    text = _output_of(
        "nvidia-smi", *which, f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader"
    )
    if not text:
        return None
    values = [value.strip() for value in text.splitlines()[0].split(",")]
    return dict(zip(_GPU_QUERY, values, strict=False))


def machine(device: torch.device) -> dict[str, Any]:
    """The machine, without its name or anything else that identifies its owner."""
    ram = ram_bytes()
    record: dict[str, Any] = {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "ram_gib": None if ram is None else round(ram / GIB, 1),
        "os": os_name(),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / GIB, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "clocks": gpu_clocks(device),
        }
    return record


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, torch and `packages` (import names); None where one has none."""
    record: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
    }
    for package in packages:
        record[package] = _version(package)
    return record


def _version(package: str) -> str | None:
    version = getattr(importlib.import_module(package), "__version__", None)
    if version is not None:
        return str(version)
    for distribution in importlib.metadata.packages_distributions().get(package, [package]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def git_state() -> dict[str, Any]:
    """The checkout's commit, and whether files were changed since; Nones outside a checkout."""
    commit = changed = None
    top = _output_of("git", "rev-parse", "--show-toplevel", cwd=REPOSITORY)
    if top and Path(top).resolve() == REPOSITORY:  # and not a copy in another project's checkout
        commit = _output_of("git", "rev-parse", "--verify", "HEAD", cwd=REPOSITORY)
    if commit is not None:
        # Results are rewritten by the run itself and say nothing about the code that ran.
        status = _output_of(
            "git", "status", "--porcelain", "--", ".", ":!benchmarks/results", cwd=REPOSITORY
        )
        changed = None if status is None else bool(status)
    return {"commit": commit, "uncommitted_changes": changed}


def without_paths(text: str) -> str:
    """The text with this machine's directories replaced: results are published."""
    places = [
        (REPOSITORY, "<checkout>"),
        (Path(sys.prefix), "<python>"),
        (Path(tempfile.gettempdir()), "<temporary>"),
        (Path.home(), "~"),
    ]
    for place, name in places:
        if place != Path(place.anchor):
            text = text.replace(str(place), name)
    return text


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def origin(device: torch.device, *packages: str) -> dict[str, Any]:
    """When, where, with what and from which commit a result comes; `packages` as for `versions`."""
    return {
        "date": today(),
        "machine": machine(device),
        "versions": versions(*packages),
        "git": git_state(),
    }


def caption(record: dict[str, Any]) -> str:
    """Machine and versions of a record in one line, for a chart."""
    host, software = record["machine"], record["versions"]
    ram = "" if host["ram_gib"] is None else f", {host['ram_gib']:.0f} GiB"
    if host["gpu"] is not None:
        where = f"{host['gpu']['name']} ({host['gpu']['memory_gib']:.0f} GiB)"
        clocks = host["gpu"]["clocks"]
        if clocks is not None:
            where += f", driver {clocks['driver_version']}, {clocks['clocks.max.sm']} max"
    else:
        cores, threads = host["cores"], host["threads"]
        where = f"{host['cpu']}, {cores} core{'s' * (cores != 1)}"
        where += f", {threads} thread{'s' * (threads != 1)}{ram}"
    commit = record["git"]["commit"]
    ran = list(dict.fromkeys(record["backends"]["ran"].values()))
    parts = [
        where,
        host["os"].split(" (")[0],
        f"Python {software['python']}, torch {software['torch']}",
        "deformable op: " + ", ".join(ran).replace(" chosen by auto", ""),
    ]
    if commit is not None:
        changed = " with changes" if record["git"]["uncommitted_changes"] else ""
        parts.append(f"commit {commit[:9]}{changed}")
    parts.append(record["date"][:10])
    return " · ".join(parts)


def result_file(folder: Path, benchmark: str, device: str, suffix: str = "json") -> Path:
    """How a command's results are named: <benchmark>-<device>.<suffix>."""
    return folder / f"{benchmark}-{torch.device(device).type}.{suffix}"


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    partial.replace(path)


def check_csv(path: Path, fields: Sequence[str]) -> None:
    """Raises ValueError where `path` holds rows with other columns than `fields`."""
    try:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
    except FileNotFoundError:
        return
    if header and header != list(fields):
        differing = sorted(set(header) ^ set(fields)) or ["their order"]
        raise ValueError(
            f"{path}: its columns are not those of this version (differing: "
            f"{', '.join(differing)}); move it away, or write to another file"
        )


def append_csv(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows below one header, numbers with six digits."""
    check_csv(path, fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
