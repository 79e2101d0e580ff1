# SPDX-License-Identifier: Apache-2.0
"""Two steps of the check: `build DEVICE`, and `small`, all kernels on small tensors."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence

import torch

from vitadapter_ops import _extension, explain_backend
from vitadapter_ops.testing import cases, gate

# Odd and padded widths, several levels, points outside: what reads and writes at the edges.
LOCATED = ("three-levels", "odd-channels", "channels-12", "channels-64", "far-outside")
FUSED = ("three-levels", "unequal-scaled-boxes", "many-points")
DTYPES = ("fp64", "fp32", "fp16", "bf16", "bf16_points_fp32")


def build(device: str) -> int:
    """Compiles and loads the kernels for a device; what is cached loads at once."""
    library = _extension.load(device)
    if library.origin is None or library.path is None:
        print(f"the {device} kernels are not built: {library.error}")
        return 1
    if library.error is not None:  # of a prebuilt one that cannot serve
        print(library.error)
    print(explain_backend(device))
    digest = hashlib.sha256(library.path.read_bytes()).hexdigest()[:12]
    print(f"{library.origin} library {library.path.name}, SHA-256 {digest}")
    return 0


def small(device: str) -> int:
    """Forward and backward, fused and not, also deterministic, in every dtype, by the tests' gate.

    The references run on the CPU, so that a GPU runs little but the kernels.
    """
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for dtype in DTYPES:
            for case in cases.SMALL:
                if case.name in LOCATED:
                    gate.check_backend(case, dtype, device, device)
            for fused in cases.OFFSETS:
                if fused.name in FUSED:
                    gate.check_offsets_backend(fused, dtype, device, device)
        print(f"{', '.join(DTYPES)}: correct{', deterministic' * deterministic}", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.steps", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("build").add_argument("device", choices=("cpu", "cuda"))
    steps.add_parser("small").add_argument("--rehearse", action="store_true", help="on the CPU")
    args = parser.parse_args(argv)
    if args.step == "build":
        return build(args.device)
    return small("cpu" if args.rehearse else "cuda")


if __name__ == "__main__":
    sys.exit(main())
