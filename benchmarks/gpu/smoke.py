# SPDX-License-Identifier: Apache-2.0
"""First contact of one backend's kernels with a GPU: the smoke stage of the check.

    python -m benchmarks.gpu.smoke cuda --out smoke-cuda.json --seconds 60

A few hundred checks by the tests' gate: both operators, all widths, pairs of dtypes, deterministic,
queries that are pixels of grids, contention, far outside; and what only a device shows
(smoke_checks.py). They are dealt to shards, each a process of its own (smoke_shards.py): an illegal
address ends one process, and the shard goes on in another with its next check. The result is
written whenever a shard has news, and says of each failure whether its error is near the bound,
which correct rounding can miss by a hair, or far beyond it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from benchmarks.common.options import add_seconds, natural
from benchmarks.common.programs import module
from benchmarks.gpu.smoke_checks import SPECIAL, checks_of
from benchmarks.gpu.smoke_shards import Shard, run_checks
from vitadapter_ops.testing import cases

WRITE_EVERY = 1.0  # seconds


def shards_of(backend: str, rehearse: bool) -> list[str]:
    if rehearse:  # by the same kernels, whatever the backend
        return ["offsets bf16", *[SPECIAL] * (backend == "cuda")]
    names = [
        f"{operator} {dtypes}" for operator in ("located", "offsets") for dtypes in cases.DTYPES
    ]
    if backend == "triton":
        # Its compiling takes seconds a kernel: fp64 alone is left to the tests.
        names = [name for name in names if not name.endswith("fp64")]
    return [*names, SPECIAL]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.smoke", description=__doc__.splitlines()[0]
    )
    parser.add_argument("backend", choices=("cuda", "triton"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the results")
    add_seconds(parser, 100.0, "for all checks")
    parser.add_argument("--rehearse", action="store_true", help="the CPU's kernels, few checks")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=natural, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    backend, device = ("cpu", "cpu") if args.rehearse else (args.backend, "cuda")
    if args.shard is not None:
        end = 3 if args.rehearse and args.shard != SPECIAL else None
        return run_checks(checks_of(args.shard, backend, device), device, args.start, end)
    if args.out is None:
        parser.error("--out: expected a file, got none")
    record = {
        "schema": 1,
        "benchmark": "gpu-smoke",
        "backend": backend,
        **report.origin(torch.device(device), "vitadapter_ops"),
    }
    return run_all(args, record)


def run_all(args: argparse.Namespace, record: dict[str, Any]) -> int:
    begin = time.monotonic()
    command = (*module("gpu.smoke"), args.backend, *["--rehearse"] * args.rehearse)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the references; shards fill the cores
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def write(shards: Sequence[Shard]) -> None:
        failures = [asdict(each) for shard in shards for each in shard.failures]
        counts = {
            each.name: {"checks": each.done, "seconds": round(each.seconds, 1)} for each in shards
        }
        complete = all(each.finished and not each.cut for each in shards)
        seconds = round(time.monotonic() - begin, 1)
        results = {"complete": complete, "seconds": seconds, "shards": counts, "failures": failures}
        report.write_json(args.out, {**record, **results})

    with tempfile.TemporaryDirectory() as folder:
        names = shards_of(args.backend, args.rehearse)
        shards = [Shard(name, command, Path(folder)) for name in names]
        written = begin
        try:
            for shard in shards:
                shard.start()
            while time.monotonic() - begin < args.seconds:
                news = any([shard.poll() for shard in shards])
                if news and time.monotonic() - written > WRITE_EVERY:
                    written = time.monotonic()
                    write(shards)
                if all(shard.finished for shard in shards):
                    break
                time.sleep(0.05)
        finally:
            for shard in shards:
                shard.end()
        write(shards)
    return show(args.backend, shards)


def show(backend: str, shards: Sequence[Shard]) -> int:
    """Prints what failed; 1 if anything did that rounding does not explain."""
    failures = [each for shard in shards for each in shard.failures]
    far = [each for each in failures if not each.near]
    done = sum(shard.done for shard in shards)
    print(f"{backend}: {done} checks, {len(far)} failed, {len(failures) - len(far)} near the bound")
    for each in failures:
        print(f"  {'near' if each.near else 'FAIL'} {each.check}: {each.error}")
    return 1 if far or not done else 0


if __name__ == "__main__":
    sys.exit(main())
