# SPDX-License-Identifier: Apache-2.0
"""Runs steps side by side or alone, each within its budget, and keeps what became of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.programs import noted

GRACE = 5.0  # from asking a step to end until ending it
SHOWN = 25  # lines of a step that failed

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MET, FAILED, LATE, SKIPPED = "ok", "failed", "timed out", "skipped"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: in the summary and the log.
        command: program and arguments.
        seconds: its budget.
        stage: that it belongs to.
        needs: steps that must not have failed.
        alone: nothing else may run, and it waits for all steps before it.
        writes: its results, in the folder for all that is written.
        shown: how many of the last lines that it printed are for the reader.
        environment: what it has beside this process's.
        skip: why it is left out, or None.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    stage: str = ""
    needs: tuple[str, ...] = ()
    alone: bool = False
    writes: tuple[str, ...] = ()
    shown: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    skip: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step; `rc` is None where it did not run or did not end."""

    name: str
    stage: str
    status: str
    rc: int | None
    seconds: float
    budget: float
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.status in (FAILED, LATE)


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    began: float


class Run:
    """Runs steps, each as soon as its turn allows, and keeps the summary.

    What a step prints is in `out`/<name>.log while it runs, and in gpu-check.log from then on.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        environment: Mapping[str, str],
        seconds: float,
        record: dict[str, Any],
    ) -> None:
        assert len({step.name for step in steps}) == len(steps)
        self.steps, self.out, self.record = steps, out, record
        self.environment = {**os.environ, **environment}
        self.deadline = time.monotonic() + seconds
        self.running: dict[str, _Running] = {}
        self.outcomes: dict[str, Outcome] = {}

    def run(self) -> int:
        """0 when no step failed.

        Raises:
            SystemExit: a signal of ENDING came; no step runs any more.
        """
        # A result of an earlier run must not pass for one of this.
        for name in ("gpu-check.log", "summary.json", *(w for s in self.steps for w in s.writes)):
            (self.out / name).unlink(missing_ok=True)
        with noted(*ENDING) as came:
            try:
                while len(self.outcomes) < len(self.steps) and not came:
                    self._start_what_may()
                    self._collect()
                    time.sleep(0.05)
            finally:  # nothing runs any more, unless this is killed
                for step in [step for step in self.steps if step.name in self.running]:
                    each = self.running.pop(step.name)
                    _end(each.process)
                    seconds = round(time.monotonic() - each.began, 1)
                    self._finish(step, FAILED, None, seconds, "interrupted")
                self._write_summary()
        if came:
            raise SystemExit(128 + came[0])
        return 1 if any(each.failed for each in self.outcomes.values()) else 0

    def _start_what_may(self) -> None:
        waiting = [step for step in self.steps if self._waits(step)]
        for step in waiting:
            if step.skip is not None:
                self._finish(step, SKIPPED, None, 0, step.skip)
            elif time.monotonic() >= self.deadline:
                self._finish(step, LATE, None, 0, "no time left")
            elif any(
                self._waits(other) or other.name in self.running for other in self._before(step)
            ):
                continue
            elif broken := [
                n for n in step.needs if n in self.outcomes and self.outcomes[n].failed
            ]:
                self._finish(step, SKIPPED, None, 0, f"{broken[0]} failed")
            else:
                self._start(step)

    def _waits(self, step: Step) -> bool:
        return step.name not in self.outcomes and step.name not in self.running

    def _before(self, step: Step) -> list[Step]:
        """Those that have to be over before a step starts."""
        earlier = self.steps[: self.steps.index(step)]
        return [each for each in earlier if step.alone or each.alone or each.name in step.needs]

    def _start(self, step: Step) -> None:
        with self._log(step).open("wb") as log:
            try:
                process = subprocess.Popen(
                    step.command,
                    cwd=report.REPOSITORY,
                    env={**self.environment, **step.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that its children end with it
                )
            except OSError as error:
                self._finish(step, FAILED, None, 0, str(error))
            else:
                self.running[step.name] = _Running(process, time.monotonic())

    def _collect(self) -> None:
        for step in [step for step in self.steps if step.name in self.running]:
            each, now = self.running[step.name], time.monotonic()
            rc = each.process.poll()
            late = now >= min(each.began + step.seconds, self.deadline)
            if rc is None and not late:
                continue
            _end(each.process)  # also what it has left behind
            del self.running[step.name]
            status = LATE if rc is None else MET if rc == 0 else FAILED
            self._finish(step, status, rc, round(now - each.began, 1))

    def _finish(
        self, step: Step, status: str, rc: int | None, seconds: float, detail: str = ""
    ) -> None:
        outcome = Outcome(step.name, step.stage, status, rc, seconds, step.seconds, detail)
        self.outcomes[step.name] = outcome
        for name in step.writes:
            _add_seconds(self.out / name, seconds)
        self._keep_log(step, outcome)
        self._write_summary()

    def _log(self, step: Step) -> Path:
        return self.out / f"{step.name}.log"

    def _keep_log(self, step: Step, outcome: Outcome) -> None:
        """Moves a step's log to the end of the common one, and shows its end."""
        own = self._log(step)
        text = own.read_text(errors="replace") if own.exists() else ""
        own.unlink(missing_ok=True)
        with (self.out / "gpu-check.log").open("a") as log:
            log.write(f"=== {step.name}: {' '.join(step.command)}\n{text}")
            log.write(f"=== {step.name}: {outcome.status} {outcome.detail}\n\n")
        detail = f" ({outcome.detail})" if outcome.detail else ""
        took = f" after {outcome.seconds:.0f} of {outcome.budget:.0f} s" if outcome.seconds else ""
        lines = max(step.shown, SHOWN) if outcome.failed else step.shown
        print(f"{step.name:<14} {outcome.status}{took}{detail}", flush=True)
        if lines and text:
            print(*text.splitlines()[-lines:], "", sep="\n", flush=True)

    def _write_summary(self) -> None:
        done = [self.outcomes[step.name] for step in self.steps if step.name in self.outcomes]
        steps = [{**asdict(each), "detail": report.without_paths(each.detail)} for each in done]
        complete = len(done) == len(self.steps)
        ok = complete and not any(each.failed for each in done)
        summary = {**self.record, "complete": complete, "ok": ok, "steps": steps}
        report.write_json(self.out / "summary.json", summary)


def _add_seconds(path: Path, seconds: float) -> None:
    """Says in a stage's result how long the stage took."""
    if path.suffix == ".json" and path.exists():
        record = json.loads(path.read_text())
        report.write_json(path, {**record, "stage_seconds": seconds})


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and all that it started."""
    if process.poll() is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return
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
