# SPDX-License-Identifier: Apache-2.0
"""benchmarks/attn.py: end to end on a tiny image, and every way in which it must refuse."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import children
import PIL.Image
import pytest
import torch
from optional import require_cuda
from rich.console import Console

import vitadapter_ops
from benchmarks.common.memory import ChildError, Peak
from benchmarks.common.timing import OutOfMemory, Timing
from benchmarks.models import attention as attn
from benchmarks.models import attention_chart as _attn_chart

BENCHMARKS = children.ROOT / "benchmarks"
# One thread: other tests may be running, and threads that wait for each other slow all down.
TINY = [
    "--device",
    "cpu",
    "--size",
    "64",
    "64",
    "--repeats",
    "2",
    "--warmup",
    "0",
    "--threads",
    "1",
]


def settings(**changes) -> attn.Settings:
    return dataclasses.replace(attn.settings_of(attn.parse(["--device", "cpu"])), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command as a user types it, in a process of its own."""
    out = tmp_path_factory.mktemp("out")
    rows = ["--attention", "deformable", "cswin"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "attn.py"), *TINY, *rows, "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    return done, out


def test_run_succeeds_and_shows_tables(run):
    done, _ = run
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Counted:" in done.stdout
    assert "Measured:" in done.stdout
    assert "deformable" in done.stdout


def test_run_writes_what_it_measured(run):
    _, out = run
    record = json.loads((out / "attn-cpu.json").read_text())
    assert record["schema"] == 1
    assert record["settings"]["size"] == [64, 64]
    assert record["machine"]["cpu"]
    assert record["versions"]["torch"] == str(torch.__version__)
    assert record["backends"]["ran"]["fp32"] != "unknown"
    assert [entry["row"] for entry in record["measured"]] == ["deformable", "cswin"]
    for entry in record["measured"]:
        assert entry["status"] == "ok"
        for kind in ("forward", "forward_backward"):
            assert len(entry[kind]["samples_s"]) == 2
            assert 0 < entry[kind]["p20_s"] <= entry[kind]["median_s"] <= entry[kind]["p80_s"]
        assert entry["ratio"]["forward"] > 0
        assert entry["memory"]["growth_bytes"] > 0


def test_ratio_to_itself_is_one(run):
    _, out = run
    record = json.loads((out / "attn-cpu.json").read_text())
    assert set(record["measured"][0]["ratio"].values()) == {1.0}


def test_results_name_no_place_on_this_machine(run):
    _, out = run
    text = (out / "attn-cpu.json").read_text()
    for place in (Path.home(), BENCHMARKS.parent, Path(sys.prefix), out):
        assert str(place) not in text


def test_run_draws_its_chart(run):
    _, out = run
    with PIL.Image.open(out / "attn-cpu.png") as image:
        image.load()
        assert image.size == (_attn_chart.WIDTH_PX, _attn_chart.HEIGHT_PX)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_out_of_memory_is_a_row_and_not_a_crash(tmp_path, capsys):
    larger = ["--size", "256", "256", "--memory-limit", "0.05"]  # a step takes several times that
    code = attn.main([*TINY, *larger, "--attention", "deformable", "--out", str(tmp_path)])
    assert code == 0
    assert "out of memory" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "attn-cpu.json").read_text())["measured"]
    assert entry["status"] == "out of memory"
    assert entry["forward"] is None
    assert (tmp_path / "attn-cpu.png").exists()


def test_error_in_a_child_stops_the_run_with_its_traceback(tmp_path, capsys, monkeypatch):
    measure = attn.measure_memory
    broken = (attn.Row("dense", "dense", "no-such-attention"),)
    monkeypatch.setattr(
        attn,
        "measure_memory",
        lambda asked, on_step: measure(dataclasses.replace(asked, rows=broken), on_step),
    )
    code = attn.main([*TINY, "--attention", "deformable", "--out", str(tmp_path)])
    assert code == 1
    shown = capsys.readouterr().out
    assert "Traceback" in shown
    assert "no-such-attention" in shown
    assert not list(tmp_path.iterdir())


def test_crash_of_a_child_is_shown_and_fails_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        attn,
        "measure_memory",
        lambda asked, on_step: {("deformable", "fp32"): Peak("killed", detail="ended by SIGSEGV")},
    )
    code = attn.main([*TINY, "--attention", "deformable", "--out", str(tmp_path)])
    assert code == 1
    assert "SIGSEGV" in capsys.readouterr().out


def refuses(tmp_path, capsys, monkeypatch) -> str:
    """Runs main, which must not measure; returns what it says."""

    def measured(*args, **kwargs):
        pytest.fail("measured on a red gate")

    monkeypatch.setattr(attn, "measure_memory", measured)
    monkeypatch.setattr(attn, "measure_time", measured)
    assert attn.main([*TINY, "--attention", "deformable", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    return " ".join(capsys.readouterr().out.split())


def test_op_that_is_slightly_wrong_is_not_timed(tmp_path, capsys, monkeypatch):
    op = vitadapter_ops.ms_deform_attn

    def wrong(*args, backend="auto", **kwargs):
        return op(*args, backend=backend, **kwargs) * (1 + 1e-4 * (backend == "auto"))

    monkeypatch.setattr(vitadapter_ops, "ms_deform_attn", wrong)
    assert "differs from its fp64 definition" in refuses(tmp_path, capsys, monkeypatch)


def test_op_with_a_wrong_gradient_is_not_timed(tmp_path, capsys, monkeypatch):
    op = vitadapter_ops.ms_deform_attn

    def wrong(value, shapes, where, weight, *, backend="auto"):
        if backend == "auto":  # same output, twice the gradient
            weight = weight + (weight - weight.detach())
        return op(value, shapes, where, weight, backend=backend)

    monkeypatch.setattr(vitadapter_ops, "ms_deform_attn", wrong)
    assert "grad of weights" in refuses(tmp_path, capsys, monkeypatch)


def test_model_with_maps_that_are_not_finite_is_not_timed(tmp_path, capsys, monkeypatch):
    build = attn.build

    def poisoned(row):
        model = build(row)
        with torch.no_grad():
            next(parameter for parameter in model.parameters()).fill_(float("nan"))
        return model

    monkeypatch.setattr(attn, "build", poisoned)
    assert "not finite" in refuses(tmp_path, capsys, monkeypatch)


def test_counted_table_shows_the_published_figures(capsys, monkeypatch):
    monkeypatch.setattr(attn, "measure_all", lambda *args: pytest.fail("measured"))
    assert attn.main(["--device", "cpu", "--paper", "--counted"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:5] for line in reversed(lines) if line and len(line) == 9}
    # Reversed, so that of a name's two rows the upper one stays: the paper's setting.
    assert rows["deformable"] == ["47.8", "47.8", "403", "403"]
    assert rows["dense"] == ["50.3", "50.3", "1080", "1080"]
    assert rows["CSwin"] == ["50.3", "50.3", "456", "456"]
    assert rows["Pale"] == ["50.3", "50.3", "456", "458"]


def test_counting_everything_counts_more_than_the_paper():
    counted = attn.count(attn.ROWS, (128, 192))
    for setting in counted.values():
        assert all(cost["full"] > cost["paper"] for cost in setting["rows"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32", "640"], "--size: expected at least 64 64, got 32 640"),
        (["--size", "64"], "expected 2 arguments"),
        (["--paper", "--size", "64", "64"], "--paper and --size"),
        (["--repeats", "0"], "--repeats: expected a whole number of at least 1, got '0'"),
        (["--batch", "two"], "--batch: expected a whole number of at least 1, got 'two'"),
        (["--threads", "-1"], "threads"),
        (["--attention", "swin"], "invalid choice: 'swin'"),
        (["--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "cuda:99"], "torch"),
        (["--memory-limit", "0"], "expected a number above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_argument_is_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        attn.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(SystemExit):
        attn.parse(["--out", str(path)])
    assert "is not a folder" in capsys.readouterr().err


def test_paper_means_the_papers_size_on_a_cpu():
    asked = attn.settings_of(attn.parse(["--device", "cpu", "--paper"]))
    assert asked.size == (800, 1280)
    assert asked.precisions == ("fp32",)


def test_naive_adds_a_row_that_differs_from_dense():
    asked = attn.settings_of(attn.parse(["--device", "cpu", "--naive"]))
    assert [row.key for row in asked.rows][-1] == "dense-2022"
    assert asked.rows[-1].overrides == {"naive_attention": True}


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 160)])
def test_photograph_has_the_asked_size_and_content(size):
    image = attn.photograph(size, 3)
    assert image.shape == (3, 3, *size)
    assert image.isfinite().all()
    assert image.std() > 0.3


def test_zero_weights_are_woken_up():
    model = attn.wake_up(attn.build(attn.ROWS[0]))
    asleep = [
        name
        for name, parameter in model.named_parameters()
        if not name.endswith("bias") and not parameter.any()
    ]
    assert not asleep


@pytest.mark.parametrize("row", attn.ROWS, ids=lambda row: row.key)
def test_gradients_reach_every_parameter_that_is_used(row):
    model = attn.wake_up(attn.build(row)).train()
    attn.forward_backward(model, attn.photograph((64, 64), 1), "fp32")
    zero = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.any()
    ]
    assert not zero


def fake_times(asked: attn.Settings, scale: float, spread: float) -> dict:
    """Timings of equal length, the longest that labels must stand behind."""
    return {
        (row.key, precision, kind): Timing((factor * scale, factor * scale, spread * scale))
        for row, precision in itertools.product(asked.rows, asked.precisions)
        for kind, factor in (("forward", 1.03), ("forward_backward", 4.47))
    }


def figure(scale: float, failed: str | None = None, spread: float = 5.0):
    """A chart of made-up measurements, for its layout only."""
    rows = (*attn.ROWS, attn.NAIVE)
    asked = settings(rows=rows)
    peaks = {
        (row.key, "fp32"): Peak("ok", int(scale * 12 * 2**30), 2**30, "made up") for row in rows
    }
    times = fake_times(asked, scale, spread)
    if failed is not None:
        peaks[failed, "fp32"] = Peak("out of memory")
        times = {key: OutOfMemory("") if key[0] == failed else t for key, t in times.items()}
    costs = {row.key: {"params": 47e6, "paper": 1080e9, "full": 1100e9} for row in rows}
    setting = {"size": attn.PAPER_SIZE, "mask_rcnn": True, "rows": costs}
    record = attn.record_of(asked, {"paper_setting": setting, "measured_setting": setting})
    record["measured"] = attn.combine(asked, peaks, times)
    return record, _attn_chart.figure_of(record, "fp32")


@pytest.mark.parametrize("scale", [0.001, 0.1, 2.4, 30.0])
@pytest.mark.parametrize("failed", [None, "dense"])
@pytest.mark.parametrize("spread", [4.5, 50.0], ids=["quiet", "noisy"])
def test_chart_has_no_text_that_is_cut_or_overlaps(scale, failed, spread):
    _, drawn = figure(scale, failed, spread)
    drawn.canvas.draw()
    page = drawn.bbox
    texts = [text for text in drawn.findobj(_is_text) if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    cut = [
        text
        for text, box in boxes
        if box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1
    ]
    overlapping = [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1
    ]
    assert not cut
    assert not overlapping


def _is_text(artist) -> bool:
    from matplotlib.text import Text

    return isinstance(artist, Text)


def test_tables_fit_into_120_columns():
    record, _ = figure(2.4)
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    console.print(attn.counted_table(record["counted"]))
    console.print(attn.measured_table(record["settings"], record["measured"]))
    assert "…" not in stream.getvalue()


def test_out_of_memory_while_timing_becomes_the_rows_status():
    record, _ = figure(1.0, failed="dense")
    entry = next(entry for entry in record["measured"] if entry["row"] == "dense")
    assert entry["status"] == "out of memory"
    assert entry["ratio"]["forward"] is None


def test_child_error_of_an_impossible_row_names_it():
    impossible = settings(rows=(attn.Row("dense", "dense", "no-such-attention"),))
    with pytest.raises(ChildError, match="no-such-attention"):
        attn.measure_memory(impossible, lambda row, precision: None)


def test_run_without_a_kernel_carries_a_warning_with_the_reason():
    backends = {
        "ran": {"bf16": "cuda chosen by auto", "fp32": "reference chosen by auto"},
        "explained": {"bf16": "", "fp32": "cpu cannot run: no compiler"},
    }
    (warning,) = attn._slow_backends(backends)
    assert "fp32" in warning
    assert "no compiler" in warning


@pytest.mark.gpu
def test_gpu_run_measures_both_precisions(tmp_path):
    require_cuda()
    tiny = ["--device", "cuda", "--size", "64", "64", "--repeats", "2", "--warmup", "1"]
    code = attn.main([*tiny, "--attention", "deformable", "dense", "--out", str(tmp_path)])
    assert code == 0
    record = json.loads((tmp_path / "attn-cuda.json").read_text())
    assert [entry["precision"] for entry in record["measured"]] == ["bf16"] * 2 + ["fp32"] * 2
    assert all(entry["memory"]["growth_bytes"] > 0 for entry in record["measured"])
    assert (tmp_path / "attn-cuda.png").exists()
    assert (tmp_path / "attn-cuda-fp32.png").exists()
