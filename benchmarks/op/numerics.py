# SPDX-License-Identifier: Apache-2.0
"""How far a sampling point moves when its location is rounded to 16 bits, and what that costs.

    python -m benchmarks.op.numerics

For maps of several widths: the distance in pixels from where fp64 puts the point, mean and largest.
"rounded location" is computed in fp32 and stored in the dtype; "location in 16 bits" is computed in
the dtype as well, as the published modules do in a 16-bit model; "ours" rounds the offset alone, as
the Linear layer that makes it does, and adds it in fp32. `accuracy` has the error of the operator's
output, of which benchmarks.op.fused prints a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import options
from benchmarks.common.console import LOOK, columns
from vitadapter_ops import ms_deform_attn, ms_deform_attn_from_offsets
from vitadapter_ops.testing import cases

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


def accuracy(width: int, device: str) -> dict[str, Any]:
    """Errors of positions, in pixels, and of the output, relative to fp64, on a map `width` wide.

    once: offsets and logits are rounded to bf16, as a Linear leaves them, and all else is exact.
    fused: the operator, given these. native: references, offsets and their sum in bf16, and the
    position computed from it in bf16, as kernels for bf16 locations do.
    """
    shape = [(8, width)]
    case = cases.OffsetCase("", tuple(shape), (8,), 1, 4096, 4, 8, spread=2.0)
    g = torch.Generator().manual_seed(0)
    inputs = case.inputs(stored=torch.float64).to(torch.float64)
    value = torch.randn(inputs.value.shape, generator=g, dtype=torch.float64)
    _, reference, offsets, logits = inputs.tensors
    reference = reference.clamp(0.02, 0.98)
    rounded, coarse = offsets.bfloat16(), logits.bfloat16()

    def exactly(offsets: Tensor, logits: Tensor) -> Tensor:
        return ms_deform_attn_from_offsets(
            value, shape, reference, offsets, logits, backend="reference"
        )

    exact, once = exactly(offsets, logits), exactly(rounded.double(), coarse.double())
    ours = ms_deform_attn_from_offsets(
        value.float().to(device),
        shape,
        reference.float().to(device),
        rounded.to(device),
        coarse.to(device),
    )
    sides = torch.tensor([width, 8], dtype=torch.bfloat16)
    locations = reference.bfloat16()[:, :, None] + rounded / sides
    native = (locations * sides - 0.5).double()
    positions = reference[:, :, None] * sides.double() + offsets - 0.5
    one = positions - offsets + rounded.double()
    out = ms_deform_attn(
        value,
        shape,
        ((native + 0.5) / sides.double())[:, :, :, None],
        coarse.double().softmax(-1)[:, :, :, None],
        backend="reference",
    )

    def error(got: Tensor) -> float:
        return ((got.double().cpu() - exact).norm() / exact.norm()).item()

    def pixels(got: Tensor) -> tuple[float, float]:
        away = (got - positions)[..., 0].abs()
        return away.mean().item(), away.max().item()

    return {
        "width": width,
        "once": error(once),
        "fused": error(ours),
        "native": error(out),
        "once_pixels": pixels(one),
        "native_pixels": pixels(native),
    }


def accuracy_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="bf16 offsets and logits, fp32 reference: error against fp64", **LOOK)
    columns(
        table,
        "width",
        "px rounded once",
        "px bf16 locations",
        "output rounded once",
        "fused",
        "bf16 locations",
        "fused / once",
    )
    for row in rows:
        table.add_row(
            str(row["width"]),
            "{:.4f} (max {:.3f})".format(*row["once_pixels"]),
            "{:.4f} (max {:.3f})".format(*row["native_pixels"]),
            f"{row['once']:.4f}",
            f"{row['fused']:.4f}",
            f"{row['native']:.4f}",
            f"{row['fused'] / row['once']:.3f}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.op.numerics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    narrow = ["bf16", "fp16"]
    options.add_dtypes(parser, narrow, default=narrow, help="dtypes to round to (default: both)")
    args = parser.parse_args(argv)
    names = list(distances(WIDTHS[0], torch.bfloat16))
    print("| width | dtype | " + " | ".join(f"{name}: mean / max px" for name in names) + " |")
    print("|---|---|" + "---|" * len(names))
    for name in args.dtype:
        for width in WIDTHS:
            found = distances(width, cases.DTYPES[name][0])
            cells = [f"{each.mean():.4f} / {each.max():.3f}" for each in found.values()]
            print(f"| {width} | {name} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
