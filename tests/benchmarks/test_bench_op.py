# SPDX-License-Identifier: Apache-2.0
"""benchmarks/op: the gate, the arithmetic, what is written, and every way to refuse."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import children
import pytest
import torch
from rich.console import Console

from benchmarks.common.memory import Peak
from benchmarks.common.timing import Timing
from benchmarks.op import bandwidth as _bandwidth
from benchmarks.op import cli as op
from benchmarks.op import implementations as _rivals
from benchmarks.op import scaling as _scaling
from benchmarks.op import targets as _targets
from benchmarks.op.bandwidth import Level, Machine, NotMeasured
from benchmarks.op.traffic import PASSES, limit, pixels_gathered, plane_bytes, traffic
from vitadapter_ops.testing import cases, gate, oracles

TINY = cases.Case("tiny", ((6, 8), (3, 4)), 1, 48, 2, 8, grids=((6, 8),))
RUN = ["--device", "cpu", "--threads", "1", "--rounds", "2", "--locations", "local"]
MACHINE = Machine(
    (
        Level("L1", 1 << 15, 200.0),
        Level("L2", 1 << 20, 100.0),
        Level("L3", 1 << 25, 50.0),
        Level("memory", None, 20.0),
    ),
    64,
)
GPU_TARGETS = _targets.GPU_TARGETS["H200"]
GPU = Machine((Level("L2", 50 << 20, 5000.0), Level("memory", None, 3000.0)), 16)


@pytest.fixture
def tiny(monkeypatch):
    """One small case, and nothing that takes a process of its own."""

    def unmeasured(threads):
        raise NotMeasured("not now")

    monkeypatch.setattr(cases, "BENCH", (TINY,))
    monkeypatch.setattr(cases, "GPU_BENCH", ())
    monkeypatch.setattr(_bandwidth, "measure", unmeasured)
    monkeypatch.setattr(op, "measure_memory", lambda *args: Peak("ok", 3 << 20))


def rival(name, function, module="torch"):
    """A rival that computes `function(value, shapes, locations, weights)`."""

    def bind(inputs):
        return lambda value, *points: function(value, inputs.spatial_shapes, *points)

    return _rivals.Implementation(name, bind, module)


def result(case="injector-S-512", which="forward", name="grid_sample", seconds=1.0, **changes):
    """A result as a run would have it, ours taking one second."""
    implementation = next(each for each in (_rivals.OURS, *_rivals.RIVALS) if each.name == name)
    inputs = TINY.inputs(dtype=torch.float32)
    values = {
        "case": dataclasses.replace(TINY, name=case),
        "dtype": "fp32",
        "which": which,
        "implementation": implementation,
        "status": "ok",
        "timing": Timing((seconds,)),
        "ratio": seconds,
        "traffic": traffic(inputs, which),
        "planes": plane_bytes(inputs),
        "note": "",
    }
    return op.Result(**{**values, **changes})


# --- the gate -----------------------------------------------------------------------------------


def wrong_output(out, value):
    return out * 1.001


def wrong_gradient(out, value):
    extra = value.sum() * 1e-2
    return out + (extra - extra.detach())


@pytest.mark.parametrize("mistake", [wrong_output, wrong_gradient])
def test_wrong_operator_is_not_timed(tiny, tmp_path, capsys, monkeypatch, mistake):
    right = gate.ms_deform_attn

    def wrong(value, *args, backend, **options):
        out = right(value, *args, backend=backend, **options)
        return mistake(out, value) if backend == "auto" else out

    monkeypatch.setattr(gate, "ms_deform_attn", wrong)
    monkeypatch.setattr(op, "take_turns", lambda *args, **options: pytest.fail("timed"))
    path = tmp_path / "rows.csv"
    for more in ([], ["--scaling"]):
        assert op.main([*RUN, "--against", "--csv", str(path), *more]) == 1
        assert "Not timed, because the results are wrong: tiny" in capsys.readouterr().out
    assert not path.exists()


def test_a_red_dtype_does_not_keep_the_others_from_being_timed(tiny, capsys, monkeypatch):
    monkeypatch.setattr(op, "red", lambda case, dtype, device: "bad" if dtype == "bf16" else None)
    assert op.main([*RUN, "--against", "--no-csv", "--dtype", "bf16", "fp32"]) == 1
    shown = capsys.readouterr().out
    assert "vitadapter_ops   fp32" in shown
    assert "vitadapter_ops   bf16" not in shown


def test_python_without_assertions_is_refused():
    command = [sys.executable, "-O", "-m", "benchmarks.op", "--no-csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "removes the checks" in done.stderr


# --- inputs -------------------------------------------------------------------------------------


def test_local_positions_are_the_pixel_centres_of_the_grids_in_turn():
    case = dataclasses.replace(TINY, grids=((1, 2), (2, 1)), queries=5)
    expected = [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75], [0.25, 0.5]]
    assert case.positions(torch.Generator())[0].tolist() == expected


@pytest.mark.parametrize("case", cases.BENCH[:2], ids=str)
def test_local_points_lie_two_pixels_around_their_query(case):
    case = dataclasses.replace(case, locations="local")
    away = (
        case.inputs().sampling_locations - case.positions(torch.Generator())[:, :, None, None, None]
    )
    for level, (height, width) in enumerate(case.shapes):
        pixels = away[:, :, :, level] * torch.tensor([width, height])
        assert pixels.mean().abs() < 0.05
        assert pixels.std() == pytest.approx(cases.LOCAL_SPREAD, rel=0.02)


def test_grids_of_every_benchmarked_case_have_one_position_for_each_query():
    for case in cases.BENCH:
        if case.grids:
            assert sum(h * w for h, w in case.grids) == case.queries


def test_unknown_locations_are_refused():
    with pytest.raises(ValueError, match="expected uniform or local, got 'global'"):
        dataclasses.replace(TINY, locations="global").inputs()


# --- arithmetic ---------------------------------------------------------------------------------


def four_points(dtype):
    """On a map of 2 rows and 3 columns: points with 4, 2, 1 and 0 corners on it; M 1, D 8."""
    pixels = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [2.5, 1.5], [3.5, 0.5]])
    locations = ((pixels + 0.5) / torch.tensor([3.0, 2.0])).view(1, 1, 1, 1, 4, 2)
    weights = torch.ones(1, 1, 1, 1, 4)
    return cases.Inputs(torch.zeros(1, 6, 1, 8), [(2, 3)], locations, weights, None).to(dtype)


def test_only_corners_on_the_map_are_gathered():
    assert pixels_gathered(four_points(torch.float32)) == 7


def test_forward_traffic_by_hand():
    moved = traffic(four_points(torch.float32), "forward")
    assert moved.gathered == 7 * 32
    # Value, 4 points of 3 numbers, output.
    assert moved.least == 6 * 32 + 4 * 3 * 4 + 32
    assert moved.loads(64) == 7
    assert moved.loads(16) == 7 * 2


def test_backward_traffic_by_hand():
    moved = traffic(four_points(torch.bfloat16), "backward")
    # Pixels in bf16 are read; their gradients in fp32 are read and written.
    assert moved.gathered == 7 * (16 + 2 * 32)
    # Of value only the 7 pixels gathered; its gradient; points and their gradients; the output's.
    assert moved.least == min(7, 6) * 16 + 6 * 16 + 2 * 4 * 3 * 2 + 16
    assert moved.loads(16) == 7 * (1 + 2)


def test_result_states_gathered_bytes_per_second():
    moved = traffic(four_points(torch.float32), "forward")
    assert result(seconds=2.0).gb_per_s(moved.gathered) == pytest.approx(7 * 32 / 2 / 1e9)


@pytest.mark.parametrize(
    ("heads", "channels", "factor"),
    # Two lines a pixel. 8 heads: every 16th line, an eighth of the places. 6 heads: every 12th,
    # which takes all multiples of four. One head: no gaps.
    [(8, 32, 8), (6, 32, 2), (1, 32, 1)],
)
def test_plane_with_pixels_apart_takes_more_of_a_cache(heads, channels, factor):
    value = torch.empty(1, 100, heads, channels)
    points = torch.empty(1, 1, heads, 1, 1, 2)
    packed, apart = plane_bytes(cases.Inputs(value, [(10, 10)], points, points[..., 0], None))
    assert packed == 100 * channels * 4
    assert apart == factor * packed


def test_plane_that_the_kernels_copy_is_read_in_fp32():
    value = torch.empty(1, 100, 16, 32, dtype=torch.bfloat16)
    points = torch.empty(1, 25, 16, 1, 4, 2)
    inputs = cases.Inputs(value, [(10, 10)], points, points[..., 0], None)
    assert plane_bytes(inputs) == (100 * 32 * 2, 100 * 32 * 4)


@pytest.mark.parametrize(
    ("gb_per_s", "bound", "served"),
    [(10, "not bandwidth", "L3"), (40, "L3", "L3"), (90, "L2", "L2"), (150, "L1", "L1")],
)
def test_limit_names_the_level_that_served_and_what_bounds(gb_per_s, bound, served):
    moved = dataclasses.replace(result().traffic, pixels=10**9, row=1, sums=0, least=0)
    found = limit(MACHINE, moved, (1 << 19, 1 << 24), 1 / gb_per_s)
    assert (found.packed, found.read) == ("L2", "L3")
    assert (found.served_by, found.bound) == (served, bound)
    assert found.of_nearest == pytest.approx(gb_per_s / 200)


def test_limit_of_a_case_that_saturates_the_bus_is_memory():
    moved = dataclasses.replace(result().traffic, pixels=10**9, row=1, sums=0, least=18 * 10**9)
    assert limit(MACHINE, moved, (1, 1), 1.0).bound == "memory"


def test_cache_sizes_leave_out_instructions(tmp_path):
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert _bandwidth.cache_sizes(tmp_path) == [48 * 1024, 2 * 2**20]
    assert _bandwidth.cache_sizes(tmp_path / "missing") == []


def test_bandwidths_without_a_compiler_are_not_measured(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(_bandwidth, "cache_sizes", lambda: [1 << 15])
    with pytest.raises(NotMeasured, match="no-such-compiler"):
        _bandwidth.measure(1)


# --- judged -------------------------------------------------------------------------------------


def test_losses_are_named_worst_first():
    results = [
        result(ratio=0.9),
        result(ratio=0.5, which="backward"),
        result(ratio=1.5),
        result(name="vitadapter_ops", ratio=1.0),
    ]
    assert op.losses(results) == [
        "injector-S-512, uniform, fp32, backward: grid_sample 0.50x",
        "injector-S-512, uniform, fp32, forward: grid_sample 0.90x",
    ]
    assert op.losses(results[2:]) == ["nowhere in this run (1 comparisons)"]
    assert op.losses(results[3:]) == ["no rival was timed"]


def shown(table):
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return stream.getvalue()


def judged(results):
    return [each.measured for each in results]


def line_of(text, *words):
    (line,) = [each for each in text.splitlines() if all(word in each for word in words)]
    return line


def test_targets_are_met_missed_or_not_measured():
    results = [
        result(ratio=50.0),
        result("extractor-L-512", ratio=41.0),
        result(which="backward", ratio=14.9),
        result(which="backward", ratio=1.0, dtype="bf16"),  # targets are of fp32
        result("decoder-detr", ratio=1.0),  # of which no target speaks
    ]
    text = shown(_targets.table(_targets.CPU_TARGETS, judged(results)))
    forward = line_of(text, "ViT-Adapter", "forward", "grid_sample")
    assert "met" in forward
    assert "41.00x" in forward
    assert "extractor-L-512" in forward
    assert "missed" in line_of(text, "ViT-Adapter", "backward", "grid_sample")
    assert "not measured" in line_of(text, "encoder-detr", "backward", "grid_sample")


def test_16_bit_storage_is_held_to_fp32_of_the_same_case_and_pass():
    results = [
        result(name="vitadapter_ops", seconds=2.0),
        result(name="vitadapter_ops", seconds=9.0, which="backward"),
        result(name="vitadapter_ops", seconds=4.0, dtype="bf16"),
        result(name="vitadapter_ops", seconds=1.0, dtype="fp16"),
        result(name="grid_sample", seconds=99.0, dtype="fp16"),
    ]
    assert [faster for faster, _ in _targets.against_fp32(judged(results))] == [0.5, 2.0]
    assert "missed" in line_of(
        shown(_targets.table(_targets.CPU_TARGETS, judged(results))), "ours in fp32"
    )


def test_tables_fit_into_120_columns():
    long = {"case": "extractor-L-1024", "which": "backward", "dtype": "bf16_points_fp32"}
    results = [
        result(**{**long, "name": name, "seconds": 12.345, "peak": Peak("ok", 1 << 30)})
        for name in ("vitadapter_ops", "grid_sample-compiled")
    ]
    results.append(result(long["case"], "backward", "vitadapter_ops"))
    for table in (
        op.case_table(results),
        op.limits_table(MACHINE, results),
        _targets.table(_targets.CPU_TARGETS, judged(results)),
        _targets.table(GPU_TARGETS, judged(results)),
        op.gpu_case_table(
            [dataclasses.replace(each, timing=Timing((0.0123,))) for each in results]
        ),
        op.gpu_limits_table(GPU, results),
    ):
        assert "…" not in shown(table)


# --- scaling ------------------------------------------------------------------------------------


def test_scaling_varies_one_thing_at_a_time():
    several = _scaling.variants(TINY, threads=2, cores=6)
    amounts = {}
    for each in several:
        amounts.setdefault(each.axis, []).append(each.amount)
    assert amounts == {
        "queries": [48, 96, 192],
        "images": [1, 2, 4],
        "threads, one head": [1, 2, 4, 6],
    }
    assert several[2].case == dataclasses.replace(TINY, queries=192)
    assert several[5].case == dataclasses.replace(TINY, batch=4)
    assert (several[9].case, several[9].threads) == (dataclasses.replace(TINY, heads=1), 6)


def test_linear_cost_is_one_on_every_axis():
    def seconds(variant):
        if variant.axis.startswith("threads"):
            return 1.0 / variant.amount
        return 0.1 * variant.amount

    timings = {
        (each, "forward"): Timing((seconds(each),)) for each in _scaling.variants(TINY, 1, 2)
    }
    for axis in ("queries", "images", "threads, one head"):
        assert [each for _, each in _scaling.cost(timings, axis, "forward")] == pytest.approx(
            [1.0] * (2 if axis.startswith("threads") else 3)
        )


def test_scaling_prints_costs_and_restores_the_threads(tiny, capsys, monkeypatch):
    monkeypatch.setattr(op._report, "usable_cores", lambda: 2)
    assert op.main([*RUN, "--against", "--scaling"]) == 0
    printed = capsys.readouterr().out
    for axis, amounts in (("queries", "192:"), ("images", "4:"), ("threads, one head", "2:")):
        assert amounts in line_of(printed, axis, "backward")
    assert torch.get_num_threads() == 1


# --- rivals -------------------------------------------------------------------------------------


def test_every_rival_that_is_installed_agrees_with_ours():
    inputs = TINY.inputs(dtype=torch.float32)
    expected = _rivals.OURS.bind(inputs)(*inputs.tensors)
    for each in _rivals.RIVALS:
        if each.missing() is None and each is not _rivals.COMPILED:
            torch.testing.assert_close(each.bind(inputs)(*inputs.tensors), expected)


@pytest.fixture(params=["roulbac", "rziga"])
def msda_triton(request, monkeypatch):
    """A stand-in for either of the two projects of this name, with its calling convention."""

    def sample(value, shapes, locations, weights):
        assert value.dtype == locations.dtype == weights.dtype
        return oracles.grid_sample(value, [tuple(s) for s in shapes.tolist()], locations, weights)

    def roulbac(value, shapes, starts, locations, weights):
        assert starts.tolist() == cases.first_pixels(shapes.tolist(), None)
        return sample(value, shapes, locations, weights)

    def rziga(value, shapes, locations, weights, padding_mode, align_corners):
        assert (padding_mode, align_corners) == ("zeros", False)
        return sample(value, shapes, locations, weights).unflatten(2, value.shape[2:])

    module, frontend = ModuleType("msda_triton"), ModuleType("msda_triton.frontend")
    if request.param == "roulbac":
        module.multi_scale_deformable_attention = roulbac
    else:
        module.multiscale_deformable_attention = None  # runs grid_sample: not to be called
        frontend.triton_multiscale_deformable_attention = rziga
        monkeypatch.setitem(sys.modules, "msda_triton.frontend", frontend)
    monkeypatch.setitem(sys.modules, "msda_triton", module)
    return request.param


def test_triton_rivals_are_called_as_they_want_it(msda_triton):
    inputs = cases.SMALL[3].inputs().to(torch.float32)
    rivals = {each.name: each for each in _rivals.RIVALS}
    got = rivals[f"{msda_triton}-msda-triton"].bind(inputs)(*inputs.tensors)
    torch.testing.assert_close(got, _rivals.OURS.bind(inputs)(*inputs.tensors))
    other = {"roulbac": "rziga", "rziga": "roulbac"}[msda_triton]
    assert "another project's" in rivals[f"{other}-msda-triton"].missing()


@pytest.fixture
def deformops(monkeypatch):
    """A stand-in with its calling convention and its checks; returns the backends asked for."""
    asked = []

    def msda(value, shapes, starts, locations, weights, *, backend=None):
        asked.append(backend)
        assert value.dtype == locations.dtype == weights.dtype
        assert (shapes.dtype, starts.dtype) == (torch.int32, torch.int32)
        assert starts.tolist() == cases.first_pixels(shapes.tolist(), None)
        assert weights.shape[:3] == locations.shape[:3]
        weights = weights.unflatten(3, locations.shape[3:5])  # [B, Q, M, L * P]
        return oracles.grid_sample(value, [tuple(s) for s in shapes.tolist()], locations, weights)

    module = ModuleType("deformops.registry")
    module.msda, module.Backend = msda, SimpleNamespace(TRITON="triton")
    monkeypatch.setitem(sys.modules, "deformops", ModuleType("deformops"))
    monkeypatch.setitem(sys.modules, "deformops.registry", module)
    return asked


def test_deformops_is_called_by_its_own_choice_and_with_fp32_sums(deformops):
    exact = cases.SMALL[3].inputs().to(torch.float32)
    inputs = dataclasses.replace(exact, attention_weights=exact.attention_weights.double())
    rivals = {each.name: each for each in _rivals.RIVALS}
    expected = _rivals.OURS.bind(exact)(*exact.tensors)
    for name in ("deformops", "deformops-fp32"):
        got = rivals[name].bind(inputs)(*inputs.tensors)
        torch.testing.assert_close(got, expected)
        assert torch.float64 not in rivals[name].dtypes  # it would run its eager code
    assert deformops == [None, "triton"]
    assert torch.float32 not in rivals["deformops-fp32"].dtypes  # the same kernel as by choice
    if not torch.cuda.is_available():
        assert rivals["deformops"].missing() == "it is for a GPU"


def test_a_rival_for_a_newer_python_is_missing(tmp_path, monkeypatch):
    (tmp_path / "for_newer_python.py").write_text("class Registry[Call: ...] pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "invalid syntax" in rival("newer", None, "for_newer_python").missing()


def test_a_rival_that_fails_or_errs_is_a_remark_and_not_a_crash(tiny, capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("no half today\nand more")

    def half(*args):
        return 0.5 * _rivals.oracles.grid_sample(*args)

    monkeypatch.setattr(op, "RIVALS", (rival("failing", fail), rival("halving", half)))
    assert op.main([*RUN, "--no-csv"]) == 0
    printed = capsys.readouterr().out
    assert "failing, fp32: cannot run: no half today" in printed
    assert "halving, fp32: output differs from ours by 50%" in printed
    assert (
        line_of(printed.split("Where we lose")[0], "failing", "backward").split()[-5:] == ["-"] * 5
    )


def test_rivals_that_are_not_installed_are_left_out(tiny, capsys, monkeypatch):
    absent = rival("absent", None, module="no_such_module")
    monkeypatch.setattr(op, "RIVALS", (absent,))
    assert op.main([*RUN, "--no-csv", "--passes", "forward"]) == 0
    assert "no rival was timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "encoder"], "'encoder' names none of tiny"),
        (["--against", "nobody"], "expected some of absent, grid_sample, got 'nobody'"),
        (["--against", "absent"], "absent is not installed (No module named 'no_such_module')"),
        (["--against", "absent"], "installed: grid_sample"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "tpu"], "expected cpu, cuda or cuda:N, got 'tpu'"),
        (["--no-gate"], "unrecognized arguments: --no-gate"),
    ],
)
def test_wrong_arguments_are_refused_with_what_would_be_right(
    tiny, capsys, monkeypatch, arguments, message
):
    absent = rival("absent", None, module="no_such_module")
    monkeypatch.setattr(op, "RIVALS", (absent, _rivals.RIVALS[0]))
    with pytest.raises(SystemExit) as stop:
        op.main(["--no-csv", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# --- kept ---------------------------------------------------------------------------------------


def test_rows_are_appended_below_one_header(tiny, tmp_path):
    path = tmp_path / "folder" / "rows.csv"
    for _ in range(2):
        assert op.main([*RUN, "--against", "grid_sample", "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["implementation"], row["pass"]) for row in rows] == 2 * [
        (name, which) for which in PASSES for name in ("vitadapter_ops", "grid_sample")
    ]
    for row in rows:
        assert row["torch"] == torch.__version__
        assert row["cpu"]
        assert row["version"] not in ("", "unknown")
        assert row["locations"] == "local"
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["peak_mib"]) == 3
        assert float(row["gathered_gb_per_s"]) > 0
        assert None not in row.values()
    ours, theirs = rows[:2]
    assert float(ours["ratio"]) == 1
    expected = float(theirs["p50_ms"]) / float(ours["p50_ms"])
    assert float(theirs["ratio"]) == pytest.approx(expected, rel=1e-4)
    text = path.read_text()
    for place in (Path.home(), children.ROOT, Path(sys.prefix), tmp_path):
        assert str(place) not in text


def test_a_file_with_other_columns_is_refused_before_anything_is_timed(tiny, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("date,speed\n2020,1\n")
    with pytest.raises(SystemExit):
        op.main([*RUN, "--csv", str(path)])
    error = capsys.readouterr().err
    assert "its columns are not those of this version" in error
    assert "speed" in error
    assert path.read_text() == "date,speed\n2020,1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="cache sizes and memory as Linux states them")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a compiler")
def test_run_with_bandwidths_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(cases, "BENCH", (TINY,))
    assert op.main([*RUN, "--against", "--passes", "forward", "--no-csv"]) == 0
    printed = capsys.readouterr().out
    assert "Loads with 1 thread, measured: L1 " in printed
    assert "Distance from the machine's limits" in printed
    ours = line_of(printed, "vitadapter_ops", "1.00x").split()
    assert float(ours[-1]) < 10  # MiB: the output has 3 KiB
    assert "Appended" not in printed


def test_host_time_of_every_backend_that_runs_here(capsys):
    assert op.main(["--device", "cpu", "--host", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Host time of a call" in printed
    assert "target" in printed
    assert "raw ms_deform_attn_from_offsets" in printed
    assert "torch's share" in printed


# --- on a GPU -----------------------------------------------------------------------------------


def gpu_result(case, which, name, micros, *, dtype="fp32", cold=None):
    """A result on a GPU, ours taking 10 microseconds warm and 20 cold."""
    seconds = micros * 1e-6
    cold = 2 * micros if cold is None else cold
    return result(
        case,
        which,
        name,
        seconds,
        dtype=dtype,
        ratio=micros / 10,
        others={
            "cold": (Timing((cold * 1e-6,)), cold / 20),
            "call": (Timing((3 * seconds,)), micros / 10),
        },
    )


def worst_of(text, results, **wanted):
    """The record of the target whose text and other fields are these."""
    (found,) = [
        each
        for each in _targets.as_json(GPU_TARGETS, judged(results))
        if each["target"] == text and all(each[key] == value for key, value in wanted.items())
    ]
    return found


def test_bf16_target_is_held_to_the_rivals_best_way():
    encoder = ("encoder-800x1333", "forward")
    results = [
        gpu_result(*encoder, "vitadapter_ops", 10, dtype="bf16"),
        gpu_result(*encoder, "torch-ms-deform-attn", 60, dtype="bf16"),
        gpu_result(*encoder, "torch-ms-deform-attn-fp32", 35, dtype="bf16", cold=200),
    ]
    wanted = {"cases": "encoder-800x1333", "pass": "forward", "dtypes": "bf16"}
    found = worst_of(">= 4x", results, **wanted)
    assert (found["met"], found["worst"]) == (False, pytest.approx(3.5))
    assert found["worst_cold"] == pytest.approx(6.0)  # cold, the other way is the best
    assert worst_of(">= 4x", results[:2], **wanted)["met"] is True
    assert worst_of(">= 4x", results[:1], **wanted)["met"] is None


def test_targets_in_microseconds_and_to_our_own_passes():
    results = [
        gpu_result("decoder-800x1333", "forward", "vitadapter_ops", 6.5, dtype="bf16"),
        gpu_result("encoder-800x1333", "forward", "vitadapter_ops", 10),
        gpu_result("encoder-800x1333", "forward", "vitadapter_ops-triton", 14),
        gpu_result("encoder-800x1333", "backward", "vitadapter_ops", 29),
        gpu_result("encoder-800x1333", "backward", "vitadapter_ops-deterministic", 90),
    ]
    assert worst_of("<= 6 us", results)["met"] is False
    assert worst_of("<= 30 us", results)["met"] is None
    assert worst_of("<= 3x", results, what="to our forward")["worst"] == pytest.approx(2.9)
    found = worst_of("<= 3x", results, what="deterministic to default")
    assert (found["met"], found["worst"]) == (False, pytest.approx(90 / 29))
    found = worst_of("<= 1.5x", results, **{"pass": "forward"})
    assert (found["met"], found["worst"]) == (True, pytest.approx(1.4))


def test_deformops_is_held_to_its_best_in_time_and_memory():
    def peak(mib):
        return {"peak": Peak("ok", mib << 20)}

    where = ("encoder-800x1333", "backward")
    results = [
        dataclasses.replace(gpu_result(*where, name, micros, dtype="bf16"), **peak(mib))
        for name, micros, mib in (
            ("vitadapter_ops", 10, 100),
            ("deformops", 16, 100),
            ("deformops-fp32", 14, 150),
        )
    ]
    time = worst_of(">= 1.5x", results, **{"pass": "backward"})
    assert (time["met"], time["worst"]) == (False, pytest.approx(1.4))
    memory = worst_of("> 1x", results, **{"pass": "backward"})
    assert (memory["met"], memory["worst"]) == (False, 1.0)  # as much is not less
    assert memory["worst_cold"] is None
    results[0] = dataclasses.replace(results[0], **peak(99))
    assert worst_of("> 1x", results, **{"pass": "backward"})["met"] is True


def times_row(implementation, which, us, case="encoder-800x1333", dtype="bf16", mib=None):
    row = {"case": case, "dtype": dtype, "implementation": implementation, "pass": which}
    return {**row, "us": us, "p20_us": us, "p80_us": us, "mib": mib, "note": ""}


def test_targets_read_the_rows_of_the_decisive_shapes_too():
    rows = [
        times_row("vitadapter_ops", "forward", 10.0, mib=8.0),  # of a training step
        times_row("vitadapter_ops", "backward", 25.0),
        times_row("vitadapter_ops", "value", 1000.0),
        times_row("vitadapter_ops-deterministic", "backward", 100.0),
        times_row("vitadapter_ops-fused", "both", 30.0),
        times_row("vitadapter_ops-chain", "both", 45.0),
        times_row("torch-ms-deform-attn", "forward", 50.0),
        times_row("deformops", "backward", 20.0, mib=12.0),
        times_row("deformops-fp32", "", None),  # it could not run
        times_row("torch-ms-deform-attn", "forward", 1.0, dtype="fp32"),  # ours was not timed
    ]
    expected = {
        (">= 4x", "forward", "torch-ms-deform-attn"): pytest.approx(5.0),
        (">= 1.5x", "backward", "deformops"): pytest.approx(0.8),
        ("> 1x", "backward", "deformops, memory"): pytest.approx(1.5),
        ("<= 3x", "backward", "to our forward"): pytest.approx(2.5),
        ("<= 3x", "backward", "deterministic to default"): pytest.approx(4.0),
        (">= 2x", "both", "unfused to fused"): pytest.approx(1.5),
    }

    def found(rows):
        measured = _targets.of_times({"rows": rows})
        return {
            (each["target"], each["pass"], each["what"]): each["worst"]
            for each in _targets.as_json(_targets.GPU_TARGETS["H100"], measured)
            if each["worst"] is not None
        }

    assert found(rows) == expected
    rows[3] = times_row("vitadapter_ops", "deterministic", 100.0)  # the other spelling
    assert found(rows) == expected


def test_targets_are_kept_for_two_kinds_of_card():
    assert _targets.targets_of("NVIDIA H100 80GB HBM3") == _targets.GPU_TARGETS["H100"]
    assert _targets.targets_of("NVIDIA H200") == _targets.GPU_TARGETS["H200"]
    assert _targets.targets_of(None) == _targets.CPU_TARGETS
    for other in ("NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H200 NVL"):
        assert _targets.targets_of(other) == ()


def test_a_card_without_targets_is_named(capsys):
    record = {"machine": {"gpu": {"name": "NVIDIA A100-SXM4-80GB"}}}
    results = [gpu_result("encoder-800x1333", "forward", "vitadapter_ops", 10)]
    op.show_verdict(op.wide_console(), record, results)
    line = line_of(capsys.readouterr().out, "No targets for NVIDIA A100-SXM4-80GB")
    assert line.endswith("they are kept for H100 80 GB and H200")


def test_our_own_triton_kernels_are_no_rival():
    results = [gpu_result("encoder-800x1333", "forward", "vitadapter_ops-triton", 11)]
    assert all(each["met"] is None for each in _targets.as_json(GPU_TARGETS, judged(results)))


def test_rows_of_a_gpu_state_all_three_times_and_shares_of_the_bandwidths(tmp_path):
    each = gpu_result("encoder-800x1333", "forward", "vitadapter_ops", 10)
    settings = op.settings_of(op.parse(["--device", "cpu"]))
    record = op.record_of(settings)
    record["machine"]["gpu"] = {"name": "NVIDIA H200"}
    row = op.row_of(record, "cuda", each, GPU)
    assert set(row) <= set(op.GPU_FIELDS)
    assert [row[f"{kind}p50_ms"] for kind in ("", "cold_", "call_")] == pytest.approx(
        [0.01, 0.02, 0.03]
    )
    assert row["of_l2"] == pytest.approx(each.traffic.gathered / 10e-6 / 5e12)
    assert row["of_memory"] == pytest.approx(each.traffic.least / 20e-6 / 3e12)
    assert not set(op.row_of(record, "cpu", each, None)) & {"cold_p50_ms", "of_l2"}
    settings = dataclasses.replace(settings, device="cuda")
    op.write_json(tmp_path / "op.json", record, settings, GPU, [each], ["decoder"])
    written = json.loads((tmp_path / "op.json").read_text())
    assert written["results"][0]["cold_p50_ms"] == pytest.approx(0.02)
    assert written["bandwidth"]["levels"][0]["gb_per_s"] == 5000
    assert written["left_out"] == ["decoder"]
    assert len(written["targets"]) == len(GPU_TARGETS)


def test_json_of_a_run_has_what_the_rows_have(tmp_path, tiny):
    path = tmp_path / "op.json"
    run = [*RUN, "--against", "grid_sample", "--no-csv", "--json", str(path)]
    assert op.main([*run, "--passes", "both"]) == 0
    written = json.loads(path.read_text())
    assert [each["implementation"] for each in written["results"]] == [
        "vitadapter_ops",
        "grid_sample",
    ]
    assert {each["pass"] for each in written["results"]} == {"both"}
    assert written["bandwidth"] is None
    assert written["left_out"] == []


def test_no_shape_is_started_when_time_is_up(tiny, capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(op.time, "monotonic", lambda: next(clock))
    run = ["--device", "cpu", "--threads", "1", "--rounds", "1", "--against", "--no-csv"]
    assert op.main([*run, "--at-most", "15"]) == 0
    assert "Left out, as time was up: tiny, local" in capsys.readouterr().out


def test_a_shape_that_fails_does_not_end_the_run(tiny, capsys, monkeypatch):
    def fail(settings, case, dtypes):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(op, "measure_time", fail)
    assert op.main([*RUN, "--against", "--no-csv"]) == 1
    printed = capsys.readouterr().out
    assert "illegal memory access" in printed
    assert "Not timed: tiny, local" in printed


def test_profile_is_for_a_gpu(tiny, capsys):
    with pytest.raises(SystemExit):
        op.main([*RUN, "--profile"])
    assert "--profile: works on a GPU only" in capsys.readouterr().err


def test_profile_makes_one_call_between_start_and_stop(tiny, monkeypatch):
    events = []

    @contextlib.contextmanager
    def profiling():
        events.append("start")
        yield
        events.append("stop")

    right = _rivals.step_of
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "profile", profiling)
    monkeypatch.setattr(
        _rivals, "step_of", lambda *args: lambda: (events.append("call"), right(*args)())
    )
    settings = op.settings_of(op.parse([*RUN, "--passes", "backward"]))
    assert op.profile(settings, op.wide_console()) == 0
    assert events == ["call", "start", "call", "stop"]


def test_copy_kernel_copies(tmp_path):
    pytest.importorskip("triton")
    code = (
        "import torch\nfrom benchmarks.op import copy_kernel\n"
        "source = torch.rand(copy_kernel.BLOCK * 5)\n"
        "target = torch.empty_like(source)\n"
        "copy_kernel.copy(target, source, 2, 1)\n"
        "assert torch.equal(source, target)\n"
    )
    where = {"PYTHONPATH": str(children.ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **where}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
