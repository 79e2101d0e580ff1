# SPDX-License-Identifier: Apache-2.0
"""The tests that need a GPU, with results kept as they come: the tests stage of the check.

    python -m benchmarks.gpu.tests --out tests.json [--rehearse] [arguments of pytest]

pytest alone prints failures when all is over, which never comes for a run that is ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.report import REPOSITORY, origin, without_paths, write_json

MOST_FAILURES = 30
WRITE_EVERY = 2.0  # seconds
REHEARSED = "tests/test_optional.py"


class Keeper:
    """A pytest plugin that writes what is known to a file."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record
        self.begin = self.written = time.monotonic()
        self.counts = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
        self.failures: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        self.counts[outcome] += 1
        failed = report.failed
        if failed:
            said = without_paths(report.longreprtext)[-1500:]
            self.failures.append({"test": report.nodeid, "said": said})
        if failed or time.monotonic() - self.written > WRITE_EVERY:
            self.write(complete=False)
        if failed:  # told when it is kept
            print(f"\n{report.nodeid}: {said.splitlines()[-1][:300] if said else ''}", flush=True)

    def write(self, complete: bool) -> None:
        self.written = time.monotonic()
        results = {"complete": complete, "seconds": round(self.written - self.begin, 1)}
        results |= {"counts": self.counts, "failures": self.failures}
        write_json(self.path, {**self.record, **results})


def workers() -> int:
    """Triton compiles for most of the time; some cores are left for the sanitizer beside it."""
    return max(1, min(10, (os.cpu_count() or 1) - 4))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tests", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="for the results")
    parser.add_argument("--rehearse", action="store_true", help="some tests that need no GPU")
    args, others = parser.parse_known_args(argv)
    record = {
        "schema": 1,
        "benchmark": "gpu-tests",
        **origin(torch.device("cpu" if args.rehearse else "cuda"), "vitadapter_ops"),
    }
    keeper = Keeper(args.out, record)
    given = ["-q", "--tb=short", f"--maxfail={MOST_FAILURES}", "-p", "no:cacheprovider"]
    if args.rehearse:
        given += [REHEARSED]
    else:
        os.environ["FAIL_WITHOUT_CUDA"] = "1"
        given += ["-m", "gpu", "tests"]
        if importlib.util.find_spec("xdist") is not None:
            given += ["-n", str(workers())]
    os.chdir(REPOSITORY)
    code = int(pytest.main([*given, *others], plugins=[keeper]))
    keeper.write(complete=True)
    counts = ", ".join(f"{number} {what}" for what, number in keeper.counts.items() if number)
    print(f"tests: {counts or 'none ran'}")
    for each in keeper.failures:
        print(f"  FAIL {each['test']}")
    return code


if __name__ == "__main__":
    sys.exit(main())
