# SPDX-License-Identifier: Apache-2.0
"""Counts, checks and measures the models of attention.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from benchmarks.common.gate import held
from benchmarks.common.memory import Peak, peak_of
from benchmarks.common.timing import Case, OutOfMemory, Timing, ratio, take_turns
from benchmarks.models.attention_models import (
    BASE,
    KINDS,
    PAPER_SIZE,
    Row,
    Settings,
    build,
    forward,
    forward_backward,
    photograph,
    wake_up,
)
from benchmarks.paper import costs
from benchmarks.paper.costs import Size
from vitadapter.analysis import counting
from vitadapter_ops.testing import cases, gate

# Of the heads of ViT-Adapter-S.
GATE_CASE = cases.OffsetCase(
    "three-levels", ((9, 13), (5, 7), (3, 4)), (4, 4, 4), queries=31, heads=6, channels=64
)


def count(rows: Sequence[Row], size: Size) -> dict[str, Any]:
    """Parameters and multiply-adds: in the paper's setting, and of the backbone at `size`."""
    settings: dict[str, Any] = {
        "paper_setting": {"size": PAPER_SIZE, "mask_rcnn": True, "rows": {}},
        "measured_setting": {"size": size, "mask_rcnn": False, "rows": {}},
    }
    for row in rows:
        with torch.device("meta"):  # only shapes are needed
            model = build(row)
        detector = costs.head_cost("Mask R-CNN", model.embed_dim, PAPER_SIZE)
        whole = counting.count(model, PAPER_SIZE) + detector
        backbone = counting.count(model, size)
        settings["paper_setting"]["rows"][row.name] = asdict(whole)
        settings["measured_setting"]["rows"][row.name] = asdict(backbone)
    return settings


def check_model(row: Row, model: nn.Module, device: torch.device, dtype: str) -> None:
    """Maps and gradients of one small training step are finite."""
    images = photograph((64, 96), 2).to(device)
    maps = forward_backward(model.train(), images, dtype)
    with held(f"{row.label}, {dtype}"):
        for number, each in enumerate(maps, 1):
            assert each.isfinite().all(), f"map f{number} is not finite"
        for name, parameter in model.named_parameters():
            finite = parameter.grad is None or parameter.grad.isfinite().all()
            assert finite, f"gradient of {name} is not finite"
    model.zero_grad(set_to_none=True)


def check_all(
    settings: Settings, models: dict[str, nn.Module], on_step: Callable[[], object]
) -> None:
    """The gate: the operator against its fp64 definition, and a step of each model.

    Raises:
        RedGateError: one is wrong.
    """
    device = torch.device(settings.device)
    for dtype in settings.dtypes:
        with held(f"ms_deform_attn_from_offsets, {dtype}"):
            gate.check_offsets_backend(GATE_CASE, dtype, "auto", settings.device)
        on_step()
        for row in settings.rows:
            check_model(row, models[row.name].to(device), device, dtype)
            on_step()


def prepare_step(
    row: Row, size: Size, batch: int, dtype: str, device: str, threads: int
) -> Callable[[], object]:
    """Everything a training step needs, warmed up on a small image."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    model = wake_up(build(row)).to(where).train()
    # Loads libraries and starts threads, which a step pays for once and not per step.
    forward_backward(model, photograph((64, 64), 2).to(where), dtype)
    model.zero_grad(set_to_none=True)
    images = photograph(size, batch).to(where)
    return lambda: forward_backward(model, images, dtype)


def measure_memory(
    settings: Settings, on_step: Callable[[Row, str], object]
) -> dict[tuple[str, str], Peak]:
    peaks = {}
    for dtype in settings.dtypes:
        for row in settings.rows:
            peaks[row.name, dtype] = peak_of(
                prepare_step,
                row,
                settings.size,
                settings.batch,
                dtype,
                settings.device,
                settings.threads,
                device=settings.device,
                headroom=settings.memory_limit,
            )
            on_step(row, dtype)
    return peaks


def measure_time(
    settings: Settings,
    models: dict[str, nn.Module],
    which: Sequence[tuple[str, str]],
    on_step: Callable[[], object],
) -> dict[tuple[str, str, str], Timing | OutOfMemory]:
    """Forward and forward+backward of each (row, dtype) in `which`, taking turns."""
    device = torch.device(settings.device)
    images = photograph(settings.size, settings.batch).to(device)

    def inference(model: nn.Module, dtype: str) -> None:
        with torch.inference_mode():
            forward(model, images, dtype)

    def case(model: nn.Module, dtype: str, kind: str) -> Case:
        if kind == "forward":
            return Case(lambda: inference(model, dtype), before=model.eval)
        return Case(
            lambda: forward_backward(model, images, dtype),
            before=model.train,
            after=lambda: model.zero_grad(set_to_none=True),
        )

    turns = {
        (key, dtype, kind): case(models[key], dtype, kind) for key, dtype in which for kind in KINDS
    }
    return take_turns(
        turns,
        device=device,
        warmup=settings.warmup,
        repeats=settings.rounds,
        on_step=lambda key: on_step(),
    )


def combine(
    settings: Settings,
    peaks: dict[tuple[str, str], Peak],
    times: dict[tuple[str, str, str], Timing | OutOfMemory],
) -> list[dict[str, Any]]:
    """One entry per row and dtype, with its ratios to deformable attention."""
    entries: list[dict[str, Any]] = []
    for dtype in settings.dtypes:
        for row in settings.rows:
            peak = peaks[row.name, dtype]
            entry: dict[str, Any] = {
                "row": row.name,
                "dtype": dtype,
                "status": peak.status,
                "detail": peak.detail,
                "memory": peak.as_json(),
                **dict.fromkeys(KINDS),
            }
            for kind in KINDS:
                timing = times.get((row.name, dtype, kind))
                if isinstance(timing, OutOfMemory):
                    entry["status"], entry["detail"] = "out of memory", timing.detail
                elif timing is not None:
                    entry[kind] = timing.as_json()
            entries.append(entry)
    bases = {entry["dtype"]: entry for entry in entries if entry["row"] == BASE}
    for entry in entries:
        base = bases.get(entry["dtype"])
        entry["ratio"] = {
            what: None if base is None else ratio(_figure(entry, what), _figure(base, what))
            for what in (*KINDS, "memory")
        }
    return entries


def _figure(entry: dict[str, Any], what: str) -> float | None:
    """The number that ratios are taken of: a median, or a peak."""
    if what == "memory":
        growth: int | None = entry["memory"]["growth_bytes"]
        return growth
    return None if entry[what] is None else entry[what]["median_s"]


def measure_all(settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """Gate, memory, time: the measured entries of a record."""
    rows, dtypes = settings.rows, settings.dtypes
    models = {row.name: wake_up(build(row)) for row in rows}

    task = progress.add_task("correct?", total=len(dtypes) * (len(rows) + 1))
    check_all(settings, models, lambda: progress.advance(task))
    if torch.device(settings.device).type == "cuda":
        for model in models.values():  # a step is to have the GPU's memory to itself
            model.cpu()
        torch.cuda.empty_cache()

    task = progress.add_task("memory", total=len(dtypes) * len(rows))
    peaks = measure_memory(settings, lambda row, dtype: progress.advance(task))

    fitting = [key for key, peak in peaks.items() if peak.status == "ok"]
    rounds = settings.warmup + settings.rounds
    task = progress.add_task("time, in turns", total=rounds * len(KINDS) * len(fitting))
    device = torch.device(settings.device)
    on_device = {name: models[name].to(device) for name, _ in fitting}
    times = measure_time(settings, on_device, fitting, lambda: progress.advance(task))
    return combine(settings, peaks, times)
