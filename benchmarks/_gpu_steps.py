# SPDX-License-Identifier: Apache-2.0
"""Two steps of gpu_check.py: `build DEVICE`, and `small`, all kernels on small tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vitadapter_ops import _extension, explain_backend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

# Odd and padded widths, several levels, points outside: what reads and writes at the edges.
LOCATED = ("three-levels", "odd-channels", "channels-12", "channels-64", "far-outside")
FUSED = ("three-levels", "unequal-scaled-boxes", "many-points")
DTYPES = ("fp64", "fp32", "fp16", "bf16", "bf16_points_fp32")


def build(device: str) -> int:
    """Compiles and loads the kernels for a device; what is cached loads at once."""
    library = _extension.load(device)
    if library.origin is None:
        print(f"the {device} kernels are not built: {library.error}")
        return 1
    print(f"{library.origin} library {library.path}")
    print(explain_backend(device))
    return 0


def small() -> int:
    """Forward and backward, fused and not, also deterministic, in every dtype, by the tests' gate.

    The references run on the CPU, so that the GPU runs little but the kernels.
    """
    import cases
    import gate

    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for dtype in DTYPES:
            for case in cases.SMALL:
                if case.name in LOCATED:
                    gate.check_backend(case, dtype, "cuda", "cuda")
            for fused in cases.OFFSETS:
                if fused.name in FUSED:
                    gate.check_offsets_backend(fused, dtype, "cuda", "cuda")
        print(f"{', '.join(DTYPES)}: correct{', deterministic' * deterministic}", flush=True)
    return 0


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    sys.exit({"build": build, "small": small}[what](*arguments))
