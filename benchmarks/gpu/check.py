# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can tell, in stages that keep what they found, without a network.

    make gpu-check OUT=folder                         # all stages, under nine minutes
    make gpu-check OUT=folder STAGES="smoke times"    # some of them
    make gpu-check OUT=folder RIVALS=archives         # with rivals, installed for this run alone
    make gpu-check OUT=folder ARGS=--rehearse         # all scripts on the CPU, with tiny shapes

Nothing is installed, and nothing is left behind but the folder. Each step has its own budget of
time and fails alone; what is timed runs alone. The folder gets

    summary.json      each step's outcome and time
    gpu-check.log     what the steps printed, one after the other
    <stage>*.json     what each found, written while it runs; docs/gpu.md lists them
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 530.0
GRACE = 5.0  # from asking a step to end until ending it
SHOWN = 25  # lines of a step that failed
CAPABILITY = "9.0"  # that a rehearsal compiles for
SLOWER = 5  # times the time that a rehearsal may take: it has few cores, and others on them

MET, FAILED, LATE, SKIPPED = "ok", "failed", "timed out", "skipped"
# In this order: what decides most comes first.
STAGES = {
    "build": "compiles the kernels for this GPU; nothing to do where a library lies in the package",
    "smoke": "a few hundred checks of all kernels, by processes that may die",
    "ceilings": "what this GPU can do of what the operator needs",
    "times": "the decisive shapes, the backward's parts, and every rival",
    "profile": "hardware counters of four kernels",
    "tests": "the tests that need a GPU",
    "sanitize": "all kernels on small tensors under compute-sanitizer",
    "op": "all shapes, dtypes and kinds of time; what a call costs the host",
    "attn": "the attentions of the paper's table 7 inside ViT-Adapter-S",
    "model": "ViT-Adapter beside its plain ViT, B and L",
}


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: in the summary and the log.
        command: program and arguments.
        seconds: its budget.
        stage: one of STAGES.
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
        """0 when no step failed."""
        # A result of an earlier run must not pass for one of this.
        for name in ("gpu-check.log", "summary.json", *(w for s in self.steps for w in s.writes)):
            (self.out / name).unlink(missing_ok=True)
        try:
            while len(self.outcomes) < len(self.steps):
                self._start_what_may()
                self._collect()
                time.sleep(0.05)
        finally:  # nothing runs any more, unless this is ended itself
            for step in [step for step in self.steps if step.name in self.running]:
                each = self.running.pop(step.name)
                _end(each.process)
                seconds = round(time.monotonic() - each.began, 1)
                self._finish(step, FAILED, None, seconds, "interrupted")
            self._write_summary()
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
                    cwd=ROOT,
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
        from benchmarks.common import report as _report

        done = [self.outcomes[step.name] for step in self.steps if step.name in self.outcomes]
        steps = [{**asdict(each), "detail": _report.without_paths(each.detail)} for each in done]
        complete = len(done) == len(self.steps)
        ok = complete and not any(each.failed for each in done)
        summary = {**self.record, "complete": complete, "ok": ok, "steps": steps}
        _report.write_json(self.out / "summary.json", summary)


def _add_seconds(path: Path, seconds: float) -> None:
    """Says in a stage's result how long the stage took."""
    from benchmarks.common import report as _report

    if path.suffix == ".json" and path.exists():
        record = json.loads(path.read_text())
        _report.write_json(path, {**record, "stage_seconds": seconds})


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


# --- the plan -----------------------------------------------------------------------------------


def sanitizer() -> str | None:
    from benchmarks.common import programs

    return programs.cuda_tool("compute-sanitizer")


def missing_module(name: str) -> str | None:
    found = importlib.util.find_spec(name) is not None
    return None if found else f"{name} is not importable by {sys.executable}"


def gpu_capability() -> str:
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability())


def module(name: str) -> tuple[str, ...]:
    """The command that runs a module of `benchmarks`, from the folder of the checkout."""
    return (sys.executable, "-m", f"benchmarks.{name}")


@dataclass(frozen=True)
class Plan:
    """What the steps depend on.

    Attributes:
        out: folder for all that is written.
        folder: for what is only needed meanwhile.
        archives: of rivals.
        rehearse: with the CPU's kernels and tiny shapes.
    """

    out: Path
    folder: Path
    archives: Sequence[Path] = ()
    rehearse: bool = False

    @property
    def sites(self) -> dict[Path, Path]:
        """The folder that each rival is installed into, by its archive."""
        return {each: self.folder / "rivals" / each.name for each in self.archives}

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def slower(self) -> int:
        return SLOWER if self.rehearse else 1

    def most(self, seconds: float) -> str:
        """After how long a script ends by itself."""
        return str(seconds * self.slower)

    def own(self, script: str, *arguments: str) -> tuple[str, ...]:
        """A module of this package, which knows what a rehearsal is."""
        last = ("--rehearse",) * self.rehearse
        return (*module(script), *arguments, *last)

    def result(self, name: str) -> str:
        return str(self.out / name)

    def steps(self) -> list[Step]:
        """All steps, in the order of STAGES; budgets are for 16 cores."""
        made = [*self.build(), *self.smoke(), *self.measure(), *self.test(), *self.benchmark()]
        return [replace(step, seconds=step.seconds * self.slower) for step in made]

    def build(self) -> list[Step]:
        """Rivals too, each alone."""
        rehearsed = "a rehearsal has no GPU to compile for" if self.rehearse else None
        steps = [
            Step(
                f"build-{device}",
                (*module("gpu.steps"), "build", device),
                150,
                "build",
                shown=4,
                skip=rehearsed if device == "cuda" else None,
            )
            for device in ("cuda", "cpu")
        ]
        pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps")
        pip += ("--no-build-isolation", "--no-cache-dir", "--target")
        for archive, site in self.sites.items():
            command = (*pip, str(site), str(archive))
            forced = {} if self.rehearse else {"FORCE_CUDA": "1"}
            steps.append(Step(f"rival-{archive.name}", command, 150, "build", environment=forced))
        return steps

    def smoke(self) -> list[Step]:
        """Triton's part runs while nvcc compiles."""
        steps = []
        for backend, needs in (("triton", ()), ("cuda", ("build-cuda",))):
            file = f"smoke-{backend}.json"
            arguments = (backend, "--out", self.result(file), "--seconds", self.most(100))
            command = self.own("gpu.smoke", *arguments)
            steps.append(
                Step(f"smoke-{backend}", command, 120, "smoke", needs, writes=(file,), shown=20)
            )
        return steps

    def measure(self) -> list[Step]:
        from benchmarks.gpu import profile as _gpu_profile

        def step(name: str, script: str, seconds: float, **options: Any) -> Step:
            file = f"{name}.json"
            limit = self.most(seconds - 10)
            command = self.own(script, "--out", self.result(file), "--seconds", limit)
            return Step(name, command, seconds, name, ("build-cuda",), True, (file,), **options)

        return [
            *self.ceilings(),
            step("times", "gpu.times", 110, shown=120),
            step(
                "profile",
                "gpu.profile",
                70,
                shown=50,
                skip=None if self.rehearse else _gpu_profile.why_not(),
            ),
        ]

    def ceilings(self) -> list[Step]:
        """A rehearsal compiles the program, and has nothing to run it on."""
        from benchmarks.gpu import ceilings as _ceilings

        program = (*module("gpu.ceilings"), str(self.folder / "ceilings"))
        files = ("ceilings.json",)
        measured = ("--json", self.result(files[0]), "--seconds", "30")
        rehearsed = "a rehearsal has no GPU to measure" if self.rehearse else None
        build = (*program, "--build-for", CAPABILITY if self.rehearse else gpu_capability())
        return [
            Step("build-ceilings", build, 100, "ceilings", skip=_ceilings.why_not()),
            Step(
                "ceilings",
                (*program, *measured),
                40,
                "ceilings",
                ("build-ceilings",),
                True,
                files,
                60,
                skip=rehearsed or _ceilings.why_not(),
            ),
        ]

    def test(self) -> list[Step]:
        tool = sanitizer()
        tests = self.own("gpu.tests", "--out", self.result("tests.json"))
        steps = [
            Step("tests", tests, 130, "tests", ("build-cuda",), writes=("tests.json",), shown=15)
        ]
        for check in ("memcheck", "racecheck"):
            # Errors of the API that torch asks about are no errors of kernels; and warnings of
            # hazards that the hardware orders are no errors.
            options = {
                "memcheck": "--report-api-errors no",
                "racecheck": "--racecheck-detect-level error",
            }
            command = (tool or check, "--tool", check, "--error-exitcode", "86")
            command += tuple(options[check].split())
            if self.rehearse:
                command = ()
            steps.append(
                Step(
                    check,
                    (*command, *self.own("gpu.steps", "small")),
                    130,
                    "sanitize",
                    ("build-cuda",),
                    # Without a cache every tensor is an allocation, whose end the tool knows.
                    environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                    skip=None
                    if tool or self.rehearse
                    else "compute-sanitizer is neither on PATH nor in CUDA_HOME",
                )
            )
        return steps

    def benchmark(self) -> list[Step]:
        op_csv, op_json = f"op-{self.device}.csv", f"op-{self.device}.json"
        attn_json, model_json = f"attn-{self.device}.json", f"model-{self.device}.json"

        def step(
            name: str, stage: str, script: str, seconds: float, *arguments: str, **options: Any
        ):
            command = (*module(script), "--device", self.device)
            needs = ("build-cuda",)
            return Step(name, (*command, *arguments), seconds, stage, needs, True, **options)

        if self.rehearse:
            tiny = ("--cases", "injector-S-512", "--locations", "local", "--against")
            host, op = ("--rounds", "3"), (*tiny, "--rounds", "3", "--seconds", "0.1")
            attn = ("--attention", "deformable", "--size", "64", "64", "--repeats", "1")
            attn += ("--warmup", "0")
            model = ("--sizes", "tiny", "--pixels", "64", "--repeats", "1", "--warmup", "0")
            model += ("--no-memory",)
        else:
            host, op = (), ("--rounds", "20", "--seconds", "0.2", "--at-most", "60")
            attn = ("--repeats", "10", "--warmup", "3")
            model = ("--sizes", "base", "large", "--repeats", "10", "--warmup", "3")
        files = ("--csv", self.result(op_csv), "--json", self.result(op_json))
        return [
            step("host", "op", "op", 40, "--host", "--no-csv", *host, shown=20),
            step("op", "op", "op", 120, *op, *files, writes=(op_csv, op_json), shown=60),
            step(
                "attn",
                "attn",
                "models.attention",
                70,
                *attn,
                "--out",
                str(self.out),
                writes=(attn_json,),
                shown=40,
            ),
            step(
                "model",
                "model",
                "models.adapter_vs_vit",
                70,
                *model,
                "--json",
                self.result(model_json),
                writes=(model_json,),
                shown=40,
            ),
        ]


# --- the command --------------------------------------------------------------------------------


def why_no_packages() -> str | None:
    """None when this Python has what the stages import."""
    for name in ("torch", "rich", "matplotlib", "pytest"):
        missing = missing_module(name)
        if missing:
            return f"{missing}: make gpu-check PYTHON=... takes the Python that has it"
    return None


def why_no_gpu() -> str | None:
    """None when there is a GPU, or else what torch says of it."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.check",
        description="Build, check and measure on this machine's GPU.",
        epilog="\n".join(["stages:", *(f"  {name:<9} {what}" for name, what in STAGES.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--rivals", type=Path, help="folder of wheels and source archives to time")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=list(STAGES),
        metavar="STAGE",
        default=list(STAGES),
        help="which to run, always in the order below (default: all); build is always part of it",
    )
    parser.add_argument("--seconds", type=float, help=f"default: {SECONDS:.0f}")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="on the CPU, with its kernels and tiny shapes: finds slips in the scripts",
    )
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is not a folder")
    if args.seconds is None:
        args.seconds = SECONDS * (SLOWER if args.rehearse else 1)
    args.archives = []
    if args.rivals is not None:
        files = args.rivals.resolve().glob("*")
        args.archives = sorted(each for each in files if each.suffix in (".whl", ".gz"))
        if not args.archives:
            parser.error(f"--rivals: no .whl and no .tar.gz in {args.rivals}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    missing = why_no_packages()
    reason = None if missing or args.rehearse else why_no_gpu()
    if missing or reason:
        print(f"gpu-check: {missing or f'no CUDA device: {reason}'}", file=sys.stderr)
        return 2
    import torch

    from benchmarks.common import programs
    from benchmarks.common import report as _report

    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        print(f"gpu-check: --out: cannot write to {out}: {error.strerror}", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.rehearse else "cuda")
    record = {**_report.origin(device), "rehearsal": args.rehearse}
    # So that steps end with this.
    exits = programs.exit_on(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with exits, tempfile.TemporaryDirectory() as folder:
        archives = args.archives if {"times", "op"} & set(args.stages) else []
        plan = Plan(out, Path(folder), archives, args.rehearse)
        paths = [*map(str, plan.sites.values()), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "TORCH_EXTENSIONS_DIR": str(Path(folder, "extensions")),
            "TMPDIR": folder,  # what a step that is ended leaves goes with it
        }
        if not args.rehearse:  # for this GPU alone: a build for all takes minutes
            archs = os.environ.get("TORCH_CUDA_ARCH_LIST", gpu_capability())
            environment["TORCH_CUDA_ARCH_LIST"] = archs
        wanted = {"build", *args.stages}
        steps = [each for each in plan.steps() if each.stage in wanted]
        code = Run(steps, out, environment, args.seconds, record).run()
    print(f"Written to {out}: summary.json says {'ok' if code == 0 else 'what failed'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
