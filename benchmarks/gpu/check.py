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

plan.py has the steps of each stage, runner.py runs them. Here only the standard library may be
imported before it is known that the rest is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.programs import exit_on

SECONDS = 530.0
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


def missing_module(name: str) -> str | None:
    found = importlib.util.find_spec(name) is not None
    return None if found else f"{name} is not importable by {sys.executable}"


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
        prog="python -m benchmarks.gpu.check",
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
    parser.add_argument(
        "--seconds", type=float, help=f"for all (default: {SECONDS:.0f}, and a rehearsal has more)"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="on the CPU, with its kernels and tiny shapes: finds slips in the scripts",
    )
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is not a folder")
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

    from benchmarks.common import report
    from benchmarks.gpu.plan import Plan
    from benchmarks.gpu.runner import ENDING, Run

    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        print(f"gpu-check: --out: cannot write to {out}: {error.strerror}", file=sys.stderr)
        return 2
    with (
        exit_on(*ENDING),  # so that the folder goes
        tempfile.TemporaryDirectory() as folder,
    ):
        archives = args.archives if {"times", "op"} & set(args.stages) else []
        plan = Plan(out, Path(folder), archives, args.rehearse)
        record = {**report.origin(torch.device(plan.device)), "rehearsal": args.rehearse}
        wanted = {"build", *args.stages}
        steps = [each for each in plan.steps() if each.stage in wanted]
        seconds = args.seconds if args.seconds is not None else SECONDS * plan.slower
        code = Run(steps, out, plan.environment, seconds, record).run()
    print(f"Written to {out}: summary.json says {'ok' if code == 0 else 'what failed'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
