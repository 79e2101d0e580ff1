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

import PIL.Image
import pytest
import torch
from matplotlib.text import Text
from rich.console import Console

import children
from benchmarks.common.memory import Peak
from benchmarks.common.timing import OutOfMemory, Timing
from benchmarks.models import attention as attn
from benchmarks.models import attention_chart as chart
from benchmarks.models import attention_measure as measure
from benchmarks.models import attention_models as models
from benchmarks.models import attention_tables as tables
from optional import require_cuda
from vitadapter_ops.testing import gate

BENCHMARKS = children.ROOT / "benchmarks"
TINY = ["--device", "cpu", "--size", "64", "64", "--rounds", "2", "--warmup", "0"]
TINY += ["--threads", "1"]  # other tests may be running, and threads that wait slow all down


@pytest.fixture
def small(monkeypatch):
    """Runs in this process: a model of half the width, and no counting, which others test."""
    monkeypatch.setattr(models, "MODEL", "vit_adapter_tiny")
    monkeypatch.setattr(measure, "count", lambda rows, size: counted_of(rows))


def settings(**changes) -> models.Settings:
    return dataclasses.replace(attn.settings_of(attn.parse(["--device", "cpu"])), **changes)


def counted_of(rows) -> dict:
    """Made-up counts."""
    costs = {row.name: {"params": 47e6, "paper": 1080e9, "full": 1100e9} for row in rows}
    setting = {"size": models.PAPER_SIZE, "mask_rcnn": True, "rows": costs}
    return {"paper_setting": setting, "measured_setting": setting}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command as a user types it, in a process of its own."""
    out = tmp_path_factory.mktemp("out")
    rows = ["--cases", "deformable", "cs*"]
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
    assert record["schema"] == 2
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
        assert image.size == (chart.WIDTH_PX, chart.HEIGHT_PX)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_out_of_memory_is_a_row_and_not_a_crash(small, tmp_path, capsys):
    larger = ["--size", "256", "256", "--memory-limit", "0.05"]  # a step takes several times that
    code = attn.main([*TINY, *larger, "--cases", "deformable", "--out", str(tmp_path)])
    assert code == 0
    assert "out of memory" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "attn-cpu.json").read_text())["measured"]
    assert entry["status"] == "out of memory"
    assert entry["forward"] is None
    assert (tmp_path / "attn-cpu.png").exists()


def test_error_in_a_child_stops_the_run_with_its_traceback(small, tmp_path, capsys, monkeypatch):
    measured = measure.measure_memory
    broken = (models.Row("dense", "dense", "no-such-attention"),)
    monkeypatch.setattr(
        measure,
        "measure_memory",
        lambda asked, on_step: measured(dataclasses.replace(asked, rows=broken), on_step),
    )
    code = attn.main([*TINY, "--cases", "deformable", "--out", str(tmp_path)])
    assert code == 1
    shown = capsys.readouterr().out
    assert "Traceback" in shown
    assert "no-such-attention" in shown
    assert not list(tmp_path.iterdir())


def test_crash_of_a_child_is_shown_and_fails_the_run(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        measure,
        "measure_memory",
        lambda asked, on_step: {("deformable", "fp32"): Peak("killed", detail="ended by SIGSEGV")},
    )
    code = attn.main([*TINY, "--cases", "deformable", "--out", str(tmp_path)])
    assert code == 1
    assert "SIGSEGV" in capsys.readouterr().out


def refuses(tmp_path, capsys, monkeypatch) -> str:
    """Runs main, which must not measure; returns what it says."""

    def measured(*args, **kwargs):
        pytest.fail("measured on a red gate")

    monkeypatch.setattr(measure, "measure_memory", measured)
    monkeypatch.setattr(measure, "measure_time", measured)
    assert attn.main([*TINY, "--cases", "deformable", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    said = " ".join(capsys.readouterr().out.split())
    assert "Not timed, because the results are wrong" in said
    return said


def test_op_that_is_slightly_wrong_is_not_timed(small, tmp_path, capsys, monkeypatch):
    op = gate.ms_deform_attn_from_offsets

    def wrong(*args, backend, **kwargs):
        out, weights = op(*args, backend=backend, **kwargs)
        return out * (1 + 1e-4 * (backend == "auto")), weights

    monkeypatch.setattr(gate, "ms_deform_attn_from_offsets", wrong)
    said = refuses(tmp_path, capsys, monkeypatch)
    assert "ms_deform_attn_from_offsets, fp32: output: error" in said


def test_op_with_a_wrong_gradient_is_not_timed(small, tmp_path, capsys, monkeypatch):
    op = gate.ms_deform_attn_from_offsets

    def wrong(value, shapes, where, offsets, logits, *, backend, **kwargs):
        if backend == "auto":  # same output, twice the gradient
            logits = logits + (logits - logits.detach())
        return op(value, shapes, where, offsets, logits, backend=backend, **kwargs)

    monkeypatch.setattr(gate, "ms_deform_attn_from_offsets", wrong)
    assert "gradient of logits" in refuses(tmp_path, capsys, monkeypatch)


def test_model_with_maps_that_are_not_finite_is_not_timed(small, tmp_path, capsys, monkeypatch):
    build = models.build

    def poisoned(row):
        model = build(row)
        with torch.no_grad():
            next(parameter for parameter in model.parameters()).fill_(float("nan"))
        return model

    monkeypatch.setattr(measure, "build", poisoned)
    assert "map f1 is not finite" in refuses(tmp_path, capsys, monkeypatch)


def test_counted_table_shows_the_published_figures(capsys, monkeypatch):
    monkeypatch.setattr(measure, "measure_all", lambda *args: pytest.fail("measured"))
    assert attn.main(["--device", "cpu", "--paper", "--counted"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = [line for line in lines if len(line) == 9 and line[0] != "attention"]
    rows = {line[0]: line[1:5] for line in reversed(lines)}
    # Reversed, so that of a name's two rows the upper one stays: the paper's setting.
    assert rows["deformable"] == ["47.8", "47.8", "403", "403"]
    assert rows["dense"] == ["50.3", "50.3", "1080", "1080"]
    assert rows["CSwin"] == ["50.3", "50.3", "456", "456"]
    assert rows["Pale"] == ["50.3", "50.3", "456", "458"]
    assert len(lines) == 2 * 4
    assert all(float(line[7]) > float(line[3]) for line in lines)  # everything, the convention


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32", "640"], "--size: expected at least 64 64, got 32 640"),
        (["--size", "64"], "expected 2 arguments"),
        (["--paper", "--size", "64", "64"], "--paper and --size"),
        (["--rounds", "0"], "--rounds: expected a whole number of at least 1, got '0'"),
        (["--batch", "two"], "--batch: expected a whole number of at least 1, got 'two'"),
        (["--threads", "-1"], "threads"),
        (["--cases", "swin"], "--cases: 'swin' names none of deformable, dense, cswin, pale"),
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
    assert asked.dtypes == ("fp32",)


def test_naive_adds_a_row_that_differs_from_dense():
    asked = attn.settings_of(attn.parse(["--device", "cpu", "--naive"]))
    assert [row.name for row in asked.rows][-1] == "dense-2022"
    assert asked.rows[-1].overrides == {"naive_attention": True}


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 160)])
def test_photograph_has_the_asked_size_and_content(size):
    image = models.photograph(size, 3)
    assert image.shape == (3, 3, *size)
    assert image.isfinite().all()
    assert image.std() > 0.3


def test_zero_weights_are_woken_up(small):
    model = models.wake_up(models.build(models.ROWS[0]))
    asleep = [
        name
        for name, parameter in model.named_parameters()
        if not name.endswith("bias") and not parameter.any()
    ]
    assert not asleep


@pytest.mark.parametrize("row", models.ROWS, ids=lambda row: row.name)
def test_gradients_reach_every_parameter_that_is_used(small, row):
    model = models.wake_up(models.build(row)).train()
    models.forward_backward(model, models.photograph((64, 64), 1), "fp32")
    zero = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.any()
    ]
    assert not zero


def drawn(scale: float, failed: str | None = None, spread: float = 5.0):
    """A record of made-up measurements, and its chart.

    Timings are of equal length, behind which labels have the least room.
    """
    rows = (*models.ROWS, models.NAIVE)
    asked = settings(rows=rows)
    peaks = {
        (row.name, "fp32"): Peak("ok", int(scale * 12 * 2**30), 2**30, "made up") for row in rows
    }
    times = {
        (row.name, "fp32", kind): Timing((factor * scale, factor * scale, spread * scale))
        for row in rows
        for kind, factor in (("forward", 1.03), ("forward_backward", 4.47))
    }
    if failed is not None:
        peaks[failed, "fp32"] = Peak("out of memory")
        times = {key: OutOfMemory("") if key[0] == failed else t for key, t in times.items()}
    record = attn.record_before(asked, counted_of(rows))
    record["measured"] = measure.combine(asked, peaks, times)
    return record, chart.figure_of(record, "fp32")


def unreadable(figure) -> list:
    """Texts of a chart that leave it, and pairs that overlap."""
    figure.canvas.draw()
    page = figure.bbox
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    cut = [
        text
        for text, box in boxes
        if box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1
    ]
    return cut + [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1
    ]


def test_the_widest_labels_of_a_chart_fit():
    """Minutes and hundreds of GiB, with both ratios behind each."""
    _, figure = drawn(30.0)
    labels = {text.get_text() for text in figure.findobj(Text)}
    assert {"134.1 s  1.00×", "360.0 GiB  1.00×", "publ. 4.47×"} <= labels
    assert not unreadable(figure)


def test_labels_without_room_are_found(monkeypatch):
    """That the search for overlaps sees them."""
    prepare = chart._prepare
    monkeypatch.setattr(chart, "_prepare", lambda *args, room=2.4: prepare(*args, room=0.7 * room))
    assert unreadable(drawn(30.0)[1])


def test_a_row_out_of_memory_says_so_and_has_no_bars():
    _, figure = drawn(2.4, failed="dense")
    bars = [len(panel.patches) for panel in figure.axes]
    assert bars == [2 * 5, 2 * 4, 4]  # the FLOPs of all five rows are counted all the same
    said = [text.get_text() for panel in figure.axes for text in panel.texts]
    assert said.count("out of memory") == 2
    assert not unreadable(figure)


def test_a_spread_beyond_the_panel_ends_in_an_arrow_before_the_labels():
    _, figure = drawn(0.1, spread=50.0)
    panel = figure.axes[1]
    arrows = [line for line in panel.lines if line.get_marker() == ">"]
    assert len(arrows) == 2 * 5
    assert max(max(line.get_xdata()) for line in panel.lines) < 1.1 * 0.447
    assert not unreadable(figure)


def test_tables_fit_into_120_columns():
    record, _ = drawn(2.4)
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    console.print(tables.counted_table(record["counted"]))
    console.print(tables.measured_table(record["settings"], record["measured"]))
    assert "…" not in stream.getvalue()


def test_out_of_memory_while_timing_becomes_the_rows_status():
    record, _ = drawn(1.0, failed="dense")
    entry = next(entry for entry in record["measured"] if entry["row"] == "dense")
    assert entry["status"] == "out of memory"
    assert entry["ratio"]["forward"] is None


def test_run_without_a_kernel_carries_a_warning_with_the_reason():
    backends = {
        "ran": {"bf16": "cuda chosen by auto", "fp32": "reference chosen by auto"},
        "explained": {"bf16": "", "fp32": "cpu cannot run: no compiler"},
    }
    (warning,) = tables.slow_backends(backends)
    assert "fp32" in warning
    assert "no compiler" in warning


@pytest.mark.gpu
def test_gpu_run_measures_both_dtypes(tmp_path):
    require_cuda()
    tiny = ["--device", "cuda", "--size", "64", "64", "--rounds", "2", "--warmup", "1"]
    code = attn.main([*tiny, "--cases", "deformable", "dense", "--out", str(tmp_path)])
    assert code == 0
    record = json.loads((tmp_path / "attn-cuda.json").read_text())
    assert [entry["dtype"] for entry in record["measured"]] == ["bf16"] * 2 + ["fp32"] * 2
    assert all(entry["memory"]["growth_bytes"] > 0 for entry in record["measured"])
    assert (tmp_path / "attn-cuda.png").exists()
    assert (tmp_path / "attn-cuda-fp32.png").exists()
