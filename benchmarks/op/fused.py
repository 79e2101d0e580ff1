# SPDX-License-Identifier: Apache-2.0
"""The fused step from the Linear's outputs beside the chain of operations that it replaces.

    python -m benchmarks.op.fused

Both go from offsets and logits to the operator's output. The chain is softmax and locations in
torch, then `ms_deform_attn`. Four tables: time and peak memory for the shapes of ViT-Adapter and
Deformable DETR; the two projections before it as one matrix product, as `MSDeformAttn` has them;
bytes that are kept for the backward and moved by each call, counted; and what bf16 offsets, and
bf16 locations, cost in accuracy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import report as _report
from benchmarks.common.console import (
    LOOK,
    chosen_backend,
    columns,
    progress_on,
    span,
    times,
    wide_console,
)
from benchmarks.common.memory import Peak, peak_in_child
from benchmarks.common.options import add_device_arguments, device_of, positive
from benchmarks.common.timing import Case, OutOfMemory, ratio, take_turns
from vitadapter_ops import explain_backend, ms_deform_attn, ms_deform_attn_from_offsets
from vitadapter_ops.testing import cases, gate

PASSES = ("forward", "forward + backward")
METHODS = ("chain", "fused")
# Of the time and of the peak memory of the chain, on a CPU.
LEAST_SPEED_UP = {"forward": 1.6, "forward + backward": 1.25}
MOST_MEMORY = 0.6
MOST_ERROR = 1.2
WIDTHS = (64, 167, 512)
BENCH = tuple(cases.fused(case) for case in cases.BENCH if case.grids)


def chain(
    inputs: cases.OffsetInputs, sides: Tensor, value: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """What models do without the fused operator: every intermediate result is a tensor.

    `sides` are the levels' widths and heights [L, 1, 2], on the device already as in models.
    """
    levels, points = len(inputs.spatial_shapes), inputs.points_per_level[0]
    shape = (*logits.shape[:3], levels, points)
    locations = inputs.reference_points[:, :, None, :, None] + offsets.view(*shape, 2) / sides
    weights = logits.to(sides.dtype).softmax(-1).view(shape)
    return ms_deform_attn(value, inputs.spatial_shapes, locations, weights)


def fused(inputs: cases.OffsetInputs, value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return ms_deform_attn_from_offsets(
        value, inputs.spatial_shapes, inputs.reference_points, offsets, logits
    )


def function_of(inputs: cases.OffsetInputs, method: str) -> Callable[..., Tensor]:
    """A method from value, offsets and logits to the output; what models have once is made here."""
    if method == "fused":
        return partial(fused, inputs)
    sides = [(width, height) for height, width in inputs.spatial_shapes]
    reference = inputs.reference_points
    levels = torch.tensor(sides, dtype=reference.dtype, device=reference.device)
    return partial(chain, inputs, levels[:, None])


def prepare(case: cases.OffsetCase, method: str, which: str, dtype: torch.dtype, device: str):
    """Inputs and gradients are built here; returns the step to measure."""
    inputs = case.inputs().to(dtype, device)
    value, _, offsets, logits = inputs.tensors
    function = function_of(inputs, method)
    if which == "forward":
        return partial(forward, function, value, offsets, logits)
    leaves = [t.requires_grad_() for t in (value, offsets, logits)]
    size = (case.batch, case.queries, case.heads * case.channels)
    cotangent = torch.randn(size, device=device).to(dtype)
    return partial(both, function, leaves, cotangent)


def forward(function, *tensors: Tensor) -> Tensor:
    with torch.no_grad():
        return function(*tensors)


def both(function, leaves: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*leaves), leaves, cotangent)


def prepare_memory(case, method, which, dtype, device, threads):
    torch.set_num_threads(threads)
    step = prepare(case, method, which, dtype, device)
    # Code that is loaded once is not the step's memory; a tiny shape loads it all.
    small = cases.OffsetCase("small", ((4, 4),) * len(case.shapes), case.points, 1, 4, grids=())
    prepare(small, method, which, dtype, device)()
    return step


def counted(case: cases.OffsetCase, dtype: torch.dtype, method: str) -> tuple[int, int]:
    """Bytes kept for the backward beside value, and moved by one call beside the gathers.

    The chain reads offsets and logits and writes locations and weights (fp32 beside 16-bit values,
    where they belong), which the operator reads; the fused step reads offsets and logits once.
    """
    rows = case.batch * case.queries * case.heads
    numbers = 3 * rows * sum(case.points)
    stored, wide = numbers * dtype.itemsize, numbers * 4
    queries = (1 if case.shared_batch else case.batch) * case.queries
    reference = queries * (1 if case.shared_levels else len(case.shapes)) * 2 * 4
    if method == "fused":
        return stored + reference, stored + reference
    # Softmax keeps its result, which is the operator's, too; the operator keeps the locations and
    # the division the sizes of the levels. Division and addition are an operation each: the
    # quotient is written and read once more.
    sides = len(case.shapes) * 2 * 4
    quotient = 2 * wide // 3 * 2
    return wide + sides, stored + reference + quotient + 2 * wide


def speed_table(
    chosen: Sequence[cases.OffsetCase], args: argparse.Namespace, device: str, console: Console
) -> tuple[Table, list[dict[str, Any]]]:
    dtype = getattr(torch, args.dtype)
    table = Table(title=f"From offsets and logits to the output, {args.dtype}, ms", **LOOK)
    columns(table, "shape", "pass", "chain", "fused", "ratio", "chain MiB", "fused MiB", "share")
    rows = []
    with progress_on(console) as progress:
        task = progress.add_task("shapes", total=len(chosen) * len(PASSES))
        for case in chosen:
            for which in PASSES:
                steps = {m: Case(prepare(case, m, which, dtype, device)) for m in METHODS}
                timed = take_turns(
                    steps, device=torch.device(device), warmup=3, repeats=args.repeats
                )
                del steps
                peaks = {
                    m: peak_in_child(
                        prepare_memory, case, m, which, dtype, device, args.threads, device=device
                    )
                    for m in METHODS
                }
                rows.append(row(case, which, timed, peaks))
                add_row(table, rows[-1])
                progress.advance(task)
    return table, rows


def row(case, which, timed, peaks: dict[str, Peak]) -> dict[str, Any]:
    results: dict[str, Any] = {"case": case.name, "pass": which}
    for method in METHODS:
        timing = timed[method]
        results[method] = None if isinstance(timing, OutOfMemory) else timing.as_json()
        results[f"{method}_peak"] = peaks[method].as_json()
    medians = [results[m] and results[m]["median_s"] for m in METHODS]
    results["speed_up"] = ratio(medians[0], medians[1])
    growth = [peaks[m].growth_bytes for m in METHODS]
    results["memory_share"] = ratio(growth[1], growth[0])
    return results


def add_row(table: Table, results: dict[str, Any]) -> None:
    cells = [results["case"], results["pass"]]
    cells += [span(results[m], "ms") if results[m] else "out of memory" for m in METHODS]
    cells.append(times(results["speed_up"]))
    for method in METHODS:
        growth = results[f"{method}_peak"]["growth_bytes"]
        cells.append("-" if growth is None else f"{growth / 2**20:.1f}")
    cells.append(times(results["memory_share"]))
    table.add_row(*cells)


def _products(layers: Sequence[torch.nn.Linear], query: Tensor, together: bool) -> Sequence[Tensor]:
    """MSDeformAttn's two projections of the query, as one product or as two."""
    if not together:
        return [layer(query) for layer in layers]
    weight, bias = (torch.cat([getattr(la, n) for la in layers]) for n in ("weight", "bias"))
    widths = [layer.out_features for layer in layers]
    return torch.nn.functional.linear(query, weight, bias).split(widths, -1)


def prepare_products(case: cases.OffsetCase, together: bool, which: str, device: str):
    """As `prepare`, for the projections of queries as wide as all heads."""
    width, points = case.heads * case.channels, case.heads * sum(case.points)
    layers = [torch.nn.Linear(width, n * points, device=device) for n in (2, 1)]
    query = torch.randn(case.batch, case.queries, width, device=device)
    if which == "forward":
        return partial(forward, partial(_products, layers, together=together), query)
    leaves = [query.requires_grad_(), *(p for layer in layers for p in layer.parameters())]
    cotangents = [torch.randn(*query.shape[:2], n * points, device=device) for n in (2, 1)]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_products(layers, query, together), leaves, cotangents)

    return both


def products_table(
    chosen: Sequence[cases.OffsetCase], args: argparse.Namespace, device: str
) -> tuple[Table, list[dict[str, Any]]]:
    table = Table(title="Offsets and logits from the query, float32, ms", **LOOK)
    columns(table, "shape", "pass", "two products", "one", "ratio")
    rows = []
    for case in chosen:
        for which in PASSES:
            steps = {t: Case(prepare_products(case, t, which, device)) for t in (False, True)}
            timed = take_turns(steps, device=torch.device(device), warmup=3, repeats=args.repeats)
            two, one = timed[False], timed[True]
            if isinstance(two, OutOfMemory) or isinstance(one, OutOfMemory):
                continue
            speed_up = ratio(two.median, one.median)
            rows.append(
                {
                    "case": case.name,
                    "pass": which,
                    "two": two.as_json(),
                    "one": one.as_json(),
                    "speed_up": speed_up,
                }
            )
            cells = (span(rows[-1][name], "ms") for name in ("two", "one"))
            table.add_row(case.name, which, *cells, times(speed_up))
    return table, rows


def bytes_table(chosen: Sequence[cases.OffsetCase]) -> Table:
    table = Table(title="Counted: MiB kept for the backward, and moved by a forward", **LOOK)
    columns(table, "shape", "dtype", "kept: chain", "fused", "moved: chain", "fused")
    for case in chosen:
        for dtype in (torch.float32, torch.bfloat16):
            (kept, moved), (kept_fused, moved_fused) = (counted(case, dtype, m) for m in METHODS)
            numbers = (kept, kept_fused, moved, moved_fused)
            name = str(dtype).removeprefix("torch.")
            table.add_row(case.name, name, *(f"{number / 2**20:.2f}" for number in numbers))
    return table


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


def verdicts(record: dict[str, Any]) -> list[str]:
    """A line for each target: met, or the worst case."""
    lines = []
    for which, least in LEAST_SPEED_UP.items():
        rows = [r for r in record["speed"] if r["pass"] == which]
        worst = min(rows, key=lambda r: r["speed_up"] or 0)
        lines.append(_verdict(f"{which} at least {least}x", worst["speed_up"] >= least, worst))
        worst = max(rows, key=lambda r: r["memory_share"] or 0)
        met = worst["memory_share"] <= MOST_MEMORY
        lines.append(_verdict(f"{which} at most {MOST_MEMORY}x the memory", met, worst))
    worst = max(r["fused"] / r["once"] for r in record["accuracy"])
    state = "met" if worst <= MOST_ERROR else "missed"
    lines.append(f"{state}: error at most {MOST_ERROR}x of rounding once (worst {worst:.3f}x)")
    return lines


def _verdict(what: str, met: bool, worst: dict[str, Any]) -> str:
    numbers = f"{times(worst['speed_up'])}, memory {times(worst['memory_share'])}"
    return f"{'met' if met else 'missed'}: {what} (worst: {worst['case']}, {numbers})"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_device_arguments(parser)
    parser.add_argument("--cases", default="", help="only shapes whose name contains this")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=positive, default=20)
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    args = parser.parse_args(argv)
    if not any(args.cases in case.name for case in BENCH):
        names = ", ".join(case.name for case in BENCH)
        parser.error(f"--cases: expected a part of one of {names}, got {args.cases!r}")
    args.threads = args.threads or torch.get_num_threads()
    return args, device_of(parser, args.device)


def main(argv: Sequence[str] | None = None) -> int:
    args, device = parse(argv)
    torch.set_num_threads(args.threads)
    console = wide_console()
    explanation = explain_backend(device, op="ms_deform_attn_from_offsets")
    record: dict[str, Any] = {
        **_report.origin(torch.device(device), "vitadapter_ops"),
        "backends": {"ran": {"fused": chosen_backend(explanation)}},
        "settings": {"dtype": args.dtype, "repeats": args.repeats},
    }
    console.print(_report.caption(record), style="dim", highlight=False)
    name = next(case for case in cases.OFFSETS if case.name == "three-levels")
    backend = record["backends"]["ran"]["fused"].split()[0]
    for dtypes in ("fp32", "bf16"):
        gate.check_offsets_backend(name, dtypes, backend, device)

    chosen = [case for case in BENCH if args.cases in case.name]
    table, record["speed"] = speed_table(chosen, args, device, console)
    record["accuracy"] = [accuracy(width, device) for width in WIDTHS]
    products, record["products"] = products_table(chosen, args, device)
    for shown in (table, products, bytes_table(chosen), accuracy_table(record["accuracy"])):
        console.print(shown)
        console.print()
    for line in verdicts(record):
        console.print(line, highlight=False, markup=False)
    if args.json is not None:
        _report.write_json(args.json, record)
        console.print(f"Written to: {args.json}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
