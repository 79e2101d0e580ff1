# SPDX-License-Identifier: Apache-2.0
"""What the adapter costs beside the plain ViT: time, memory, and distance to matrix products.

    python -m benchmarks.models.adapter_vs_vit    # T, S, B at 512x512, a few minutes
    python -m benchmarks.models.adapter_vs_vit --sizes small --compile --profile
    python -m benchmarks.models.adapter_vs_vit --device cuda --sizes base large # bf16 and fp32

Every row is a forward pass of the segmentation model. "plain" is the same ViT with the necks of the
paper's baseline. "floor" is what the model's multiply-adds (full count) would take at the rate that
one large matrix product reaches here, in the same precision.

The run is refused when a model's maps are not those of fp64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import torch
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor, nn

    import vitadapter
    import vitadapter_ops
    from vitadapter.analysis import counting
except ModuleNotFoundError as missing:
    if missing.name not in ("rich", "torch", "vitadapter", "vitadapter_ops"):
        raise  # not something that was never installed, but something broken
    raise SystemExit(
        f"{missing.name} is not installed. `pip install '.[bench]'` in the checkout installs all "
        "that is needed."
    ) from missing

from benchmarks.common import report as _report
from benchmarks.common.console import LOOK, chosen_backend, columns, span, times, wide_console
from benchmarks.common.memory import Peak, peak_in_child
from benchmarks.common.options import add_device_arguments, device_of, natural, positive
from benchmarks.common.timing import Case, OutOfMemory, Timing, ratio, take_turns

SIZES = ("tiny", "small", "base", "large")
KINDS = {"plain": "vit_", "adapter": "vit_adapter_"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the largest value of each map, against fp64: some 40 layers of fp32, and of bf16 products.
GATE = {"fp32": 1e-4, "bf16": 0.1}
GATE_PIXELS = 128
GEMM_SIDE = 2048


class RedGateError(Exception):
    """A model's maps are wrong."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    sizes: tuple[str, ...]
    precisions: tuple[str, ...]
    compiled: tuple[bool, ...]
    pixels: int
    batch: int
    repeats: int
    warmup: int
    threads: int
    device: str
    memory: bool


Key = tuple[str, str, bool, str]  # size, precision, compiled, kind


def build(size: str, kind: str, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with weights that depend on its name only, in inference mode."""
    torch.manual_seed(0)
    model = vitadapter.create_model(KINDS[kind] + size, task="segmentation").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.1)  # zeros would hide the injectors from the gate
    return model.to(device, dtype)


def forward(model: nn.Module, images: Tensor, precision: str) -> Any:
    """One pass, under autocast for bf16."""
    enabled = precision == "bf16"
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=enabled):
        return model(images)


def random_images(batch: int, pixels: int, device: str) -> Tensor:
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(
        device
    )


def check(settings: Settings, size: str, precision: str, kind: str) -> None:
    """Raises RedGateError unless the maps are those of fp64."""
    images = random_images(1, GATE_PIXELS, settings.device)
    maps = forward(build(size, kind, settings.device), images, precision)
    exact = forward(build(size, kind, settings.device, torch.float64), images.double(), "fp32")
    for index, (got, want) in enumerate(zip(maps, exact, strict=True), start=1):
        error = ((got.double() - want).abs().max() / want.abs().max()).item()
        if not error <= GATE[precision]:
            raise RedGateError(
                f"{KINDS[kind]}{size} in {precision}: map {index} is off by {error:.2g} of its "
                f"largest value, allowed {GATE[precision]:g}"
            )


def matmul_rate(device: str, precision: str, seconds: float = 1.0) -> float:
    """Multiply-adds per second of one large matrix product: the best of a second's tries."""
    a = torch.randn(GEMM_SIDE, GEMM_SIDE, device=device, dtype=PRECISIONS[precision])
    case = Case(lambda: torch.mm(a, a))
    begin, best = time.perf_counter(), float("inf")
    while time.perf_counter() - begin < seconds:
        timing = take_turns({0: case}, device=torch.device(device), warmup=1, repeats=3)[0]
        assert isinstance(timing, Timing)
        best = min(best, *timing.seconds)
    return float(GEMM_SIDE**3) / best


def prepare_step(
    size: str, kind: str, precision: str, pixels: int, batch: int, device: str, threads: int
) -> Callable[[], object]:
    """For a fresh process: a model that has run once, on a small image."""
    torch.set_num_threads(threads)
    model = build(size, kind, device)
    forward(model, random_images(batch, 64, device), precision)
    images = random_images(batch, pixels, device)
    return lambda: forward(model, images, precision)


def measure(settings: Settings, size: str) -> dict[Key, Timing | OutOfMemory]:
    """Times of all variants of one size, taking turns."""
    images = random_images(settings.batch, settings.pixels, settings.device)
    torch.compiler.reset()  # or the next size is a recompilation, of which torch allows only few
    cases: dict[Key, Case] = {}
    for kind in KINDS:
        model = build(size, kind, settings.device)
        for compiled in settings.compiled:
            runnable = torch.compile(model, dynamic=False) if compiled else model
            for precision in settings.precisions:
                cases[size, precision, compiled, kind] = Case(
                    lambda m=runnable, p=precision: forward(m, images, p)
                )
    return take_turns(
        cases,
        device=torch.device(settings.device),
        warmup=settings.warmup,
        repeats=settings.repeats,
    )


def table_of(
    settings: Settings,
    timings: dict[Key, Timing | OutOfMemory],
    rates: dict[str, float],
    peaks: dict[tuple[str, str, str], Peak],
) -> Table:
    """One line for each size, precision and way to run."""
    title = f"forward, batch {settings.batch}, {settings.pixels}x{settings.pixels}"
    table = Table(title=title, **LOOK)
    headers = ["model", "", "plain ms", "adapter ms", "ratio", "FPS ratio", "floor ms", "/floor"]
    headers += ["plain MiB", "adapter MiB"] if settings.memory else []
    columns(table, *headers)
    for size in settings.sizes:
        flops = (
            counting.count(build_on_meta(size), (settings.pixels, settings.pixels)).full
            * settings.batch
        )
        for precision in settings.precisions:
            for compiled in settings.compiled:
                pair = [timings[size, precision, compiled, kind] for kind in KINDS]
                medians = [t.median if isinstance(t, Timing) else None for t in pair]
                shown = [
                    span(t.as_json(), "ms") if isinstance(t, Timing) else "out of memory"
                    for t in pair
                ]
                floor = flops / rates[precision]
                slower = ratio(medians[1], medians[0])
                row = [f"ViT-{size[0].upper()}", precision + (" compiled" if compiled else "")]
                row += [*shown, times(slower), times(ratio(1.0, slower))]
                row += [f"{floor * 1e3:.1f}", times(ratio(medians[1], floor))]
                if settings.memory:
                    row += [memory(peaks[size, precision, kind]) for kind in KINDS]
                table.add_row(*row)
    return table


def build_on_meta(size: str) -> nn.Module:
    with torch.device("meta"):
        return vitadapter.create_model(KINDS["adapter"] + size, task="segmentation")


def memory(peak: Peak) -> str:
    """Growth of one eager step, or why there is none."""
    if peak.growth_bytes is None:
        return peak.status if peak.status != "ok" else "-"
    return f"{peak.growth_bytes / 2**20:.0f}"


def profile_table(settings: Settings, size: str, precision: str) -> Table:
    """Where the adapter's time goes, operator by operator."""
    model = build(size, "adapter", settings.device)
    images = random_images(settings.batch, settings.pixels, settings.device)
    forward(model, images, precision)
    is_cuda = torch.device(settings.device).type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if is_cuda else []
    with torch.profiler.profile(activities=kinds) as profile:
        forward(model, images, precision)

    def own_time(event: Any) -> float:
        return event.self_device_time_total if is_cuda else event.self_cpu_time_total

    events = sorted(profile.key_averages(), key=own_time, reverse=True)
    whole = sum(map(own_time, events)) or 1.0
    table = Table(title=f"vit_adapter_{size}, {precision}, eager: own time", **LOOK)
    columns(table, "operator", "share", "ms", "calls")
    for event in events[:15]:
        own = own_time(event)
        table.add_row(event.key, f"{own / whole:.1%}", f"{own / 1e3:.1f}", str(event.count))
    return table


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device_arguments(parser)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small", "base"])
    parser.add_argument(
        "--precision", nargs="+", choices=list(PRECISIONS), default=["fp32", "bf16"]
    )
    parser.add_argument("--pixels", type=positive, default=512, help="side of the images")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--warmup", type=natural, default=2)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--profile", action="store_true", help="show the operators' own times")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    args = parser.parse_args(argv)
    settings = Settings(
        sizes=tuple(args.sizes),
        precisions=tuple(args.precision),
        compiled=(False, True) if args.compile else (False,),
        pixels=args.pixels,
        batch=args.batch,
        repeats=args.repeats,
        warmup=args.warmup,
        threads=args.threads or torch.get_num_threads(),
        device=device_of(parser, args.device),
        memory=not args.no_memory,
    )
    return args, settings


def main(argv: Sequence[str] | None = None) -> int:
    args, settings = parse(argv)
    torch.set_num_threads(settings.threads)
    console: Console = wide_console()
    device = torch.device(settings.device)
    record: dict[str, Any] = {
        **_report.origin(device),
        "backends": {
            "ran": {"fp32": chosen_backend(vitadapter_ops.explain_backend(device=device.type))}
        },
    }
    console.print(_report.caption(record), style="dim", highlight=False)
    try:
        for size in settings.sizes:
            for precision in settings.precisions:
                for kind in KINDS:
                    check(settings, size, precision, kind)
    except RedGateError as error:
        console.print(f"Not timed, because the results are wrong: {error}", style="bold red")
        return 1

    rates = {p: matmul_rate(settings.device, p) for p in settings.precisions}
    for precision, rate in rates.items():
        console.print(f"matrix product in {precision}: {rate / 1e9:.0f} G multiply-adds/s")
    timings: dict[Key, Timing | OutOfMemory] = {}
    for size in settings.sizes:
        timings.update(measure(settings, size))
    peaks = {
        (size, precision, kind): peak_in_child(
            prepare_step,
            size,
            kind,
            precision,
            settings.pixels,
            settings.batch,
            settings.device,
            settings.threads,
            device=settings.device,
        )
        for size in settings.sizes
        for precision in settings.precisions
        for kind in KINDS
        if settings.memory
    }
    console.print(table_of(settings, timings, rates, peaks))
    if args.profile:
        for size in settings.sizes:
            for precision in settings.precisions:
                console.print(profile_table(settings, size, precision))
    if args.json is not None:
        record["settings"] = asdict(settings)
        record["multiply_adds_per_s"] = rates
        record["speed"] = [
            {"model": KINDS[kind] + size, "precision": precision, "compiled": compiled}
            | (timing.as_json() if isinstance(timing, Timing) else {"status": "out of memory"})
            for (size, precision, compiled, kind), timing in timings.items()
        ]
        record["peak_memory"] = [
            {"model": KINDS[kind] + size, "precision": precision} | asdict(peak)
            for (size, precision, kind), peak in peaks.items()
        ]
        _report.write_json(args.json, record)
        console.print(f"Written to: {args.json}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
