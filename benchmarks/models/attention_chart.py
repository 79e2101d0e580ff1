# SPDX-License-Identifier: Apache-2.0
"""The chart of attn.py, drawn from its record alone: cost counted, time, memory."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common.report import GIB, caption
from benchmarks.models.attention_models import BASE, LABELS
from benchmarks.models.common import count_of

WIDTH_PX, HEIGHT_PX, DPI = 1800, 720, 150

_OURS, _OURS_LIGHT = "#12805c", "#8fcdb5"  # deformable attention
_OTHER, _OTHER_LIGHT = "#6b7a8f", "#c3ccd8"
_INK, _MUTED, _PUBLISHED = "#1f2933", "#667382", "#c2410c"


def _colours(key: str) -> tuple[str, str]:
    return (_OURS, _OURS_LIGHT) if key == BASE else (_OTHER, _OTHER_LIGHT)


def _prepare(
    axes: Axes, keys: list[str], longest: float, title: str, legend: str, room: float = 2.4
) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK, pad=8, linespacing=1.35)
    # At the right of the longest bar, room for its value label.
    axes.set_xlim(0, (longest or 1.0) * room)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color("#c9d1da")
    axes.set_xlabel(legend, loc="left", fontsize=8.5, color=_MUTED, labelpad=7)


def _name_rows(axes: Axes, keys: list[str]) -> None:
    """Row names at the left of the first panel; the others share its rows."""
    axes.set_yticks(range(len(keys)), [LABELS[key] for key in keys], fontsize=10.5)
    axes.tick_params(axis="y", length=0, pad=8)
    for label, key in zip(axes.get_yticklabels(), keys, strict=True):
        label.set_color(_OURS if key == BASE else _INK)
        label.set_fontweight("bold" if key == BASE else "normal")


def _write(axes: Axes, x: float, y: float, text: str, published: str = "", *, bold: bool) -> None:
    """A value at the end of its bar, and the published one behind it in its own colour."""
    value = axes.annotate(
        text,
        (x, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=_INK,
        fontweight="bold" if bold else "normal",
    )
    if published:
        axes.annotate(
            published,
            (1.0, 0.5),
            xycoords=value,
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_PUBLISHED,
        )


def _seconds(value: float) -> str:
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value * 1e3:.2f} ms"


def _with_ratio(text: str, ours: float | None) -> str:
    return text if ours is None else f"{text}  {ours:.2f}×"


def _flops(axes: Axes, keys: list[str], record: dict[str, Any]) -> None:
    counted, published = record["counted"]["paper_setting"], record["published"]["rows"]
    height, width = counted["size"]
    rows = {key: counted["rows"][key] for key in keys}
    _prepare(
        axes,
        keys,
        max(row["full"] for row in rows.values()) / 1e9,
        f"FLOPs with Mask R-CNN [G multiply-adds]\n1 image of {height}×{width}, counted",
        "dark: as the paper counts (the value)   light: all the rest",
        room=1.85,
    )
    for y, key in enumerate(keys):
        dark, light = _colours(key)
        paper, full = rows[key]["paper"] / 1e9, rows[key]["full"] / 1e9
        axes.barh(y, full, height=0.56, color=light)
        axes.barh(y, paper, height=0.56, color=dark)
        theirs = ""
        if key in published:
            at = published[key]["flops_g"]
            axes.plot([at, at], [y - 0.36, y + 0.36], color=_PUBLISHED, linewidth=1.8)
            theirs = f"publ. {at:.0f}"
        base = rows.get(BASE)
        times = None if key == BASE or base is None else rows[key]["paper"] / base["paper"]
        _write(axes, full, y, _with_ratio(f"{paper:.0f}", times), theirs, bold=key == BASE)


def _published_ratio(record: dict[str, Any], key: str, what: str) -> str:
    rows = record["published"]["rows"]
    if key not in rows or key == BASE:
        return ""
    return f"publ. {rows[key][what] / rows[BASE][what]:.2f}×"


def _time(axes: Axes, entries: list[dict[str, Any]], record: dict[str, Any]) -> None:
    keys = [entry["row"] for entry in entries]
    medians = [
        entry[kind]["median_s"]
        for entry in entries
        for kind in ("forward", "forward_backward")
        if entry[kind] is not None
    ]
    title = f"Time of the backbone\n{_measured_as(record)}"
    legend = "light: forward   dark: forward + backward"
    longest = max(medians, default=0.0)
    _prepare(axes, keys, longest, title, legend)
    for y, entry in enumerate(entries):
        key = entry["row"]
        if entry["forward_backward"] is None:
            _write(axes, 0, y, entry["status"], bold=False)
        dark, light = _colours(key)
        bars = (
            ("forward", y - 0.19, light, ""),
            ("forward_backward", y + 0.19, dark, _published_ratio(record, key, "s_per_iter")),
        )
        for kind, at, colour, published in bars:
            timing = entry[kind]
            if timing is None:
                continue
            low, high = timing["p20_s"], timing["p80_s"]
            axes.barh(at, timing["median_s"], height=0.34, color=colour)
            # On a busy machine the spread can be many times the bars: cut, and marked as cut.
            end = min(high, 1.06 * longest)
            axes.plot([low, end], [at, at], color=_INK, linewidth=1.1)
            if end < high:
                axes.plot(end, at, marker=">", markersize=4, color=_INK, clip_on=False)
            times = None if key == BASE else entry["ratio"][kind]
            text = _with_ratio(_seconds(timing["median_s"]), times)
            _write(axes, max(timing["median_s"], end), at, text, published, bold=key == BASE)


def _memory(axes: Axes, entries: list[dict[str, Any]], record: dict[str, Any]) -> None:
    keys = [entry["row"] for entry in entries]
    sizes = [(entry["memory"]["growth_bytes"] or 0) / GIB for entry in entries]
    title = f"Peak memory of the backbone\n{_measured_as(record)}"
    _prepare(axes, keys, max(sizes), title, "forward + backward, on top of weights and image")
    for y, (entry, size) in enumerate(zip(entries, sizes, strict=True)):
        key = entry["row"]
        if not size:
            text = entry["status"] if entry["status"] != "ok" else "not measured"
            _write(axes, 0, y, text, bold=False)
            continue
        axes.barh(y, size, height=0.56, color=_colours(key)[0])
        times = None if key == BASE else entry["ratio"]["memory"]
        text = _with_ratio(f"{size:.{1 if size >= 10 else 2}f} GiB", times)
        _write(axes, size, y, text, _published_ratio(record, key, "memory_g"), bold=key == BASE)


def _measured_as(record: dict[str, Any]) -> str:
    settings = record["settings"]
    height, width = settings["size"]
    return f"{count_of(settings['batch'])} of {height}×{width}, {record['chart_dtype']}"


def figure_of(record: dict[str, Any], dtype: str) -> Figure:
    """One dtype of a record as a figure of WIDTH_PX x HEIGHT_PX pixels."""
    record = {**record, "chart_dtype": dtype}
    entries = [entry for entry in record["measured"] if entry["dtype"] == dtype]
    keys = [entry["row"] for entry in entries]

    figure = Figure(figsize=(WIDTH_PX / DPI, HEIGHT_PX / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.105, right=0.995, top=0.765, bottom=0.225, wspace=0.07)
    _flops(panels[0], keys, record)
    _time(panels[1], entries, record)
    _memory(panels[2], entries, record)
    _name_rows(panels[0], keys)

    figure.text(
        0.012,
        0.935,
        "ViT-Adapter-S: what its kind of attention costs",
        fontsize=14,
        fontweight="bold",
        color=_INK,
        va="center",
    )
    small = (
        f"{caption(record)}. Median of {record['settings']['rounds']}, black line p20-p80 (arrow: "
        "goes on); × is "
        "the ratio to deformable attention. publ.: Chen et al., ICLR 2023, Table 7; time and "
        "memory there are of training the whole detector, FP16, A100, 2 images per GPU (dense "
        "with activation checkpointing): other hardware and more work, so compare loosely."
    )
    figure.text(
        0.012,
        0.025,
        textwrap.fill(small, 225),
        fontsize=7.4,
        color=_MUTED,
        va="bottom",
        linespacing=1.4,
    )
    return figure


def draw(record: dict[str, Any], dtype: str, path: Path) -> None:
    """Draw one dtype of a record into a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_of(record, dtype).savefig(path)
