# SPDX-License-Identifier: Apache-2.0
"""How far a sampling point moves when its location is rounded to 16 bits.

    python -m benchmarks.op.numerics

For maps of several widths: the distance in pixels from where fp64 puts the point, mean and largest.
"rounded location" is computed in fp32 and stored in the dtype; "location in 16 bits" is computed in
the dtype as well, as the published modules do in a 16-bit model; "ours" rounds the offset alone, as
the Linear layer that makes it does, and adds it in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

WIDTHS = (64, 100, 167, 256, 512)
POINTS = 100_000
SPREAD = 2.0  # of offsets, in pixels


def distances(width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pixels between each point and its exact place, by how its location is made."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(POINTS, generator=generator)
    offset = torch.randn(POINTS, generator=generator) * SPREAD
    exact = reference.double() * width + offset.double()
    location = reference + offset / width
    small = reference.to(dtype) + offset.to(dtype) / width
    ours = reference + offset.to(dtype).float() / width
    made = {"rounded location": location.to(dtype), "location in 16 bits": small, "ours": ours}
    return {name: (each.double() * width - exact).abs() for name, each in made.items()}


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    names = list(distances(WIDTHS[0], torch.bfloat16))
    print("| width | dtype | " + " | ".join(f"{name}: mean / max px" for name in names) + " |")
    print("|---|---|" + "---|" * len(names))
    for dtype in (torch.bfloat16, torch.float16):
        for width in WIDTHS:
            found = distances(width, dtype)
            cells = [f"{each.mean():.4f} / {each.max():.3f}" for each in found.values()]
            short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
            print(f"| {width} | {short} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
