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
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import options, report
from benchmarks.common.console import (
    LOOK,
    chosen_backend,
    columns,
    progress_on,
    span,
    times,
    wide_console,
)
from benchmarks.common.gate import RedGateError, held, show_red
from benchmarks.common.memory import Peak, peak_in_child
from benchmarks.common.timing import Case, OutOfMemory, ratio, take_turns
from benchmarks.op.numerics import accuracy, accuracy_table
from vitadapter_ops import explain_backend, ms_deform_attn, ms_deform_attn_from_offsets
from vitadapter_ops.testing import cases, gate
from vitadapter_ops.testing.tolerances import ROUNDED_ONCE_FACTOR

PASSES = ("forward", "forward + backward")
METHODS = ("chain", "fused")
# Of the time and of the peak memory of the chain, on a CPU.
LEAST_SPEED_UP = {"forward": 1.6, "forward + backward": 1.25}
MOST_MEMORY = 0.6
WIDTHS = (64, 167, 512)
DTYPES = ("fp32", "fp16", "bf16")
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
    chosen: Sequence[cases.OffsetCase], name: str, args: argparse.Namespace, console: Console
) -> tuple[Table, list[dict[str, Any]]]:
    """Time and memory at the dtype of this name."""
    dtype, device = cases.DTYPES[name][0], args.device
    table = Table(title=f"From offsets and logits to the output, {name}, ms", **LOOK)
    columns(table, "shape", "pass", "chain", "fused", "ratio", "chain MiB", "fused MiB", "share")
    rows = []
    with progress_on(console) as progress:
        task = progress.add_task("shapes", total=len(chosen) * len(PASSES))
        for case in chosen:
            for which in PASSES:
                steps = {m: Case(prepare(case, m, which, dtype, device)) for m in METHODS}
                timed = take_turns(
                    steps, device=torch.device(device), warmup=3, repeats=args.rounds
                )
                del steps
                peaks = {
                    m: peak_in_child(
                        prepare_memory, case, m, which, dtype, device, args.threads, device=device
                    )
                    for m in METHODS
                }
                rows.append({"dtype": name, **row(case, which, timed, peaks)})
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


def prepare_products(
    case: cases.OffsetCase,
    together: bool,
    which: str,
    device: str,
    dtype: torch.dtype = torch.float32,
):
    """As `prepare`, for the projections of queries as wide as all heads."""
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    width, points = case.heads * case.channels, case.heads * sum(case.points)
    layers = [torch.nn.Linear(width, n * points, **made) for n in (2, 1)]
    query = torch.randn(case.batch, case.queries, width, **made)
    if which == "forward":
        return partial(forward, partial(_products, layers, together=together), query)
    leaves = [query.requires_grad_(), *(p for layer in layers for p in layer.parameters())]
    cotangents = [torch.randn(*query.shape[:2], n * points, **made) for n in (2, 1)]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_products(layers, query, together), leaves, cotangents)

    return both


def products_table(
    chosen: Sequence[cases.OffsetCase], device: str, rounds: int
) -> tuple[Table, list[dict[str, Any]]]:
    table = Table(title="Offsets and logits from the query, fp32, ms", **LOOK)
    columns(table, "shape", "pass", "two products", "one", "ratio")
    rows = []
    for case in chosen:
        for which in PASSES:
            steps = {t: Case(prepare_products(case, t, which, device)) for t in (False, True)}
            timed = take_turns(steps, device=torch.device(device), warmup=3, repeats=rounds)
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
        for name in ("fp32", "bf16"):
            dtype = cases.DTYPES[name][0]
            (kept, moved), (kept_fused, moved_fused) = (counted(case, dtype, m) for m in METHODS)
            numbers = (kept, kept_fused, moved, moved_fused)
            table.add_row(case.name, name, *(f"{number / 2**20:.2f}" for number in numbers))
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
    state = "met" if worst <= ROUNDED_ONCE_FACTOR else "missed"
    lines.append(
        f"{state}: error at most {ROUNDED_ONCE_FACTOR}x of rounding once (worst {worst:.3f}x)"
    )
    return lines


def _verdict(what: str, met: bool, worst: dict[str, Any]) -> str:
    numbers = f"{times(worst['speed_up'])}, memory {times(worst['memory_share'])}"
    return f"{'met' if met else 'missed'}: {what} (worst: {worst['case']}, {numbers})"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.op.fused", description=__doc__.splitlines()[0]
    )
    options.add_device(parser)
    options.add_cases(parser, [case.name for case in BENCH])
    options.add_dtypes(
        parser, DTYPES, default=["fp32"], help="dtypes of all tensors (default: fp32)"
    )
    options.add_rounds(parser, 20)
    options.add_output(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    console = wide_console()
    backend = chosen_backend(explain_backend(args.device, op="ms_deform_attn_from_offsets"))
    record: dict[str, Any] = {
        **report.origin(torch.device(args.device), "vitadapter_ops"),
        "backends": {"ran": {"fused": backend}},
        "settings": {"dtype": args.dtype, "rounds": args.rounds},
    }
    console.print(report.caption(record), style="dim", highlight=False)
    small = next(case for case in cases.OFFSETS if case.name == "three-levels")
    try:
        for name in dict.fromkeys(("fp32", "bf16", *args.dtype)):
            with held(f"{small.name}, {name}"):
                gate.check_offsets_backend(small, name, backend.split()[0], args.device)
    except RedGateError as error:
        show_red(console, error)
        return 1

    chosen = options.matching(BENCH, args.cases)
    speed = [speed_table(chosen, name, args, console) for name in dict.fromkeys(args.dtype)]
    record["speed"] = [row for _, rows in speed for row in rows]
    record["accuracy"] = [accuracy(width, args.device) for width in WIDTHS]
    products, record["products"] = products_table(chosen, args.device, args.rounds)
    tables = (*(table for table, _ in speed), products, bytes_table(chosen))
    for shown in (*tables, accuracy_table(record["accuracy"])):
        console.print(shown)
        console.print()
    for line in verdicts(record):
        console.print(line, highlight=False, markup=False)
    path = report.result_file(args.out, "fused", args.device)
    report.write_json(path, record)
    console.print(f"Written: {path}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
