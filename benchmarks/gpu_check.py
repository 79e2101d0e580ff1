# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can tell, in under nine minutes and without a network.

    make gpu-check OUT=folder                   # or, with rivals to install for this run alone:
    make gpu-check OUT=folder RIVALS=archives   # a folder of wheels and source archives

Builds the kernels for this GPU against the torch of PYTHON, runs the tests that need a GPU and a
subset under compute-sanitizer, and times operator and model. Nothing is installed. Steps that need
not be quiet run side by side; each has its own budget of time, and fails alone. The folder gets

    summary.json     each step's outcome and time
    gpu-check.log    what the steps printed, one after the other
    op-cuda.*, attn-cuda.*    the results
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
SECONDS = 530.0
GRACE = 5.0  # from asking a step to end until ending it
SHOWN = 25  # lines of a step that failed

MET, FAILED, LATE, SKIPPED = "ok", "failed", "timed out", "skipped"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: in the summary and the log.
        command: program and arguments.
        seconds: its budget.
        environment: what it has beside this process's.
        skip: why it is left out, or None.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    skip: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step; `rc` is None where it did not run or did not end."""

    name: str
    status: str
    rc: int | None
    seconds: float
    budget: float
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.status in (FAILED, LATE)


def run_together(
    steps: Sequence[Step], out: Path, environment: Mapping[str, str], deadline: float
) -> list[Outcome]:
    """Runs steps side by side, each for its budget at most and none beyond the deadline.

    What a step prints is in `out`/<name>.log while it runs, and in gpu-check.log from then on.
    """
    began = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    outcomes: dict[str, Outcome] = {}
    for step in steps:
        if step.skip is not None:
            outcomes[step.name] = Outcome(step.name, SKIPPED, None, 0, step.seconds, step.skip)
        elif began >= deadline:
            outcomes[step.name] = Outcome(step.name, LATE, None, 0, step.seconds, "no time left")
        else:
            with (out / f"{step.name}.log").open("wb") as log:
                try:
                    running[step.name] = subprocess.Popen(
                        step.command,
                        cwd=ROOT,
                        env={**os.environ, **environment, **step.environment},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # so that its children end with it
                    )
                except OSError as error:
                    outcomes[step.name] = Outcome(
                        step.name, FAILED, None, 0, step.seconds, str(error)
                    )
    try:
        while running:
            now = time.monotonic()
            for step in [step for step in steps if step.name in running]:
                rc = running[step.name].poll()
                late = now >= min(began + step.seconds, deadline)
                if rc is None and not late:
                    continue
                if rc is None:
                    _end(running[step.name])
                status = LATE if rc is None else MET if rc == 0 else FAILED
                del running[step.name]
                outcomes[step.name] = Outcome(
                    step.name, status, rc, round(now - began, 1), step.seconds
                )
            time.sleep(0.05)
    finally:
        for process in running.values():
            _end(process)
    done = [outcomes[step.name] for step in steps]
    for step, outcome in zip(steps, done, strict=True):
        _keep_log(step, outcome, out)
    return done


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _keep_log(step: Step, outcome: Outcome, out: Path) -> None:
    """Moves a step's log to the end of the common one, and shows how a failed one ended."""
    own = out / f"{step.name}.log"
    text = own.read_text(errors="replace") if own.exists() else ""
    own.unlink(missing_ok=True)
    with (out / "gpu-check.log").open("a") as log:
        log.write(f"=== {step.name}: {' '.join(step.command)}\n{text}")
        log.write(f"=== {step.name}: {outcome.status} {outcome.detail}\n\n")
    detail = f" ({outcome.detail})" if outcome.detail else ""
    took = f" after {outcome.seconds:.0f} of {outcome.budget:.0f} s" if outcome.seconds else ""
    if outcome.failed:
        print(*text.splitlines()[-SHOWN:], sep="\n")
    print(f"{step.name:<10} {outcome.status}{took}{detail}", flush=True)


def run_all(
    groups: Sequence[Sequence[Step]],
    out: Path,
    environment: Mapping[str, str],
    seconds: float,
    record: dict[str, Any],
) -> int:
    """Runs one group of steps after the other and keeps the summary; 0 when no step failed."""
    import _report

    (out / "gpu-check.log").unlink(missing_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for group in groups:
        outcomes += run_together(group, out, environment, deadline)
        ok = not any(outcome.failed for outcome in outcomes)
        steps = [
            {**asdict(each), "detail": _report.without_paths(each.detail)} for each in outcomes
        ]
        complete = len(outcomes) == sum(len(each) for each in groups)
        summary = {**record, "complete": complete, "ok": ok, "steps": steps}
        _report.write_json(out / "summary.json", summary)
    return 0 if ok else 1


def sanitizer() -> str | None:
    """compute-sanitizer: on PATH, or with the CUDA that torch finds."""
    from torch.utils.cpp_extension import CUDA_HOME

    beside = None if CUDA_HOME is None else str(Path(CUDA_HOME) / "bin")
    return shutil.which("compute-sanitizer") or (
        shutil.which("compute-sanitizer", path=beside) if beside else None
    )


def missing_module(name: str) -> str | None:
    found = importlib.util.find_spec(name) is not None
    return None if found else f"{name} is not importable by {sys.executable}"


def steps_of(out: Path, site: Path, rivals: Sequence[Path]) -> list[list[Step]]:
    """All steps; those of one group run side by side."""
    python, steps = sys.executable, str(BENCHMARKS / "_gpu_steps.py")
    cores = os.cpu_count() or 1
    pip = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation")
    install = Step(
        "rivals",
        (*pip, "--no-cache-dir", "--target", str(site), *map(str, rivals)),
        150,
        {"FORCE_CUDA": "1"},
        None if rivals else "RIVALS names none to install; those that PYTHON has are timed",
    )
    test = [python, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "--maxfail=30", "tests"]
    test += ["-p", "no:cacheprovider"]
    if missing_module("xdist") is None:  # Triton compiles for most of the time
        test += ["-n", str(max(1, min(10, cores - 4)))]
    tool = sanitizer()
    checked = [
        Step(
            check,
            (tool or check, "--tool", check, "--error-exitcode", "86", python, steps, "small"),
            160,
            # Without a cache every tensor is an allocation, whose end the tool knows.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            None if tool else "compute-sanitizer is neither on PATH nor in CUDA_HOME",
        )
        for check in ("memcheck", "racecheck")
    ]
    op = [python, str(BENCHMARKS / "op.py"), "--device", "cuda"]
    timed = ["--rounds", "20", "--seconds", "0.2", "--at-most", "110"]
    files = ["--csv", str(out / "op-cuda.csv"), "--json", str(out / "op-cuda.json")]
    attn = [python, str(BENCHMARKS / "attn.py"), "--device", "cuda", "--repeats", "10"]
    return [
        [
            Step("build-cpu", (python, steps, "build", "cpu"), 150),
            Step("build-cuda", (python, steps, "build", "cuda"), 150),
            install,
        ],
        [Step("tests", tuple(test), 160, {"FAIL_WITHOUT_CUDA": "1"}), *checked],
        [Step("host", (*op, "--host", "--no-csv"), 30)],
        [Step("op", (*op, *timed, *files), 150)],
        [Step("attn", (*attn, "--warmup", "3", "--out", str(out)), 70)],
    ]


def why_no_gpu() -> str | None:
    """None when there is a GPU, or else what torch says of it."""
    missing = missing_module("torch")
    if missing:
        return f"{missing}: make gpu-check PYTHON=... takes the Python that has it"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description="Build, test, sanitize and time on this machine's GPU."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--rivals", type=Path, help="folder of wheels and source archives to time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is not a folder")
    rivals: list[Path] = []
    if args.rivals is not None:
        rivals = sorted(each for each in args.rivals.glob("*") if each.suffix in (".whl", ".gz"))
        if not rivals:
            parser.error(f"--rivals: no .whl and no .tar.gz in {args.rivals}")
    reason = why_no_gpu()
    if reason is not None:
        print(f"gpu-check: no CUDA device: {reason}", file=sys.stderr)
        return 2
    import torch

    sys.path.insert(0, str(BENCHMARKS))
    import _report

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # A result of an earlier run must not pass for one of this.
    for name in ("summary.json", "op-cuda.csv", "op-cuda.json", "attn-cuda.json"):
        (out / name).unlink(missing_ok=True)
    device = torch.device("cuda")
    record = {
        "date": _report.today(),
        "machine": _report.machine(device),
        "versions": _report.versions(),
        "git": _report.git_state(),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [folder, str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            # For this GPU alone: a build for all takes minutes.
            "TORCH_CUDA_ARCH_LIST": os.environ.get(
                "TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability(device))
            ),
        }
        groups = steps_of(out, Path(folder), rivals)
        code = run_all(groups, out, environment, args.seconds, record)
    print(f"Written to {out}: summary.json says {'ok' if code == 0 else 'what failed'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
