# SPDX-License-Identifier: Apache-2.0
"""Deformable attention beside dense, CSwin and Pale attention inside ViT-Adapter-S.

    python benchmarks/attn.py               # two minutes on two cores
    python benchmarks/attn.py --paper       # at the paper's image size, 800x1280
    python benchmarks/attn.py --counted     # parameters and FLOPs only, a few seconds
    python benchmarks/attn.py --device cuda # bf16 and fp32, 800x1280, two images

The ablation is Table 7 of the ViT-Adapter paper (Chen et al., ICLR 2023): one model, four kinds
of attention in its injectors and extractors. Its published figures stand beside ours. Parameters
and FLOPs are counted for the paper's setting, Mask R-CNN included, and must agree; time and
memory are measured here for the backbone alone, so only their ratios to deformable attention
can be set beside published ones.

The run is refused when the operator disagrees with its fp64 definition or a model's maps are not
finite: a speed is never reported on wrong results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import options, report
from benchmarks.common.console import progress_on, wide_console
from benchmarks.common.gate import RedGateError, show_red
from benchmarks.common.memory import ChildError
from benchmarks.models import attention_measure as measure
from benchmarks.models import attention_tables as tables
from benchmarks.models.attention_chart import draw
from benchmarks.models.attention_models import (
    CPU_SIZE,
    LABELS,
    NAIVE,
    PAPER_SIZE,
    ROWS,
    Settings,
)
from benchmarks.models.common import DTYPES, record_of, say, say_written
from benchmarks.paper.tables import TABLE_7, TABLE_7_SETTING, TABLE_7_SOURCE


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="attn.py",
        description="Compare deformable attention with dense, CSwin and Pale attention inside "
        "ViT-Adapter-S: parameters, FLOPs, time and memory, beside the published figures.",
        epilog="Writes a table to the terminal, and the results (JSON) and a chart (PNG) to --out.",
    )
    options.add_device(parser)
    parser.add_argument(
        "--paper",
        action="store_true",
        help="measure at the paper's image size, 800x1280, also on a CPU (takes long there)",
    )
    parser.add_argument(
        "--counted",
        action="store_true",
        help="count parameters and FLOPs only: prints the first table, measures and writes nothing",
    )
    parser.add_argument(
        "--naive",
        action="store_true",
        help="add a row for dense attention as it was written in 2022, with the attention matrix "
        "in memory (much memory at large images)",
    )
    options.add_cases(parser, [row.name for row in ROWS], "all; ratios need deformable")
    parser.add_argument(
        "--size",
        nargs=2,
        type=options.positive,
        metavar=("H", "W"),
        help="height and width of the image in pixels, each at least 64 "
        f"(default: {CPU_SIZE[0]} {CPU_SIZE[1]} on a CPU, 800 1280 on a GPU)",
    )
    parser.add_argument(
        "--batch", type=options.positive, help="images at a time (default: 1 on a CPU, 2 on a GPU)"
    )
    options.add_rounds(parser, None, "5 on a CPU, 30 on a GPU")
    options.add_warmup(parser, None, "1 on a CPU, 5 on a GPU")
    options.add_dtypes(
        parser,
        DTYPES,
        help="number formats to measure; bf16 means autocast (default: fp32 on a CPU, both on a "
        "GPU)",
    )
    parser.add_argument(
        "--memory-limit",
        type=options.positive_float,
        metavar="GIB",
        help="most memory a step may take on a CPU; a case that needs more is reported as out of "
        "memory (default: most of what is free)",
    )
    options.add_output(parser, "the results and the chart")
    args = parser.parse_args(argv)
    if args.paper and args.size:
        parser.error("--paper and --size: give one of them; --paper means 800 1280")
    if args.size and min(args.size) < 64:
        parser.error(
            f"--size: expected at least 64 64, got {args.size[0]} {args.size[1]}: the coarsest "
            "map has 1/32 of it, and batch norm needs more than one pixel"
        )
    if torch.device(args.device).type == "cuda" and args.memory_limit is not None:
        parser.error("--memory-limit: works on a CPU only")
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    """The command line with every default filled in."""
    on_gpu = torch.device(args.device).type == "cuda"
    size = tuple(args.size) if args.size else PAPER_SIZE if on_gpu or args.paper else CPU_SIZE
    return Settings(
        device=args.device,
        size=(size[0], size[1]),
        batch=args.batch or (2 if on_gpu else 1),
        warmup=args.warmup if args.warmup is not None else (5 if on_gpu else 1),
        rounds=args.rounds or (30 if on_gpu else 5),
        threads=args.threads,
        dtypes=tuple(args.dtype or (("bf16", "fp32") if on_gpu else ("fp32",))),
        rows=options.matching(ROWS, args.cases) + ((NAIVE,) if args.naive else ()),
        memory_limit=None if args.memory_limit is None else int(args.memory_limit * report.GIB),
    )


def record_before(settings: Settings, counted: dict[str, Any]) -> dict[str, Any]:
    """Everything of a result that is known before anything is measured."""
    device = torch.device(settings.device)
    return {
        "schema": 2,
        "benchmark": "attn",
        **record_of(device, settings.dtypes, "numpy", "matplotlib", "rich", "vitadapter"),
        "settings": settings.as_json(),
        "math": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        },
        "published": {
            "source": TABLE_7_SOURCE,
            "setting": TABLE_7_SETTING,
            "rows": {name: asdict(figures) for name, figures in TABLE_7.items()},
        },
        "counted": counted,
    }


def write(folder: Path, benchmark: str, record: dict[str, Any]) -> list[Path]:
    """The record, and a chart for each dtype."""
    device = record["settings"]["device"]
    path = report.result_file(folder, benchmark, device)
    report.write_json(path, record)
    written = [path]
    for number, dtype in enumerate(record["settings"]["dtypes"]):
        path = report.result_file(folder, benchmark, device, "png")
        if number:
            path = path.with_stem(f"{path.stem}-{dtype}")
        draw(record, dtype, path)
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    settings = settings_of(args)
    torch.set_num_threads(settings.threads)
    console = wide_console()

    counted = measure.count(settings.rows, settings.size)
    if args.counted:
        console.print(tables.counted_table(counted))
        console.print()
        say(console, *tables.notes(settings.rows, measured=False))
        return 0

    try:
        with progress_on(console) as progress:
            entries = measure.measure_all(settings, progress)
    except RedGateError as error:
        show_red(console, error)
        return 1
    except ChildError as error:
        console.print(str(error), markup=False, highlight=False)
        console.print("Stopped: a memory measurement failed (above).", style="bold red")
        return 1

    record = record_before(settings, counted)
    record["measured"] = entries
    record["notes"] = [*tables.notes(settings.rows), *tables.slow_backends(record["backends"])]

    console.print(tables.counted_table(counted))
    console.print()
    console.print(tables.measured_table(record["settings"], entries))
    console.print()
    say(console, *record["notes"], report.caption(record))
    on_paper = args.paper and torch.device(settings.device).type == "cpu"
    say_written(console, *write(args.out, "attn-paper" if on_paper else "attn", record))

    crashed = [entry for entry in entries if entry["status"] == "killed"]
    for entry in crashed:
        console.print(f"{LABELS[entry['row']]}: {entry['detail']}", style="bold red")
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main())
