# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/table.py and predictions.py: what docs/gpu.md says of times and targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common.cards import CARDS
from benchmarks.gpu import predictions, table
from benchmarks.gpu.predictions import BASIS, DECISIVE, ISSUED, PARTS, REACHED, SIZES, Work
from benchmarks.op import targets
from vitadapter_ops.testing import cases

BY_NAME = {case.name: case for case in cases.GPU_BENCH}


def row(implementation, which, us, case="encoder-800x1333", dtype="bf16", mib=1.0, note=""):
    found = {"case": case, "dtype": dtype, "implementation": implementation, "pass": which}
    spread = (
        {"p20_us": None, "p80_us": None} if us is None else {"p20_us": us - 1, "p80_us": us + 1}
    )
    return {**found, "us": us, **spread, "mib": mib, "note": note}


def times(*rows, gpu="NVIDIA H200", **changes):
    """A times-<card>.json."""
    record = {
        "schema": 1,
        "benchmark": "gpu-times",
        "date": "2031-02-03T04:05:06Z",
        "machine": {"gpu": None if gpu is None else {"name": gpu}},
        "versions": {"python": "3.12.1", "torch": "2.11.0", "cuda": "13.0", "deformops": None},
        "git": {"commit": "0123456789abcdef", "uncommitted_changes": False},
        "rows": list(rows),
        "complete": True,
    }
    return {**record, **changes}


@pytest.fixture
def page(tmp_path):
    """Writes a document from results by file name; returns its text."""
    document, results = tmp_path / "gpu.md", tmp_path / "results"
    results.mkdir()
    lines = [marker for block in table.BLOCKS for marker in table.markers(block)]
    arguments = ["--document", str(document), "--results", str(results)]

    def make(**records):
        for name, record in records.items():
            (results / f"times-{name}.json").write_text(json.dumps(record))
        document.write_text("\n".join(("before", *lines, "after", "")))
        assert table.main(arguments) == 0
        assert table.main([*arguments, "--check"]) == 0
        text = document.read_text()
        assert (text.splitlines()[0], text.splitlines()[-1]) == ("before", "after")
        return text

    make.arguments = arguments
    return make


def cells(text, *first):
    """The one line of a table that begins with these cells."""
    begin = f"| {' | '.join(first)} | "
    (line,) = [line for line in text.splitlines() if line.startswith(begin)]
    return line.removeprefix(begin).removesuffix(" |").split(" | ")


def part_of(text, title):
    return text.split(f"### {title}\n")[1].split("\n### ")[0]


# --- the page -----------------------------------------------------------------------------------


def test_the_page_in_the_repository_is_up_to_date():
    assert table.main(["--check"]) == 0


def test_what_was_not_measured_says_so(page):
    text = page()
    for card in CARDS:
        part = part_of(text, card.title)
        predicted, by, *rest = cells(part, "encoder-800x1333", "bf16", "backward")
        assert float(predicted) > 0
        assert by in BASIS
        assert rest == ["not yet", "-", "-", "-", "-", "-"]
        assert f"Not measured on an {card.title} yet." in part
    assert cells(text, "decoder-800x1333", "forward", "bf16")[2:] == ["not yet", "not yet"]


def test_measured_times_stand_beside_predictions_and_the_best_rival(page):
    (prediction,) = [
        each
        for each in json.loads(predictions.FILE.read_text())["rows"]
        if list(each.values())[:4] == ["H200", "encoder-800x1333", "bf16", "backward"]
    ]
    text = page(
        h200=times(
            row("vitadapter_ops", "backward", 400.0),
            row("vitadapter_ops-triton", "backward", 500.0),
            row("torch-ms-deform-attn", "backward", 2000.0),
            row("deformops", "backward", 380.0),
            row("deformops-fp32", "", None, note="cannot run: no\ntorch"),
            row("vitadapter_ops", "zeros", 12.34),
            row("vitadapter_ops-deterministic", "backward", 56.78),
            row("vitadapter_ops-fused", "both", 1.0),
        )
    )
    part = part_of(text, "H200")
    assert cells(part, "encoder-800x1333", "bf16", "backward")[2:] == [
        "400 (399-401)",
        f"{400 / prediction['us']:.2f}x",
        "500",
        "1.25x",
        "deformops 380",
        "0.95x",
    ]
    assert " / 12.3 (" in part
    assert " / 56.8 (" in part
    lines = part.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| encoder"))
    last = lines.index("", first) - 1
    assert lines[last + 1 : last + 3] == [
        "",
        "Where a rival wins: deformops (encoder-800x1333, bf16, backward) 0.95x.",
    ]
    assert "Remarks: deformops-fp32, bf16: cannot run: no torch." in lines
    caption = "`times-h200.json`: NVIDIA H200, 2031-02-03, python 3.12.1, torch 2.11.0, cuda 13.0, "
    assert f"{caption}commit 012345678." in lines
    assert "Not measured on an H100 80 GB yet." in part_of(text, "H100 80 GB")


def test_where_no_rival_wins_the_first_line_says_that(page):
    ours = row("vitadapter_ops", "forward", 10.0)
    assert "Where a rival wins: none was timed." in page(h200=times(ours))
    text = page(h200=times(ours, row("deformops", "forward", 10.0)))
    assert "Where a rival wins: nowhere in this run (1 comparisons)." in text


def test_targets_show_the_worst_case_of_each_cards_newest_run(page):
    def run(ours, date, **options):
        rival = row("torch-ms-deform-attn", "forward", 100.0)
        rows = (row("vitadapter_ops", "forward", ours), rival)
        return times(*rows, date=f"20{date}-01-01T00:00:00Z", **options)

    text = page(old=run(10.0, 30), new=run(40.0, 31), h100=run(20.0, 29, gpu=CARDS[0].name))
    assert cells(text, "encoder-800x1333", "forward", "bf16", "torch-ms-deform-attn") == [
        ">= 4x",
        "met 5.00x (encoder-800x1333, bf16)",
        "**missed** 2.50x (encoder-800x1333, bf16)",
    ]
    part = text.split("### H200\n")
    assert len(part) == 3  # a section for each run


def test_another_card_has_its_times_and_no_prediction_or_target(page):
    text = page(a100=times(row("vitadapter_ops", "forward", 70.0), gpu="NVIDIA A100-SXM4-80GB"))
    part = part_of(text, "NVIDIA A100-SXM4-80GB")
    assert cells(part, "encoder-800x1333", "bf16", "forward")[:4] == [
        "-",
        "-",
        "70.0 (69.0-71.0)",
        "-",
    ]
    assert "met " not in text


def test_an_incomplete_run_with_changes_says_so(page):
    git = {"commit": "0123456789abcdef", "uncommitted_changes": True}
    record = times(row("vitadapter_ops", "forward", 70.0), complete=False, git=git)
    text = page(h200=record)
    assert "`times-h200.json`, ended before it was complete: " in text
    assert "commit 012345678 with changes." in text


def test_a_page_that_is_behind_fails_the_check(page, capsys):
    page()
    document = Path(page.arguments[1])
    document.write_text(document.read_text().replace("not yet", "1.0"))
    assert table.main([*page.arguments, "--check"]) == 1
    assert "is not up to date: run python -m benchmarks.gpu.table" in capsys.readouterr().out
    assert "not yet" not in document.read_text()  # a check writes nothing
    assert table.main(page.arguments) == 0
    assert "not yet" in document.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "expected schema 1 of gpu-times, got 2 of gpu-times"),
        ({"benchmark": "op"}, "expected schema 1 of gpu-times, got 1 of op"),
        ({"machine": {"gpu": None}}, "these are times of no GPU"),
        (
            {"rows": [row("vitadapter_ops", "sideways", 1.0)]},
            "expected a pass of forward, backward",
        ),
        ({"rows": [{"case": "x"}]}, "a row differs in dtype"),
    ],
)
def test_files_that_hold_no_such_times_are_refused(page, capsys, change, message):
    page()
    (Path(page.arguments[3]) / "times-x.json").write_text(json.dumps(times(**change)))
    assert table.main(page.arguments) == 2
    error = capsys.readouterr().err
    assert "times-x.json" in error
    assert message in error


@pytest.mark.parametrize("text", ["", "{begin}\n", "{end}\n{begin}\n", "{begin}\n{end}\n{begin}\n"])
def test_a_page_without_its_markers_is_refused(page, capsys, text):
    begin, end = table.markers("times")
    Path(page.arguments[1]).write_text(text.format(begin=begin, end=end))
    assert table.main(page.arguments) == 2
    assert "expected the line <!-- " in capsys.readouterr().err


# --- predictions --------------------------------------------------------------------------------


def test_predictions_in_the_repository_are_what_is_computed():
    assert json.loads(predictions.FILE.read_text()) == predictions.record()


def test_every_part_of_every_decisive_shape_is_predicted():
    rows = predictions.record()["rows"]
    found = {(each["card"], each["case"], each["dtype"], each["part"]) for each in rows}
    assert found == {
        (card.kind, name, dtype, part)
        for card in CARDS
        for name in DECISIVE
        for dtype in SIZES
        for part in PARTS
        if (dtype, part) != ("fp32", "cast")
    }
    assert len(rows) == len(found)
    assert {each["basis"] for each in rows} <= set(BASIS)
    assert set(DECISIVE) <= set(BY_NAME)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("encoder-800x1333", (83, 89), (242, 211)),
        ("injector-B-512-x2", (5, 5), (14, 12)),
        ("extractor-B-512-x2", (15, 10), (33, 23)),
        ("dinov3-L-896", (60, 43), (134, 94)),
    ],
)
def test_issue_slots_are_those_counted_for_whole_kernels(name, forward, backward):
    for number, dtype in enumerate(SIZES):
        work = Work(BY_NAME[name], dtype)
        for which, loop, expected in (
            ("forward", work.loops.forward / 2, forward),
            ("backward", work.loops.backward, backward),
        ):
            micros = 1e6 * work.warps * work.instructions(which, loop) / ISSUED
            assert micros == pytest.approx(expected[number], rel=0.06, abs=0.6)
            found = predictions.gather(work, which, loop)["issue"]
            assert found * REACHED * 1e6 == pytest.approx(micros)


def test_bytes_of_a_shape_are_those_of_its_inputs():
    case = BY_NAME["injector-B-512-x2"]
    inputs = case.inputs()
    for dtype, size in SIZES.items():
        work = Work(case, dtype)
        assert work.value == inputs.value.numel()
        points = inputs.sampling_locations.numel() + inputs.attention_weights.numel()
        assert work.points == size * points
        assert work.out == size * case.batch * case.queries * case.heads * case.channels
        assert work.corners == 4 * inputs.attention_weights.numel()


def test_memory_alone_differs_between_the_cards():
    work = Work(BY_NAME["decoder-800x1333"], "bf16")
    h100, h200 = CARDS
    seconds = [predictions.predict(work, card, "zeros")[0] - predictions.GAP for card in CARDS]
    assert seconds[0] / seconds[1] == pytest.approx(h200.memory / h100.memory)
    small = Work(BY_NAME["extractor-B-512-x2"], "bf16")
    assert predictions.predict(small, h100, "zeros") == predictions.predict(small, h200, "zeros")


def test_targets_speak_of_shapes_that_are_timed():
    for held_to in targets.GPU_TARGETS.values():
        for target in held_to:
            each = [targets.Measured(name, name, "bf16", "forward", "x", {}) for name in DECISIVE]
            names = [m.case for m in each if targets.fnmatch.fnmatch(m.case, target.cases)]
            assert names, target.cases


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: None,
        lambda record: {k: v for k, v in record.items() if k != "rows"},
        lambda record: {k: v for k, v in record.items() if k != "git"},
        lambda record: {**record, "machine": None},
        lambda record: {**record, "rows": [{**row("vitadapter_ops", "forward", 2.0), "us": 0.0}]},
        lambda record: {**record, "rows": [row("vitadapter_ops", "forward", float("nan"))]},
        lambda record: {**record, "rows": [{**row("vitadapter_ops", "forward", 2.0), "us": "2"}]},
        lambda record: {**record, "rows": [row("x", "", None, note="<!-- end of times -->")]},
    ],
)
def test_odd_results_are_refused_in_one_line(tmp_path, capsys, change):
    (tmp_path / "times-h200.json").write_text(json.dumps(change(times())))
    assert table.main(["--results", str(tmp_path), "--check"]) == 2
    said = capsys.readouterr().err
    assert "times-h200.json" in said
    assert said.count("\n") == 1
