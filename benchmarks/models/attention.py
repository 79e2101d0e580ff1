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

The run is refused when the op disagrees with its fp64 definition or a model's maps are not
finite: a speed is never reported on wrong results.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

try:
    import matplotlib
    import numpy as np
    import PIL.Image
    import torch
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor, nn
    from torch.nn.functional import interpolate

    import vitadapter
    import vitadapter_ops
except ModuleNotFoundError as missing:
    if missing.name not in ("matplotlib", "PIL", "rich", "torch", "vitadapter", "vitadapter_ops"):
        raise  # not something that was never installed, but something broken
    raise SystemExit(
        f"{missing.name} is not installed. Run `make bench`, which installs all that is needed; "
        "or `pip install '.[bench]'` in the checkout."
    ) from missing

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
from benchmarks.common.memory import ChildError, Peak, peak_of
from benchmarks.common.options import (
    add_device_arguments,
    device_of,
    natural,
    positive,
    positive_float,
)
from benchmarks.common.timing import Case, OutOfMemory, Timing, ratio, take_turns
from benchmarks.paper import costs
from benchmarks.paper.tables import TABLE_7 as PUBLISHED
from benchmarks.paper.tables import TABLE_7_SETTING as SETTING
from benchmarks.paper.tables import TABLE_7_SOURCE as SOURCE

MODEL = "vit_adapter_small"
Size = tuple[int, int]  # height, width

PAPER_SIZE: Size = (800, 1280)
# About two minutes on two cores, and large enough for the attention to matter. Multiples of 64,
# so that no kind of attention has to pad its windows or stripes.
CPU_SIZE: Size = (384, 576)
# Not the tracked folder benchmarks/results: a run must not stand in the way of the next git pull.
OUT = _report.OUT


BASE = "deformable"  # what ratios are taken to


@dataclass(frozen=True)
class Row:
    """One model of the comparison. `key` names it in the results and in PUBLISHED."""

    key: str
    label: str
    attention: str
    overrides: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("deformable", "deformable", "deformable"),
    Row("dense", "dense", "dense"),
    Row("cswin", "CSwin", "cswin"),
    Row("pale", "Pale", "pale"),
)
# How global attention was written in 2022: the whole attention matrix in memory.
NAIVE = Row("dense-2022", "dense 2022", "dense", {"naive_attention": True})

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("forward", "forward_backward")


@dataclass(frozen=True)
class Settings:
    """One run, as asked for on the command line and filled up with defaults."""

    device: str
    size: Size
    batch: int
    warmup: int
    repeats: int
    threads: int
    precisions: tuple[str, ...]
    rows: tuple[Row, ...]
    memory_limit: int | None = None

    def as_json(self) -> dict[str, Any]:
        record = asdict(self)
        record["rows"] = [row.key for row in self.rows]
        return {"model": MODEL, "task": "detection", **record}


def build(row: Row) -> vitadapter.ViTAdapter:
    """The row's model, freshly initialised from the same seed, in fp32 on the CPU."""
    torch.manual_seed(0)
    return vitadapter.create_model(
        MODEL, task="detection", attention=row.attention, drop_path_rate=0.0, **row.overrides
    )


@torch.no_grad()
def wake_up(model: nn.Module) -> nn.Module:
    """Give weights that start at zero small random values.

    In a fresh model every injector is multiplied by zero and every query samples the same star,
    so half of the backward pass would carry zeros, and sampling would be kinder to the caches
    than it is in a trained model.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and not parameter.any():
            parameter.normal_(std=0.02)
    return model


def photograph(size: Size, batch: int) -> Tensor:
    """[batch, 3, H, W]: a portrait that matplotlib ships, cropped to size's shape, normalised."""
    file = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    with PIL.Image.open(file) as picture:
        pixels = np.array(picture.convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    height, width = image.shape[1:]
    scale = min(height / size[0], width / size[1])
    crop = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    image = image[None, :, top : top + crop[0], left : left + crop[1]]
    image = interpolate(image, size, mode="bilinear", antialias=True)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    image = (image - mean) / std
    return torch.cat([image if i % 2 == 0 else image.flip(-1) for i in range(batch)])


@contextlib.contextmanager
def precision_of(device: torch.device, precision: str) -> Iterator[None]:
    """fp32 as it is; anything lower through autocast, as it is trained."""
    if precision == "fp32":
        yield
    else:
        with torch.autocast(device.type, PRECISIONS[precision]):
            yield


def forward(model: nn.Module, images: Tensor, precision: str) -> list[Tensor]:
    with precision_of(images.device, precision):
        return list(model(images))


def forward_backward(model: nn.Module, images: Tensor, precision: str) -> list[Tensor]:
    """One training step without a head; gradients for all parameters."""
    maps = forward(model, images, precision)
    torch.autograd.backward(maps, [_ramp(each) for each in maps])
    return maps


def _ramp(feature: Tensor) -> Tensor:
    """A gradient for one map that costs nothing to make.

    It must vary over the map: the batch norm that ends the model removes a constant gradient,
    the mean's for one, and zeros would run through the whole backward pass.
    """
    height, width = feature.shape[-2:]
    ramp = torch.linspace(-1, 1, height * width, dtype=feature.dtype, device=feature.device)
    return ramp.view(1, 1, height, width).expand_as(feature)


# --- correct first ------------------------------------------------------------------------------


class RedGateError(RuntimeError):
    """Something is wrong with the results, so nothing will be timed."""


def check_op(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The op as `auto` runs it against its definition in fp64, forward and all gradients.

    Allowed: twice the error that the definition itself makes in `dtype`, plus a few roundings.

    Returns:
        The largest error of each result, relative to the largest value.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 13), (5, 7), (3, 4)]
    batch, queries, heads, width, points = 2, 31, 6, 64, 4
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(batch, pixels, heads, width, generator=generator)
    # A little beyond the map on every side: samples outside it read zero.
    where = torch.rand(batch, queries, heads, len(shapes), points, 2, generator=generator)
    where = where * 1.2 - 0.1
    weight = torch.randn(batch, queries, heads, len(shapes) * points, generator=generator)
    weight = weight.softmax(-1).view(batch, queries, heads, len(shapes), points)
    cotangent = torch.randn(batch, queries, heads * width, generator=generator)
    cotangent = cotangent.to(device, dtype)
    inputs = [value.to(device, dtype), where.to(device), weight.to(device)]

    def run(backend: str, *, exact: bool = False) -> list[Tensor]:
        leaves = [each.double() if exact else each for each in inputs]
        leaves = [each.detach().clone().requires_grad_() for each in leaves]
        out = vitadapter_ops.ms_deform_attn(leaves[0], shapes, *leaves[1:], backend=backend)
        gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
        return [each.detach().double() for each in (out, *gradients)]

    truth = run("reference", exact=True)
    plain, ours = run("reference"), run("auto")
    names = ("output", "grad of value", "grad of locations", "grad of weights")
    errors = {}
    for name, true, reference, result in zip(names, truth, plain, ours, strict=True):
        scale = float(true.abs().max())
        error = float((result - true).abs().max())
        allowed = 2 * float((reference - true).abs().max())
        allowed += 16 * torch.finfo(dtype).eps * scale
        if not error <= allowed:  # also red when the error is not a number
            raise RedGateError(
                f"ms_deform_attn, {name}, {dtype} on {device}: differs from its fp64 definition "
                f"by {error:.3g}, allowed {allowed:.3g}"
            )
        errors[name] = error / scale
    return errors


def check_model(row: Row, model: nn.Module, device: torch.device, precision: str) -> None:
    """Maps and gradients of one small training step are finite."""
    images = photograph((64, 96), 2).to(device)
    maps = forward_backward(model.train(), images, precision)
    for number, each in enumerate(maps, 1):
        if not each.isfinite().all():
            raise RedGateError(f"{row.label}, {precision}: map f{number} is not finite")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise RedGateError(f"{row.label}, {precision}: gradient of {name} is not finite")
    model.zero_grad(set_to_none=True)


# --- counted ------------------------------------------------------------------------------------


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
        whole = costs.count(model, costs.images(PAPER_SIZE)) + detector
        backbone = costs.count(model, costs.images(size))
        settings["paper_setting"]["rows"][row.key] = asdict(whole)
        settings["measured_setting"]["rows"][row.key] = asdict(backbone)
    return settings


# --- measured -----------------------------------------------------------------------------------


def prepare_step(
    row: Row, size: Size, batch: int, precision: str, device: str, threads: int
) -> Callable[[], object]:
    """Everything a training step needs, warmed up on a small image."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    model = wake_up(build(row)).to(where).train()
    # Loads libraries and starts threads, which a step pays for once and not per step.
    forward_backward(model, photograph((64, 64), 2).to(where), precision)
    model.zero_grad(set_to_none=True)
    images = photograph(size, batch).to(where)
    return lambda: forward_backward(model, images, precision)


def measure_memory(
    settings: Settings, on_step: Callable[[Row, str], object]
) -> dict[tuple[str, str], Peak]:
    peaks = {}
    for precision in settings.precisions:
        for row in settings.rows:
            peaks[row.key, precision] = peak_of(
                prepare_step,
                row,
                settings.size,
                settings.batch,
                precision,
                settings.device,
                settings.threads,
                device=settings.device,
                headroom=settings.memory_limit,
            )
            on_step(row, precision)
    return peaks


def measure_time(
    settings: Settings,
    models: dict[str, nn.Module],
    which: Sequence[tuple[str, str]],
    on_step: Callable[[], object],
) -> dict[tuple[str, str, str], Timing | OutOfMemory]:
    """Forward and forward+backward of each (row, precision) in `which`, taking turns."""
    device = torch.device(settings.device)
    images = photograph(settings.size, settings.batch).to(device)

    def inference(model: nn.Module, precision: str) -> None:
        with torch.inference_mode():
            forward(model, images, precision)

    def case(model: nn.Module, precision: str, kind: str) -> Case:
        if kind == "forward":
            return Case(lambda: inference(model, precision), before=model.eval)
        return Case(
            lambda: forward_backward(model, images, precision),
            before=model.train,
            after=lambda: model.zero_grad(set_to_none=True),
        )

    cases = {
        (key, precision, kind): case(models[key], precision, kind)
        for key, precision in which
        for kind in KINDS
    }
    return take_turns(
        cases,
        device=device,
        warmup=settings.warmup,
        repeats=settings.repeats,
        on_step=lambda key: on_step(),
    )


def combine(
    settings: Settings,
    peaks: dict[tuple[str, str], Peak],
    times: dict[tuple[str, str, str], Timing | OutOfMemory],
) -> list[dict[str, Any]]:
    """One entry per row and precision, with its ratios to deformable attention."""
    entries: list[dict[str, Any]] = []
    for precision in settings.precisions:
        for row in settings.rows:
            peak = peaks[row.key, precision]
            entry: dict[str, Any] = {
                "row": row.key,
                "precision": precision,
                "status": peak.status,
                "detail": peak.detail,
                "memory": peak.as_json(),
                **dict.fromkeys(KINDS),
            }
            for kind in KINDS:
                timing = times.get((row.key, precision, kind))
                if isinstance(timing, OutOfMemory):
                    entry["status"], entry["detail"] = "out of memory", timing.detail
                elif timing is not None:
                    entry[kind] = timing.as_json()
            entries.append(entry)
    bases = {entry["precision"]: entry for entry in entries if entry["row"] == BASE}
    for entry in entries:
        base = bases.get(entry["precision"])
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


# --- shown --------------------------------------------------------------------------------------


def _giga(value: float) -> str:
    return f"{value / 1e9:.0f}" if value >= 99.5e9 else f"{value / 1e9:.1f}"


def _label(key: str) -> str:
    return next(row.label for row in (*ROWS, NAIVE) if row.key == key)


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
            published = PUBLISHED.get(key) if setting["mask_rcnn"] else None
            flops_ratio = None
            if published is not None:
                flops_ratio = ratio(published.flops_g, PUBLISHED[BASE].flops_g)
            table.add_row(
                _label(key),
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
    images = "1 image" if settings["batch"] == 1 else f"{settings['batch']} images"
    threads = settings["threads"]
    where = f"{threads} CPU thread{'s' * (threads > 1)}"
    if settings["device"] != "cpu":
        where = "the GPU"
    table = Table(
        title=f"Measured: backbone alone, {images} of {height}x{width}, on {where}; "
        f"median (p20-p80) of {settings['repeats']}",
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
    for precision in settings["precisions"]:
        table.add_row(f"[italic]{precision}[/]")
        for entry in entries:
            if entry["precision"] != precision:
                continue
            growth = entry["memory"]["growth_bytes"]
            failed = entry["status"] != "ok"
            table.add_row(
                _label(entry["row"]),
                entry["status"] if failed else span(entry["forward"], unit),
                times(entry["ratio"]["forward"]),
                "-" if failed else span(entry["forward_backward"], unit),
                times(entry["ratio"]["forward_backward"]),
                _published(entry["row"], "s_per_iter"),
                "-" if growth is None else f"{growth / _report.GIB:.2f}",
                times(entry["ratio"]["memory"]),
                _published(entry["row"], "memory_g"),
                style=_style(entry["row"]),
            )
        table.add_section()
    return table


def _published(key: str, what: str) -> str:
    """A published figure and its ratio to deformable attention's."""
    if key not in PUBLISHED:
        return "-"
    value = getattr(PUBLISHED[key], what)
    return f"{value} {times(ratio(value, getattr(PUBLISHED[BASE], what)))}"


def notes(rows: Sequence[Row], *, measured: bool = True) -> list[str]:
    """What a reader must know to read the tables; numbers in brackets stand in their headers."""
    keys = {row.key for row in rows}
    lines = [
        f"Published: {SOURCE}. {SETTING}.",
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
    if "pale" in keys:
        lines.append(
            "Pale counts 456 G here: the published 458 G holds 2 G that cannot be attributed to "
            "anything the papers describe."
        )
    if "dense" in keys and measured:
        lines.append(
            "Dense: torch's fused attention, which never stores the attention matrix (--naive adds "
            "the attention of 2022, which does). Published with activation checkpointing, which "
            "takes less memory and more time."
        )
    return lines


# --- run ----------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="attn.py",
        description="Compare deformable attention with dense, CSwin and Pale attention inside "
        "ViT-Adapter-S: parameters, FLOPs, time and memory, beside the published figures.",
        epilog="Writes a table to the terminal, and the results (JSON) and a chart (PNG) to --out.",
    )
    add_device_arguments(parser)
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
    parser.add_argument(
        "--attention",
        nargs="+",
        metavar="NAME",
        choices=[row.key for row in ROWS],
        default=[row.key for row in ROWS],
        help="compare only these: %(choices)s (default: all; ratios need deformable)",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=positive,
        metavar=("H", "W"),
        help="height and width of the image in pixels, each at least 64 "
        f"(default: {CPU_SIZE[0]} {CPU_SIZE[1]} on a CPU, 800 1280 on a GPU)",
    )
    parser.add_argument(
        "--batch", type=positive, help="images at a time (default: 1 on a CPU, 2 on a GPU)"
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        help="how often each case is timed (default: 5 on a CPU, 30 on a GPU)",
    )
    parser.add_argument(
        "--warmup",
        type=natural,
        help="untimed rounds before that (default: 1 on a CPU, 5 on a GPU)",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=list(PRECISIONS),
        help="number formats to measure; bf16 means autocast (default: fp32 on a CPU, both on a "
        "GPU)",
    )
    parser.add_argument(
        "--memory-limit",
        type=positive_float,
        metavar="GIB",
        help="most memory a step may take on a CPU; a case that needs more is reported as out of "
        "memory (default: most of what is free)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=OUT,
        help="folder for the JSON and the chart (default: benchmarks/out)",
    )
    args = parser.parse_args(argv)
    if args.paper and args.size:
        parser.error("--paper and --size: give one of them; --paper means 800 1280")
    if args.size and min(args.size) < 64:
        parser.error(
            f"--size: expected at least 64 64, got {args.size[0]} {args.size[1]}: the coarsest "
            "map has 1/32 of it, and batch norm needs more than one pixel"
        )
    args.device = device_of(parser, args.device)
    if torch.device(args.device).type == "cuda" and args.memory_limit is not None:
        parser.error("--memory-limit: works on a CPU only")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is not a folder")
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    """The command line with every default filled in."""
    on_gpu = torch.device(args.device).type == "cuda"
    rows = tuple(row for row in ROWS if row.key in args.attention)
    if args.naive:
        rows += (NAIVE,)
    size = tuple(args.size) if args.size else PAPER_SIZE if on_gpu or args.paper else CPU_SIZE
    return Settings(
        device=args.device,
        size=(size[0], size[1]),
        batch=args.batch or (2 if on_gpu else 1),
        warmup=args.warmup if args.warmup is not None else (5 if on_gpu else 1),
        repeats=args.repeats or (30 if on_gpu else 5),
        threads=args.threads or torch.get_num_threads(),
        precisions=tuple(args.precision or (("bf16", "fp32") if on_gpu else ("fp32",))),
        rows=rows,
        memory_limit=(None if args.memory_limit is None else int(args.memory_limit * _report.GIB)),
    )


def check_all(
    settings: Settings, models: dict[str, nn.Module], on_step: Callable[[], object]
) -> dict[str, Any]:
    """The gate. Raises RedGateError, or returns the op's errors per precision."""
    device = torch.device(settings.device)
    errors = {}
    for precision in settings.precisions:
        errors[precision] = check_op(device, PRECISIONS[precision])
        on_step()
        for row in settings.rows:
            check_model(row, models[row.key].to(device), device, precision)
            on_step()
    return errors


def measure_all(
    settings: Settings, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Gate, memory, time: the gate's errors and the measured entries of a record."""
    rows, precisions = settings.rows, settings.precisions
    models = {row.key: wake_up(build(row)) for row in rows}

    task = progress.add_task("correct?", total=len(precisions) * (len(rows) + 1))
    errors = check_all(settings, models, lambda: progress.advance(task))
    if torch.device(settings.device).type == "cuda":
        for model in models.values():  # a step is to have the GPU's memory to itself
            model.cpu()
        torch.cuda.empty_cache()

    task = progress.add_task("memory", total=len(precisions) * len(rows))
    peaks = measure_memory(settings, lambda row, precision: progress.advance(task))

    fitting = [key for key, peak in peaks.items() if peak.status == "ok"]
    rounds = settings.warmup + settings.repeats
    task = progress.add_task("time, in turns", total=rounds * len(KINDS) * len(fitting))
    device = torch.device(settings.device)
    on_device = {key: models[key].to(device) for key, _ in fitting}
    times = measure_time(settings, on_device, fitting, lambda: progress.advance(task))
    return errors, combine(settings, peaks, times)


def _slow_backends(backends: dict[str, Any]) -> list[str]:
    """A warning where no kernel could run: such a run says little about the attention."""
    lines = []
    for precision, ran in backends["ran"].items():
        if ran.startswith("reference"):
            reasons = [
                " ".join(line.split())[:200]
                for line in backends["explained"][precision].splitlines()
                if "cannot run" in line
            ]
            lines.append(
                f"Mind: in {precision} deformable attention ran as its plain definition, without "
                f"a kernel, slower than it need be. Reasons: {'; '.join(reasons)}."
            )
    return lines


def record_of(settings: Settings, counted: dict[str, Any]) -> dict[str, Any]:
    """Everything of a result that is known before anything is measured."""
    device = torch.device(settings.device)
    explained = {
        precision: vitadapter_ops.explain_backend(device=device.type, dtype=PRECISIONS[precision])
        for precision in settings.precisions
    }
    return {
        "schema": 1,
        "benchmark": "attn",
        **_report.origin(device, "numpy", "matplotlib", "rich", "vitadapter", "vitadapter_ops"),
        "settings": settings.as_json(),
        "backends": {
            "available": list(vitadapter_ops.available_backends()),
            "ran": {key: chosen_backend(text) for key, text in explained.items()},
            "explained": {key: _report.without_paths(text) for key, text in explained.items()},
        },
        "math": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        },
        "published": {
            "source": SOURCE,
            "setting": SETTING,
            "rows": {key: asdict(figures) for key, figures in PUBLISHED.items()},
        },
        "counted": counted,
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    settings = settings_of(args)
    torch.set_num_threads(settings.threads)
    console = wide_console()

    counted = count(settings.rows, settings.size)
    if args.counted:
        console.print(counted_table(counted))
        console.print()
        for line in notes(settings.rows, measured=False):
            console.print(line, style="dim", highlight=False, markup=False)
        return 0

    try:
        with progress_on(console) as progress:
            errors, entries = measure_all(settings, progress)
    except RedGateError as error:
        console.print(f"Not timed, because the results are wrong: {error}", style="bold red")
        return 1
    except ChildError as error:
        console.print(str(error), markup=False, highlight=False)
        console.print("Stopped: a memory measurement failed (above).", style="bold red")
        return 1

    record = record_of(settings, counted)
    record["gate"] = {"op_error_relative": errors}
    record["measured"] = entries
    record["notes"] = [*notes(settings.rows), *_slow_backends(record["backends"])]

    console.print(counted_table(counted))
    console.print()
    console.print(measured_table(record["settings"], entries))
    console.print()
    for line in record["notes"]:
        console.print(line, style="dim", highlight=False, markup=False)
    console.print(_report.caption(record), style="dim", highlight=False)

    from benchmarks.models.attention_chart import draw

    name = "attn-" + torch.device(settings.device).type
    if args.paper and name == "attn-cpu":
        name += "-paper"
    _report.write_json(args.out / f"{name}.json", record)
    written = [args.out / f"{name}.json"]
    for number, precision in enumerate(settings.precisions):
        path = args.out / (f"{name}.png" if number == 0 else f"{name}-{precision}.png")
        draw(record, precision, path)
        written.append(path)
    console.print("Written: " + ", ".join(str(path) for path in written), highlight=False)

    crashed = [entry for entry in entries if entry["status"] == "killed"]
    for entry in crashed:
        console.print(f"{_label(entry['row'])}: {entry['detail']}", style="bold red")
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main())
