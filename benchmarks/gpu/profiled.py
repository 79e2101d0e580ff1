# SPDX-License-Identifier: Apache-2.0
"""One call of our operator for a profiler, between cudaProfilerStart and cudaProfilerStop.

python -m benchmarks.gpu.profiled encoder-800x1333 bf16 backward
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.gpu.decisive import DTYPES, decisive, draw
from benchmarks.gpu.predictions import DECISIVE
from benchmarks.op.implementations import OURS, cotangent_of, forward_step, step_of
from benchmarks.op.traffic import PASSES
from vitadapter_ops.testing import cases


def run(case: cases.Case, dtypes: str, which: str, device: str) -> None:
    """The call, after two others."""
    inputs = draw(case, dtypes, device)
    call = OURS.bind(inputs)
    grad = cotangent_of(forward_step(call, inputs)())
    step = step_of(OURS, call, inputs, which, grad)
    step()
    step()
    if device == "cpu":
        step()
        return
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        step()
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.profiled", description=__doc__.splitlines()[0]
    )
    parser.add_argument("case", choices=list(DECISIVE))
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("which", metavar="pass", choices=PASSES)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    args = parser.parse_args(argv)
    known = {case.name: case for case in decisive(args.rehearse)}
    if args.case not in known:
        parser.error(f"case: a rehearsal has only {', '.join(known)}, got {args.case!r}")
    run(known[args.case], args.dtype, args.which, "cpu" if args.rehearse else "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
