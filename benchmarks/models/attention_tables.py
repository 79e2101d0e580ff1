# SPDX-License-Identifier: Apache-2.0
"""What attention.py prints: counted, measured, and what a reader must know of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.common.console import LOOK, columns, span, times
from benchmarks.common.report import GIB
from benchmarks.common.timing import ratio
from benchmarks.models.attention_models import BASE, KINDS, LABELS, Row
from benchmarks.models.common import count_of
from benchmarks.paper.tables import TABLE_7, TABLE_7_SETTING, TABLE_7_SOURCE


def _giga(value: float) -> str:
    return f"{value / 1e9:.0f}" if value >= 99.5e9 else f"{value / 1e9:.1f}"


def _style(key: str) -> str:
    return "bold green" if key == BASE else ""


def counted_table(counted: dict[str, Any]) -> Table:
    """Parameters and FLOPs, ours and published, from a record's "counted" entry."""
    table = Table(title="Counted: parameters, and FLOPs (multiply-adds) of one image", **LOOK)
    columns(
        table,
        "attention",
        "params\n[M]",
        "published\n[M]",
        "FLOPs (1)\n[G]",
        "published\n[G]",
        "ratio\nours",
        "ratio\npubl.",
        "all (2)\n[G]",
        "ratio\nours",
    )
    for setting in (counted["paper_setting"], counted["measured_setting"]):
        height, width = setting["size"]
        whose = "+ Mask R-CNN" if setting["mask_rcnn"] else "backbone"
        table.add_row(f"[italic]{height}x{width} {whose}[/]")
        base = setting["rows"].get(BASE, {})
        for key, cost in setting["rows"].items():
            published = TABLE_7.get(key) if setting["mask_rcnn"] else None
            flops_ratio = None
            if published is not None:
                flops_ratio = ratio(published.flops_g, TABLE_7[BASE].flops_g)
            table.add_row(
                LABELS[key],
                f"{cost['params'] / 1e6:.1f}",
                "-" if published is None else f"{published.params_m:.1f}",
                _giga(cost["paper"]),
                "-" if published is None else f"{published.flops_g:.0f}",
                times(ratio(cost["paper"], base.get("paper"))),
                times(flops_ratio),
                _giga(cost["full"]),
                times(ratio(cost["full"], base.get("full"))),
                style=_style(key),
            )
        table.add_section()
    return table


def measured_table(settings: dict[str, Any], entries: Sequence[dict[str, Any]]) -> Table:
    """Time and memory with their ratios, from a record's "settings" and "measured" entries."""
    medians = [entry[kind]["median_s"] for entry in entries for kind in KINDS if entry[kind]]
    unit = "s" if max(medians, default=0.0) >= 1 else "ms"
    height, width = settings["size"]
    images = count_of(settings["batch"])
    threads = settings["threads"]
    where = f"{threads} CPU thread{'s' * (threads > 1)}"
    if settings["device"] != "cpu":
        where = "the GPU"
    table = Table(
        title=f"Measured: backbone alone, {images} of {height}x{width}, on {where}; "
        f"median (p20-p80) of {settings['rounds']}",
        **LOOK,
    )
    columns(
        table,
        "attention",
        f"forward\n[{unit}]",
        "ratio\nours",
        f"forward +\nbackward [{unit}]",
        "ratio\nours",
        "published\n(3) [s]",
        "peak\n(4) GiB",
        "ratio\nours",
        "published\n(3) [G]",
    )
    for dtype in settings["dtypes"]:
        table.add_row(f"[italic]{dtype}[/]")
        for entry in entries:
            if entry["dtype"] != dtype:
                continue
            growth = entry["memory"]["growth_bytes"]
            failed = entry["status"] != "ok"
            table.add_row(
                LABELS[entry["row"]],
                entry["status"] if failed else span(entry["forward"], unit),
                times(entry["ratio"]["forward"]),
                "-" if failed else span(entry["forward_backward"], unit),
                times(entry["ratio"]["forward_backward"]),
                _published(entry["row"], "s_per_iter"),
                "-" if growth is None else f"{growth / GIB:.2f}",
                times(entry["ratio"]["memory"]),
                _published(entry["row"], "memory_g"),
                style=_style(entry["row"]),
            )
        table.add_section()
    return table


def _published(key: str, what: str) -> str:
    """A published figure and its ratio to deformable attention's."""
    if key not in TABLE_7:
        return "-"
    value = getattr(TABLE_7[key], what)
    return f"{value} {times(ratio(value, getattr(TABLE_7[BASE], what)))}"


def notes(rows: Sequence[Row], *, measured: bool = True) -> list[str]:
    """What a reader must know to read the tables; numbers in brackets stand in their headers."""
    names = {row.name for row in rows}
    lines = [
        f"Published: {TABLE_7_SOURCE}. {TABLE_7_SETTING}.",
        "(1) The paper's convention: convolutions, linear layers and q.k.v products; the sampling "
        "of deformable attention counts nothing.",
        "(2) Everything: also sampling, softmax, normalisation, activations, interpolation.",
    ]
    if measured:
        lines += [
            "(3) Published time and memory are of a whole detector in training on other hardware; "
            "only their ratios can be compared, and loosely: its other parts dilute them.",
            "(4) Peak of one forward+backward on top of weights and inputs.",
        ]
    if "pale" in names:
        lines.append(
            "Pale counts 456 G here: the published 458 G holds 2 G that cannot be attributed to "
            "anything the papers describe."
        )
    if "dense" in names and measured:
        lines.append(
            "Dense: torch's fused attention, which never stores the attention matrix (--naive adds "
            "the attention of 2022, which does). Published with activation checkpointing, which "
            "takes less memory and more time."
        )
    return lines


def slow_backends(backends: dict[str, Any]) -> list[str]:
    """A warning where no kernel could run: such a run says little about the attention."""
    lines = []
    for dtype, ran in backends["ran"].items():
        if ran.startswith("reference"):
            reasons = [
                " ".join(line.split())[:200]
                for line in backends["explained"][dtype].splitlines()
                if "cannot run" in line
            ]
            lines.append(
                f"Mind: in {dtype} deformable attention ran as its plain definition, without "
                f"a kernel, slower than it need be. Reasons: {'; '.join(reasons)}."
            )
    return lines
