# SPDX-License-Identifier: Apache-2.0
"""Which steps the stages of the check consist of: their commands, budgets and order."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from benchmarks.common.programs import cuda_tool, module
from benchmarks.gpu import ceilings, profile
from benchmarks.gpu.runner import Step

CAPABILITY = "9.0"  # that a rehearsal compiles for
SLOWER = 5  # times the time that a rehearsal may take: it has few cores, and others on them
BUILT = ("build-cuda",)  # what a step that runs kernels needs


def sanitizer() -> str | None:
    return cuda_tool("compute-sanitizer")


def gpu_capability() -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability())


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
    def environment(self) -> dict[str, str]:
        """What all steps have beside this process's."""
        paths = [*map(str, self.sites.values()), str(report.REPOSITORY)]
        found = {
            "PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "TORCH_EXTENSIONS_DIR": str(self.folder / "extensions"),
            "TMPDIR": str(self.folder),  # what a step that is ended leaves goes with it
        }
        if not self.rehearse:  # for this GPU alone: a build for all takes minutes
            given = os.environ.get("TORCH_CUDA_ARCH_LIST")
            found["TORCH_CUDA_ARCH_LIST"] = gpu_capability() if given is None else given
        return found

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def slower(self) -> int:
        return SLOWER if self.rehearse else 1

    def own(self, program: str, *arguments: str) -> tuple[str, ...]:
        """A module of this folder, which knows what a rehearsal is."""
        last = ("--rehearse",) * self.rehearse
        return (*module(f"gpu.{program}"), *arguments, *last)

    def results(self, file: str, seconds: float | None = None) -> tuple[str, ...]:
        """Options of such a module: where to write, and after how long to end by itself."""
        limit = () if seconds is None else ("--seconds", str(seconds * self.slower))
        return ("--out", str(self.out / file), *limit)

    def steps(self) -> list[Step]:
        """All steps, in the order of STAGES; budgets are for 16 cores."""
        made = [
            *self.build(),
            *self.smoke(),
            *self.ceilings(),
            self.measure("times", 110, shown=120),
            self.measure(
                "profile", 70, shown=50, skip=None if self.rehearse else profile.why_not()
            ),
            self.tests(),
            *self.sanitize(),
            *self.benchmark(),
        ]
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
        for backend, needs in (("triton", ()), ("cuda", BUILT)):
            name = f"smoke-{backend}"
            file = f"{name}.json"
            command = self.own("smoke", backend, *self.results(file, 100))
            steps.append(Step(name, command, 120, "smoke", needs, writes=(file,), shown=20))
        return steps

    def ceilings(self) -> list[Step]:
        """A rehearsal compiles the program, and has nothing to run it on."""
        program = (*module("gpu.ceilings"), str(self.folder / "ceilings"))
        file, missing = "ceilings.json", ceilings.why_not()
        rehearsed = "a rehearsal has no GPU to measure" if self.rehearse else None
        build = (*program, "--build-for", CAPABILITY if self.rehearse else gpu_capability())
        return [
            Step("build-ceilings", build, 100, "ceilings", skip=missing),
            Step(
                "ceilings",
                (*program, "--out", str(self.out / file), "--seconds", "30"),
                40,
                "ceilings",
                ("build-ceilings",),
                alone=True,
                writes=(file,),
                shown=60,
                skip=rehearsed or missing,
            ),
        ]

    def measure(self, name: str, seconds: float, **options: Any) -> Step:
        """A stage that is a module of the same name."""
        file = f"{name}.json"
        command = self.own(name, *self.results(file, seconds - 10))
        return Step(name, command, seconds, name, BUILT, alone=True, writes=(file,), **options)

    def tests(self) -> Step:
        file = "tests.json"
        command = self.own("tests", *self.results(file))
        return Step("tests", command, 130, "tests", BUILT, writes=(file,), shown=15)

    def sanitize(self) -> list[Step]:
        tool = sanitizer()
        missing = None if tool else "compute-sanitizer is neither on PATH nor in CUDA_HOME"
        again = "a rehearsal has no compute-sanitizer, and runs this as memcheck already"
        rehearsed = {"memcheck": None, "racecheck": again}
        # Errors of the API that torch asks about are no errors of kernels; and warnings of hazards
        # that the hardware orders are no errors.
        checks = {
            "memcheck": ("--report-api-errors", "no"),
            "racecheck": ("--racecheck-detect-level", "error"),
        }
        steps = []
        for check, options in checks.items():
            under = (tool or check, "--tool", check, "--error-exitcode", "86", *options)
            steps.append(
                Step(
                    check,
                    (*(() if self.rehearse else under), *self.own("steps", "small")),
                    130,
                    "sanitize",
                    BUILT,
                    # Without a cache every tensor is an allocation, whose end the tool knows.
                    environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                    skip=rehearsed[check] if self.rehearse else missing,
                )
            )
        return steps

    def benchmark(self) -> list[Step]:
        """Commands that people call too, which know no rehearsal: they get smaller work."""
        if self.rehearse:
            host = ("--host", "--rounds", "3")
            op = ("--cases", "injector-S-512", "--locations", "local", "--against")
            op += ("--rounds", "3", "--seconds", "0.1")
            attn = ("--cases", "deformable", "--size", "64", "64")
            attn += ("--rounds", "1", "--warmup", "0")
            model = ("--cases", "tiny", "--pixels", "64", "--rounds", "1", "--warmup", "0")
            model += ("--no-memory",)
        else:
            host = ("--host",)
            op = ("--rounds", "20", "--seconds", "0.2", "--at-most", "60")
            attn = ("--rounds", "10", "--warmup", "3")
            model = ("--cases", "base", "large", "--rounds", "10", "--warmup", "3")

        def step(
            name: str,
            program: str,
            seconds: float,
            shown: int,
            *arguments: str,
            stage: str | None = None,
            files: Sequence[str] = (),
        ) -> Step:
            command = (*module(program), "--device", self.device, *arguments)
            if files:
                command += ("--out", str(self.out))
            names = tuple(f"{name}-{self.device}.{kind}" for kind in files)
            return Step(name, command, seconds, stage or name, BUILT, True, names, shown)

        return [
            step("host", "op", 40, 20, *host, stage="op"),
            step("op", "op", 120, 60, *op, files=("csv", "json")),
            step("attn", "models.attention", 70, 40, *attn, files=("json",)),
            step("model", "models.adapter_vs_vit", 70, 40, *model, files=("json",)),
        ]
