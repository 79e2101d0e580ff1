# SPDX-License-Identifier: Apache-2.0
"""What the adapter costs beside the plain ViT: time, memory, and distance to matrix products.

    python -m benchmarks.models.adapter_vs_vit    # T, S, B at 512x512, a few minutes
    python -m benchmarks.models.adapter_vs_vit --cases small --compile --profile
    python -m benchmarks.models.adapter_vs_vit --device cuda --cases base large # bf16 and fp32

Every row is a forward pass of the segmentation model. "plain" is the same ViT with the necks of the
paper's baseline. "floor" is what the model's multiply-adds (full count) would take at the rate that
one large matrix product reaches here, in the same dtype.

The run is refused when a model's maps are not those of fp64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import vitadapter
from benchmarks.common import options, report
from benchmarks.common.console import LOOK, columns, span, times, wide_console
from benchmarks.common.gate import RedGateError, held, show_red
from benchmarks.common.memory import Peak, peak_in_child
from benchmarks.common.timing import Case, OutOfMemory, Timing, ratio, take_turns
from benchmarks.models.common import DTYPES, autocast, record_of, say, say_written
from vitadapter.analysis import counting
from vitadapter_ops.testing import cases
from vitadapter_ops.testing.tolerances import assert_map_agrees

KINDS = {"plain": "vit_", "adapter": "vit_adapter_"}
GATE_PIXELS = 128
GEMM_SIDE = 2048


@dataclass(frozen=True)
class Size:
    """A published ViT."""

    name: str


SIZES = tuple(map(Size, ("tiny", "small", "base", "large")))
USUAL = ("tiny", "small", "base")


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    compiled: tuple[bool, ...]
    pixels: int
    batch: int
    rounds: int
    warmup: int
    threads: int
    device: str
    memory: bool


Key = tuple[str, str, bool, str]  # size, dtype, compiled, kind


def build(size: str, kind: str, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with weights that depend on its name only, in inference mode."""
    torch.manual_seed(0)
    model = vitadapter.create_model(KINDS[kind] + size, task="segmentation").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.1)  # zeros would hide the injectors from the gate
    return model.to(device, dtype)


def forward(model: nn.Module, images: Tensor, dtype: str) -> Any:
    """One pass, under autocast for bf16."""
    with torch.no_grad(), autocast(images.device, dtype):
        return model(images)


def random_images(batch: int, pixels: int, device: str) -> Tensor:
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(
        device
    )


def check(settings: Settings, size: str, dtype: str, kind: str) -> None:
    """Raises RedGateError unless the maps are those of fp64."""
    images = random_images(1, GATE_PIXELS, settings.device)
    maps = forward(build(size, kind, settings.device), images, dtype)
    exact = forward(build(size, kind, settings.device, torch.float64), images.double(), "fp32")
    with held(f"{KINDS[kind]}{size}, {dtype}"):
        for index, (got, want) in enumerate(zip(maps, exact, strict=True), start=1):
            assert_map_agrees(f"map {index}", got, want, cases.DTYPES[dtype][0])


def matmul_rate(device: str, dtype: str, seconds: float = 1.0) -> float:
    """Multiply-adds per second of one large matrix product: the best of a second's tries."""
    a = torch.randn(GEMM_SIDE, GEMM_SIDE, device=device, dtype=cases.DTYPES[dtype][0])
    case = Case(lambda: torch.mm(a, a))
    begin, best = time.perf_counter(), float("inf")
    while time.perf_counter() - begin < seconds:
        timing = take_turns({0: case}, device=torch.device(device), warmup=1, repeats=3)[0]
        assert isinstance(timing, Timing)
        best = min(best, *timing.seconds)
    return float(GEMM_SIDE**3) / best


def prepare_step(
    size: str, kind: str, dtype: str, pixels: int, batch: int, device: str, threads: int
) -> Callable[[], object]:
    """For a fresh process: a model that has run once, on a small image."""
    torch.set_num_threads(threads)
    model = build(size, kind, device)
    forward(model, random_images(batch, 64, device), dtype)
    images = random_images(batch, pixels, device)
    return lambda: forward(model, images, dtype)


def measure(settings: Settings, size: str) -> dict[Key, Timing | OutOfMemory]:
    """Times of all variants of one size, taking turns."""
    images = random_images(settings.batch, settings.pixels, settings.device)
    torch.compiler.reset()  # or the next size is a recompilation, of which torch allows only few
    turns: dict[Key, Case] = {}
    for kind in KINDS:
        model = build(size, kind, settings.device)
        for compiled in settings.compiled:
            runnable = torch.compile(model, dynamic=False) if compiled else model
            for dtype in settings.dtypes:
                turns[size, dtype, compiled, kind] = Case(
                    lambda m=runnable, p=dtype: forward(m, images, p)
                )
    return take_turns(
        turns,
        device=torch.device(settings.device),
        warmup=settings.warmup,
        repeats=settings.rounds,
    )


def table_of(
    settings: Settings,
    timings: dict[Key, Timing | OutOfMemory],
    rates: dict[str, float],
    peaks: dict[tuple[str, str, str], Peak],
) -> Table:
    """One line for each size, dtype and way to run."""
    title = f"forward, batch {settings.batch}, {settings.pixels}x{settings.pixels}"
    table = Table(title=title, **LOOK)
    headers = ["model", "", "plain ms", "adapter ms", "ratio", "FPS ratio", "floor ms", "/floor"]
    headers += ["plain MiB", "adapter MiB"] if settings.memory else []
    columns(table, *headers)
    for size in settings.cases:
        flops = (
            counting.count(build_on_meta(size), (settings.pixels, settings.pixels)).full
            * settings.batch
        )
        for dtype in settings.dtypes:
            for compiled in settings.compiled:
                pair = [timings[size, dtype, compiled, kind] for kind in KINDS]
                medians = [t.median if isinstance(t, Timing) else None for t in pair]
                shown = [
                    span(t.as_json(), "ms") if isinstance(t, Timing) else "out of memory"
                    for t in pair
                ]
                floor = flops / rates[dtype]
                slower = ratio(medians[1], medians[0])
                row = [f"ViT-{size[0].upper()}", dtype + (" compiled" if compiled else "")]
                row += [*shown, times(slower), times(ratio(1.0, slower))]
                row += [f"{floor * 1e3:.1f}", times(ratio(medians[1], floor))]
                if settings.memory:
                    row += [memory(peaks[size, dtype, kind]) for kind in KINDS]
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


def profile_table(settings: Settings, size: str, dtype: str) -> Table:
    """Where the adapter's time goes, operator by operator."""
    model = build(size, "adapter", settings.device)
    images = random_images(settings.batch, settings.pixels, settings.device)
    forward(model, images, dtype)
    is_cuda = torch.device(settings.device).type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if is_cuda else []
    with torch.profiler.profile(activities=kinds) as profile:
        forward(model, images, dtype)

    def own_time(event: Any) -> float:
        return event.self_device_time_total if is_cuda else event.self_cpu_time_total

    events = sorted(profile.key_averages(), key=own_time, reverse=True)
    whole = sum(map(own_time, events)) or 1.0
    table = Table(title=f"vit_adapter_{size}, {dtype}, eager: own time", **LOOK)
    columns(table, "operator", "share", "ms", "calls")
    for event in events[:15]:
        own = own_time(event)
        table.add_row(event.key, f"{own / whole:.1%}", f"{own / 1e3:.1f}", str(event.count))
    return table


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_device(parser)
    options.add_cases(parser, [size.name for size in SIZES], ", ".join(USUAL))
    options.add_dtypes(
        parser, DTYPES, default=DTYPES, help="number formats; bf16 means autocast (default: both)"
    )
    parser.add_argument(
        "--pixels", type=options.positive, default=512, help="side of the images (default: 512)"
    )
    parser.add_argument(
        "--batch", type=options.positive, default=1, help="images at a time (default: 1)"
    )
    options.add_rounds(parser, 10)
    options.add_warmup(parser, 2)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--profile", action="store_true", help="show the operators' own times")
    options.add_output(parser)
    args = parser.parse_args(argv)
    sizes = options.matching(SIZES, args.cases or USUAL)
    settings = Settings(
        cases=tuple(size.name for size in sizes),
        dtypes=tuple(args.dtype),
        compiled=(False, True) if args.compile else (False,),
        pixels=args.pixels,
        batch=args.batch,
        rounds=args.rounds,
        warmup=args.warmup,
        threads=args.threads,
        device=args.device,
        memory=not args.no_memory,
    )
    return args, settings


def main(argv: Sequence[str] | None = None) -> int:
    args, settings = parse(argv)
    torch.set_num_threads(settings.threads)
    console = wide_console()
    record = record_of(torch.device(settings.device), settings.dtypes)
    say(console, report.caption(record))
    try:
        for size in settings.cases:
            for dtype in settings.dtypes:
                for kind in KINDS:
                    check(settings, size, dtype, kind)
    except RedGateError as error:
        show_red(console, error)
        return 1

    rates = {dtype: matmul_rate(settings.device, dtype) for dtype in settings.dtypes}
    for dtype, rate in rates.items():
        console.print(f"matrix product in {dtype}: {rate / 1e9:.0f} G multiply-adds/s")
    timings: dict[Key, Timing | OutOfMemory] = {}
    for size in settings.cases:
        timings.update(measure(settings, size))
    peaks = {
        (size, dtype, kind): peak_in_child(
            prepare_step,
            size,
            kind,
            dtype,
            settings.pixels,
            settings.batch,
            settings.device,
            settings.threads,
            device=settings.device,
        )
        for size in settings.cases
        for dtype in settings.dtypes
        for kind in KINDS
        if settings.memory
    }
    console.print(table_of(settings, timings, rates, peaks))
    if args.profile:
        for size in settings.cases:
            for dtype in settings.dtypes:
                console.print(profile_table(settings, size, dtype))
    record["settings"] = asdict(settings)
    record["multiply_adds_per_s"] = rates
    record["speed"] = [
        {"model": KINDS[kind] + size, "dtype": dtype, "compiled": compiled}
        | (timing.as_json() if isinstance(timing, Timing) else {"status": "out of memory"})
        for (size, dtype, compiled, kind), timing in timings.items()
    ]
    record["peak_memory"] = [
        {"model": KINDS[kind] + size, "dtype": dtype} | peak.as_json()
        for (size, dtype, kind), peak in peaks.items()
    ]
    path = report.result_file(args.out, "model", settings.device)
    report.write_json(path, record)
    say_written(console, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
