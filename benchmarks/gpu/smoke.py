# SPDX-License-Identifier: Apache-2.0
"""First contact of one backend's kernels with a GPU: the smoke stage of gpu_check.py.

    python -m benchmarks.gpu.smoke cuda --out smoke-cuda.json --seconds 60

A few hundred checks by the tests' gate: both operators, all widths, pairs of dtypes, deterministic,
queries that are pixels of grids, contention, far outside; and what only a device shows (SPECIALS).
They are dealt to shards, each a process of its own: an illegal address ends one process, and the
shard goes on in another with its next check. The result is written whenever a shard has news, and
says of each failure whether its error is near the bound, which correct rounding can miss by a hair,
or far beyond it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report as _report
from benchmarks.common.graphs import answers
from benchmarks.common.memory import first_line
from benchmarks.common.options import positive_float
from vitadapter_ops import ms_deform_attn
from vitadapter_ops.testing import cases, gate
from vitadapter_ops.testing.tolerances import Inaccurate

# Of heads: those with kernels of their own, and two for the general kernel.
WIDTHS = (32, 64, 128, 16, 24, 40, 12, 8, 31)
SHAPES = ((16, 20), (8, 10), (4, 5))
NEAR = 4  # times the bound: rounding that was not lucky, not a mistake
BROKEN = 9  # exit status of a child after whose check the device answers nothing any more
MOST_RESTARTS = 4
SPECIAL = "special"
WRITE_EVERY = 1.0  # seconds

Check = tuple[str, Callable[[], None]]


# --- checks, in a child -------------------------------------------------------------------------


def checks_of(shard: str, backend: str, device: str) -> Iterator[Check]:
    """The checks of a shard: SPECIAL, or an operator and dtypes such as "located bf16"."""
    if shard == SPECIAL:
        for name, check in SPECIALS.items():
            yield name, partial(check, backend, device)
        return
    operator, dtypes = shard.split()
    deterministic = (False, True) if backend == "cuda" else (False,)
    for case in _located() if operator == "located" else _from_offsets():
        for mode in deterministic:
            name = f"{shard} {case.name}{', deterministic' * mode}"
            yield name, partial(_gate, case, dtypes, backend, device, mode)


def _gate(
    case: cases.Case | cases.OffsetCase,
    dtypes: str,
    backend: str,
    device: str,
    deterministic: bool,
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        if isinstance(case, cases.Case):
            gate.check_backend(case, dtypes, backend, device)
        else:
            gate.check_offsets_backend(case, dtypes, backend, device)
    finally:
        torch.use_deterministic_algorithms(False)


def _located() -> Iterator[cases.Case]:
    pixels = sum(height * width for height, width in SHAPES)
    for width in WIDTHS:
        # 4 x 67 x 3 = 804 rows: no multiple of the rows of a warp or a block.
        yield cases.Case(f"D={width}", SHAPES, 4, 67, 3, width)
    for width in (32, 64):
        yield cases.Case(
            f"D={width}, grids", SHAPES, 2, pixels, 8, width, locations="local", grids=SHAPES
        )
        yield cases.Case(f"D={width}, one point", SHAPES[:1], 2, 320, 4, width, 1, grids=SHAPES[:1])
        yield cases.Case(f"D={width}, 33 points", SHAPES[:2], 2, 19, 4, width, 33)
        yield cases.Case(f"D={width}, far outside", SHAPES, 2, 100, 4, width, spread=1.5)
        # Thousands of terms for each of nine pixels.
        yield cases.Case(f"D={width}, contention", ((3, 3),), 1, 2000, 2, width, spread=0.0)


def _from_offsets() -> Iterator[cases.OffsetCase]:
    pixels = sum(height * width for height, width in SHAPES)
    for width in WIDTHS:
        yield cases.OffsetCase(
            f"D={width}, masked boxes",
            SHAPES,
            (4, 2, 3),
            3,
            67,
            3,
            width,
            boxes=True,
            scaled=True,
            masked=True,
        )
    for width in (32, 64):
        yield cases.OffsetCase(
            f"D={width}, grids",
            SHAPES,
            (4, 4, 4),
            2,
            pixels,
            8,
            width,
            shared_batch=True,
            shared_levels=True,
            grids=SHAPES,
        )


def _inputs(device: str, seed: int = 0, queries: int = 400) -> cases.Inputs:
    case = cases.Case("special", SHAPES, 2, queries, 8, 32, locations="local", grids=SHAPES)
    return case.inputs(seed).to(torch.float32, device)


def _step(
    inputs: cases.Inputs, backend: str, leaves: Sequence[torch.Tensor] | None = None
) -> Callable[[], list[torch.Tensor]]:
    """Output and gradients of `leaves`, or else of copies of the inputs."""
    if leaves is None:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors]
    value, *points = leaves

    def step() -> list[torch.Tensor]:
        out = ms_deform_attn(value, inputs.spatial_shapes, *points, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return step


def _same(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], what: str) -> None:
    """Up to the order of sums; output and gradients of points have none that could change."""
    for name, one, other in zip(gate.NAMES, got, wanted, strict=True):
        exact = name != "gradient of value"
        close = torch.equal(one, other) if exact else torch.allclose(one, other, 1e-4, 1e-4)
        assert close, f"{what}: {name} differs by {(one - other).abs().max().item():.3g}"


def _elsewhere_in_memory(backend: str, device: str) -> None:
    """Tensors that begin at odd elements, and are slices of wider ones."""
    inputs = _inputs(device)
    expected = _step(inputs, backend)()
    value, where, weights = inputs.tensors
    wide = torch.nn.functional.pad(value, (0, 0, 1, 2))[:, :, 1:-2]  # between other heads
    shifted = []
    for tensor in (where, weights):
        longer = torch.cat((torch.zeros(1, device=device), tensor.flatten()))
        shifted.append(longer[1:].view(tensor.shape))
    for moved, what in (
        ((wide, where, weights), "value between other heads"),
        ((value.transpose(1, 2).contiguous().transpose(1, 2), where, weights), "head-major value"),
        ((value, *shifted), "points at odd addresses"),
    ):
        out = ms_deform_attn(moved[0], inputs.spatial_shapes, *moved[1:], backend=backend)
        assert torch.allclose(out, expected[0], 1e-5, 1e-5), what
        leaves = [tensor.detach().requires_grad_() for tensor in moved]
        _, *grads = _step(inputs, backend, leaves)()
        for name, one, other in zip(gate.NAMES[1:], grads, expected[1:], strict=True):
            assert torch.allclose(one, other, 1e-4, 1e-4), f"{what}: {name}"


def _same_bits(backend: str, device: str) -> None:
    """Everything but the gradient of value repeats; in deterministic mode that too."""
    step = _step(_inputs(device), backend)
    first = step()
    for _ in range(5):
        _same(step(), first, "another run")
    if backend == "triton":  # has no deterministic backward
        return
    torch.use_deterministic_algorithms(True)
    try:
        first = step()
        for _ in range(5):
            assert all(map(torch.equal, step(), first)), "deterministic runs differ"
    finally:
        torch.use_deterministic_algorithms(False)


def _captured(backend: str, device: str) -> None:
    """A graph that replays forward and backward, with other numbers in the same memory."""
    if device == "cpu":
        return
    here, other = _inputs(device, 1), _inputs(device, 2)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in here.tensors]
    step = _step(here, backend, leaves)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = step()
        with torch.no_grad():
            for leaf, number in zip(leaves, other.tensors, strict=True):
                leaf.copy_(number)
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    _same(results, _step(other, backend)(), "replayed")


def _two_streams(backend: str, device: str) -> None:
    """Two streams at once disturb each other in nothing."""
    if device == "cpu":
        return
    steps = [_step(_inputs(device, seed), backend) for seed in (3, 4)]
    expected = [step() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for number, (stream, step) in enumerate(zip(streams, steps, strict=True)):
            with torch.cuda.stream(stream):
                results[number] = step()
    torch.cuda.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        _same(got, wanted, "beside another stream")


def _another_device(backend: str, device: str) -> None:
    """Tensors of a device that is not the current one."""
    if device == "cpu" or torch.cuda.device_count() < 2:
        return
    got = _step(_inputs("cuda:1"), backend)()
    expected = _step(_inputs("cuda:0"), backend)()
    _same([tensor.to("cuda:0") for tensor in got], expected, "on another device")


def _many_elements(backend: str, device: str) -> None:
    """A value of more than 2^31 elements, of which the last corner of the map is sampled."""
    side, corner, heads, channels = (2910, 64, 8, 32) if device != "cpu" else (90, 64, 2, 32)
    dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    small = torch.randn(
        1, corner, corner, heads, channels, generator=generator, device=device, dtype=dtype
    )
    large = torch.zeros(1, side, side, heads, channels, device=device, dtype=dtype)
    large[:, -corner:, -corner:] = small
    # Positions in pixels of the corner, multiples of 1/4 that fp32 holds on either map.
    size = (1, 500, heads, 1, 4, 2)
    place = torch.randint(0, 4 * (corner - 2), size, generator=generator, device=device) / 4 + 0.625
    weights = torch.rand(size[:-1], generator=generator, device=device) / 4
    results = []
    for value, length in ((small, corner), (large, side)):
        where = ((place + (length - corner) + 0.5) / length).requires_grad_()
        leaf = value.flatten(1, 2).requires_grad_()
        out = ms_deform_attn(leaf, [(length, length)], where, weights, backend=backend)
        grads = torch.autograd.grad(out, (leaf, where), torch.ones_like(out))
        grad = grads[0].view(value.shape)
        results.append((out.detach(), grad[:, -corner:, -corner:], grad.float().abs().sum()))
        del leaf, grads
    (out, grad, total), (large_out, large_grad, large_total) = results
    for name, one, other in (("output", large_out, out), ("gradient of value", large_grad, grad)):
        one, other = one.float(), other.float()
        error = (one - other).abs().max() / other.abs().max()
        assert error < 0.02, f"{name}: {error:.3g} of the largest value apart"
    share = (large_total / total - 1).abs().item()
    assert share < 0.01, f"gradient of value beside the corner: {share:.3g} of all"


SPECIALS = {
    "slices and odd addresses": _elsewhere_in_memory,
    "repeats": _same_bits,
    "graph": _captured,
    "two streams": _two_streams,
    "another device": _another_device,
    "more than 2^31 elements": _many_elements,
}


def run_shard(shard: str, backend: str, device: str, start: int, only: int | None) -> int:
    """Runs a shard's checks from number `start` on, and prints a line of JSON for each."""
    on_gpu = device != "cpu"
    for number, (name, check) in enumerate(checks_of(shard, backend, device)):
        if number < start or (only is not None and number >= only):
            continue
        print(json.dumps({"begins": number, "name": name}), flush=True)
        begin = time.perf_counter()
        error, beyond = None, 0.0
        try:
            if on_gpu:
                _poison(device)
            check()
            if on_gpu:
                torch.cuda.synchronize()
        except Exception as reason:
            error = _report.without_paths(first_line(reason))[:300]
            beyond = reason.times if isinstance(reason, Inaccurate) else float("inf")
        found = {"ends": number, "error": error, "s": round(time.perf_counter() - begin, 2)}
        found["near"] = error is not None and beyond <= NEAR
        print(json.dumps(found), flush=True)
        if error is not None and on_gpu and not answers(device):
            return BROKEN
    return 0


def _poison(device: str) -> None:
    """Fills memory that the allocator gives out next, large blocks and small: unwritten is NaN."""
    nan = float("nan")
    several = [torch.full((2**24,), nan, device=device)]
    several += [
        torch.full((size,), nan, device=device) for size in (2**17, 2**13) for _ in range(64)
    ]
    del several


# --- shards, in the parent ----------------------------------------------------------------------


@dataclass
class Failure:
    """`near`: beyond the bound, but at most NEAR times it."""

    check: str
    error: str
    near: bool = False


@dataclass
class Shard:
    """A process with some of the checks, and those that replace it when it dies."""

    name: str
    command: tuple[str, ...]
    folder: Path
    done: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    cut: bool = False  # out of time
    _next: int = 0
    _starts: int = 0
    _seen: int = 0  # lines of the log
    _begun: tuple[int, str] | None = None  # the check that runs
    _process: subprocess.Popen[bytes] | None = None

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.name}-{self._starts}".replace(" ", "-")

    def start(self) -> None:
        self._starts += 1
        self._seen, self._begun = 0, None
        with self._log.open("wb") as log:
            command = (*self.command, "--shard", self.name, "--start", str(self._next))
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def poll(self) -> bool:
        """Takes note of what the process says; True if there is news."""
        assert self._process is not None
        if self.finished:
            return False
        code = self._process.poll()  # before reading: what it said last is there then
        news = self._read()
        if code is None:
            return news
        said = [line for line in self._lines() if not line.startswith("{")][-3:]
        text = _report.without_paths(" | ".join(said))[-400:]
        if code == 0:
            self.finished = True
            return True
        if self._begun is not None:  # it died within a check
            number, name = self._begun
            self.failures.append(Failure(name, f"its process ended with {code}: {text}"))
            self._next = number + 1
        elif code != BROKEN:
            self.failures.append(Failure(self.name, f"its process ended with {code}: {text}"))
            self.finished = True
            return True
        if self._starts > MOST_RESTARTS:
            self.failures.append(Failure(self.name, f"given up after {self._starts} processes"))
            self.finished = True
        else:
            self.start()
        return True

    def end(self) -> None:
        """Ends what still runs."""
        if self.finished:
            return
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._read()
        where = self.name if self._begun is None else self._begun[1]
        self.failures.append(Failure(where, "out of time here"))
        self.finished = self.cut = True

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()

    def _read(self) -> bool:
        """Adds what the process found since it was read last; True if it found something."""
        lines = self._lines()
        fresh, self._seen = lines[self._seen :], len(lines)
        before = self.done
        for number, line in enumerate(fresh):
            try:
                each = json.loads(line)
            except ValueError:
                if line.startswith("{") and number == len(fresh) - 1:
                    self._seen -= 1  # not all of it is there yet
                continue
            if not isinstance(each, dict):
                continue
            if "begins" in each:
                self._begun = each["begins"], each["name"]
            elif "ends" in each and self._begun is not None:
                self.done += 1
                self.seconds += each["s"]
                self._next = each["ends"] + 1
                if each["error"]:
                    self.failures.append(Failure(self._begun[1], each["error"], each["near"]))
                self._begun = None
        return self.done > before


def shards_of(backend: str, rehearse: bool) -> list[str]:
    if rehearse:
        return ["offsets bf16", SPECIAL]
    names = [
        f"{operator} {dtypes}" for operator in ("located", "offsets") for dtypes in cases.DTYPES
    ]
    if backend == "triton":
        # Its compiling takes seconds a kernel: fp64 alone is left to the tests.
        names = [name for name in names if not name.endswith("fp64")]
    return [*names, SPECIAL]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="_gpu_smoke.py", description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("cuda", "triton"))
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--seconds", type=positive_float, default=100.0)
    parser.add_argument("--rehearse", action="store_true", help="the CPU's kernels, few checks")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    backend, device = ("cpu", "cpu") if args.rehearse else (args.backend, "cuda")
    if args.shard is not None:
        few = 3 if args.rehearse and args.shard != SPECIAL else None
        return run_shard(args.shard, backend, device, args.start, few)
    if args.out is None:
        parser.error("--out: expected a file, got none")
    record = {
        "schema": 1,
        "benchmark": "gpu-smoke",
        "backend": backend,
        **_report.origin(torch.device(device), "vitadapter_ops"),
    }
    return run_all(args, record)


def run_all(args: argparse.Namespace, record: dict[str, Any]) -> int:
    begin = time.monotonic()
    own = (sys.executable, "-m", "benchmarks.gpu.smoke", args.backend)
    command = (*own, *["--rehearse"] * args.rehearse)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the references; shards fill the cores
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def write(shards: Sequence[Shard]) -> None:
        failures = [asdict(each) for shard in shards for each in shard.failures]
        counts = {
            each.name: {"checks": each.done, "seconds": round(each.seconds, 1)} for each in shards
        }
        complete = all(each.finished and not each.cut for each in shards)
        seconds = round(time.monotonic() - begin, 1)
        results = {"complete": complete, "seconds": seconds, "shards": counts, "failures": failures}
        _report.write_json(args.out, {**record, **results})

    with tempfile.TemporaryDirectory() as folder:
        names = shards_of(args.backend, args.rehearse)
        shards = [Shard(name, command, Path(folder)) for name in names]
        written = begin
        try:
            for shard in shards:
                shard.start()
            while time.monotonic() - begin < args.seconds:
                news = any([shard.poll() for shard in shards])
                if news and time.monotonic() - written > WRITE_EVERY:
                    written = time.monotonic()
                    write(shards)
                if all(shard.finished for shard in shards):
                    break
                time.sleep(0.05)
        finally:
            for shard in shards:
                shard.end()
        write(shards)
    return show(args.backend, shards)


def show(backend: str, shards: Sequence[Shard]) -> int:
    """Prints what failed; 1 if anything did that rounding does not explain."""
    failures = [each for shard in shards for each in shard.failures]
    far = [each for each in failures if not each.near]
    done = sum(shard.done for shard in shards)
    print(f"{backend}: {done} checks, {len(far)} failed, {len(failures) - len(far)} near the bound")
    for each in failures:
        print(f"  {'near' if each.near else 'FAIL'} {each.check}: {each.error}")
    return 1 if far or not done else 0


if __name__ == "__main__":
    sys.exit(main())
