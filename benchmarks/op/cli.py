# SPDX-License-Identifier: Apache-2.0
"""The operator alone, beside other implementations of it, and beside what the machine can do.

    python -m benchmarks.op                                     # all shapes in fp32, long
    python -m benchmarks.op --cases 'injector-*' --locations local --dtype fp32 bf16
    python -m benchmarks.op --against torch-ms-deform-attn      # one rival only
    python -m benchmarks.op --scaling                           # does cost grow linearly?
    python -m benchmarks.op --host                              # what does a call cost the host?
    python -m benchmarks.op --device cuda                       # the shapes and targets of a GPU
    ncu --profile-from-start off ... python -m benchmarks.op --device cuda --cases 'encoder-*' \
        --dtype bf16 --passes backward --profile                # one call, see docs/gpu.md

Shapes are those of vitadapter_ops.testing.cases: ViT-Adapter's injectors and extractors, and
Deformable DETR's encoder and decoder; on a GPU also DINOv3's adapter. Sampling points lie
anywhere, or around their query as in trained models.

A shape is timed only after the output and all three gradients have passed the tests' gate. All
implementations of one shape take turns in one process, each right after an untimed call of its own:
times are with warm caches, and on a GPU also with cold ones and with the host's part
(common/graphs.py). "backward" is the backward pass alone, all three gradients, on a graph that is
kept; "both" is forward and backward. Memory is the peak of one step on top of the inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.common import graphs, options, report
from benchmarks.common.console import wide_console
from benchmarks.op import bandwidth, host, implementations, scaling
from benchmarks.op.files import Files, fields_of, gpu_of, record_of
from benchmarks.op.implementations import COMPILED, OURS, Implementation
from benchmarks.op.measure import measure_all, profile
from benchmarks.op.results import Result, Settings, is_gpu
from benchmarks.op.tables import show_bandwidths, show_case, show_limits, show_verdict
from benchmarks.op.traffic import BOTH, PASSES
from vitadapter_ops.testing import cases

LOCATIONS = ("uniform", "local")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.op",
        description="Time our operator beside others, after the tests' correctness gate.",
        epilog="Prints a table for each case, appends its rows to op-<device>.csv, and writes all "
        "that the run found to op-<device>.json.",
    )
    options.add_device(parser)
    names = [case.name for case in (*cases.BENCH, *cases.GPU_BENCH)]
    options.add_cases(parser, names, "those meant for the device")
    parser.add_argument(
        "--locations",
        nargs="+",
        choices=LOCATIONS,
        default=LOCATIONS,
        help="where queries sample: anywhere, or around their own position (default: both)",
    )
    options.add_dtypes(
        parser,
        help="dtypes of value, and of locations and weights (default: fp32; on a GPU fp32, fp16, "
        "bf16)",
    )
    parser.add_argument(
        "--passes",
        nargs="+",
        choices=(*PASSES, BOTH),
        help="what to time (default: forward, backward; on a GPU also both in one)",
    )
    rivals = ", ".join(each.name for each in implementations.RIVALS)
    parser.add_argument(
        "--against",
        nargs="*",
        metavar="NAME",
        help=f"rivals to time: {rivals}; no name for none (default: all that are installed, "
        f"without {COMPILED.name}, which compiles for minutes)",
    )
    options.add_rounds(parser, 30)
    options.add_seconds(parser, 1.0)
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="instead of rivals: our cost for more queries, images and threads; writes nothing",
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="instead of rivals: the host's time for a call, by backend; writes nothing",
    )
    parser.add_argument(
        "--at-most",
        type=options.positive_float,
        metavar="SECONDS",
        help="start no further shape after this time (default: measure all)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead of timing: one call of ours for each shape, dtype and pass, between "
        "cudaProfilerStart and cudaProfilerStop; writes nothing",
    )
    options.add_output(parser)
    args = parser.parse_args(argv)
    on_gpu = is_gpu(args.device)
    if args.profile and not on_gpu:
        parser.error(f"--profile: works on a GPU only, not on {args.device}")
    args.dtype = args.dtype or (["fp32", "fp16", "bf16"] if on_gpu else ["fp32"])
    args.passes = args.passes or ((*PASSES, BOTH) if on_gpu else PASSES)
    args.rivals = _chosen_rivals(parser, args.against)
    try:
        csv = report.result_file(args.out, "op", args.device, "csv")
        report.check_csv(csv, fields_of(args.device))
    except ValueError as error:
        parser.error(f"--out: {error}")
    return args


def _chosen_rivals(
    parser: argparse.ArgumentParser, asked: Sequence[str] | None
) -> tuple[Implementation, ...]:
    reasons = {each.name: each.missing() for each in implementations.RIVALS}
    installed = [name for name, reason in reasons.items() if reason is None]
    if asked is None:
        asked = [name for name in installed if name != COMPILED.name]
    for name in asked:
        if name not in reasons:
            parser.error(f"--against: expected some of {', '.join(reasons)}, got {name!r}")
        if reasons[name] is not None:
            parser.error(
                f"--against: {name} is not installed ({reasons[name]}); "
                f"installed: {', '.join(installed)}. `make bench-rivals` installs the others"
            )
    return tuple(each for each in implementations.RIVALS if each.name in asked)


def settings_of(args: argparse.Namespace) -> Settings:
    """The command line with every default filled in."""
    on_gpu = is_gpu(args.device)
    if args.cases is None:
        several = cases.GPU_BENCH if on_gpu else cases.BENCH
    else:
        several = options.matching((*cases.BENCH, *cases.GPU_BENCH), args.cases)
    chosen = [
        replace(case, locations=locations)
        for case in several
        for locations in LOCATIONS
        if locations in args.locations
    ]
    if on_gpu:  # time may run out: what is most like a trained model comes first
        chosen.sort(key=lambda case: case.locations != "local")
    return Settings(
        device=args.device,
        cases=tuple(chosen),
        dtypes=tuple(dict.fromkeys(args.dtype)),
        passes=tuple(which for which in (*PASSES, BOTH) if which in args.passes),
        implementations=(OURS, *args.rivals),
        rounds=args.rounds,
        seconds=args.seconds,
        threads=args.threads,
        at_most=args.at_most,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    settings = settings_of(args)
    torch.set_num_threads(settings.threads)
    console = wide_console()
    record = record_of(settings)
    console.print(report.caption(record), style="dim", highlight=False)

    if args.host:
        console.print(host.table(host.measure(settings.device, settings.rounds)))
        console.print(host.NOTE, style="dim", highlight=False)
        return 0
    if args.scaling:
        return 0 if scaling.show(settings, console) else 1
    if settings.on_gpu:
        graphs.use_own_stream(torch.device(settings.device))
    if args.profile:
        profile(settings, console)
        return 0

    files = Files(args.out, settings, record)
    try:
        if settings.on_gpu:
            files.machine = bandwidth.measure_gpu(torch.device(settings.device))
        else:
            files.machine = bandwidth.measure(settings.threads)
        show_bandwidths(console, files.machine, settings)
    except bandwidth.NotMeasured as error:
        console.print(f"Bandwidths: not measured ({error})", highlight=False, markup=False)
    console.print()

    def keep(results: list[Result]) -> None:
        show_case(console, settings, results)
        files.add(results)

    green, left_out = measure_all(settings, console, keep)
    show_limits(console, settings, files.machine, files.results)
    show_verdict(console, gpu_of(record), files.results)
    if left_out:
        console.print(f"Left out, as time was up: {'; '.join(left_out)}", highlight=False)
    if files.results:
        files.write_json(left_out)
        console.print(f"Written: {files.json}", highlight=False, markup=False)
        console.print(f"Appended to: {files.csv}", highlight=False, markup=False)
    return 0 if green else 1
