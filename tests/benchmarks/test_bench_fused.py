# SPDX-License-Identifier: Apache-2.0
"""benchmarks.op.fused: both ways compute the same, what it counts is so, and it tells the truth."""

import dataclasses
import json

import pytest
import torch

from benchmarks.common.memory import Peak
from benchmarks.op import fused, numerics
from vitadapter_ops.testing import cases
from vitadapter_ops.testing.tolerances import ROUNDED_ONCE_FACTOR, assert_same_definition

CASE = dataclasses.replace(
    cases.fused(cases.vit_adapter("S", 64)[0]), name="small", heads=2, channels=8
)
RUN = ["--device", "cpu", "--rounds", "1"]


def assert_all_same(one, other):
    """Of tensors in fp64, or of the tensors of two steps."""
    if isinstance(one, torch.Tensor):
        one, other = [one], [other]
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert_same_definition(f"result {number}", a, b)


@pytest.mark.parametrize("which", fused.PASSES)
def test_both_ways_compute_the_same(which):
    results = []
    for method in fused.METHODS:
        torch.manual_seed(0)
        results.append(fused.prepare(CASE, method, which, torch.float64, "cpu")())
    assert_all_same(*results)


@pytest.mark.parametrize("which", fused.PASSES)
def test_one_product_computes_what_two_do(which):
    results = []
    for together in (False, True):
        torch.manual_seed(0)
        results.append(fused.prepare_products(CASE, together, which, "cpu", torch.float64)())
    assert_all_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", fused.METHODS)
def test_kept_bytes_are_those_of_the_saved_tensors(method, dtype):
    step = fused.prepare(CASE, method, fused.PASSES[1], dtype, "cpu")
    value = step.args[1][0]
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() != value.data_ptr():
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    assert sum(kept.values()) == fused.counted(CASE, dtype, method)[0]


def test_accuracy_tells_the_methods_apart():
    row = numerics.accuracy(167, "cpu")
    assert row["fused"] <= ROUNDED_ONCE_FACTOR * row["once"]
    assert row["native"] > 10 * row["once"]
    # A normalised location of 8 bits on 167 pixels: a fifth of a pixel, more than one at worst.
    mean, largest = row["native_pixels"]
    assert 0.1 < mean < 0.4
    assert 1.0 < largest < 4.0


def test_command_writes_what_it_prints(tmp_path, capsys):
    assert fused.main([*RUN, "--cases", "injector-S-51?", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "fused-cpu.json").read_text())
    assert [row["pass"] for row in record["speed"]] == list(fused.PASSES)
    assert all(row["speed_up"] > 0 and row["memory_share"] > 0 for row in record["speed"])
    assert [row["pass"] for row in record["products"]] == list(fused.PASSES)
    text = capsys.readouterr().out
    assert "injector-S-512" in text
    assert "error at most" in text


def test_every_dtype_has_its_table_and_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fused, "BENCH", (CASE,))
    monkeypatch.setattr(fused, "peak_in_child", lambda *args, **options: Peak("ok", 1 << 20))
    assert fused.main([*RUN, "--dtype", "bf16", "fp16", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "fused-cpu.json").read_text())
    assert [(row["dtype"], row["pass"]) for row in record["speed"]] == [
        (dtype, which) for dtype in ("bf16", "fp16") for which in fused.PASSES
    ]
    text = capsys.readouterr().out
    for dtype in ("bf16", "fp16"):
        assert f"From offsets and logits to the output, {dtype}, ms" in text


def test_wrong_results_are_not_timed(tmp_path, capsys, monkeypatch):
    def wrong(case, dtypes, backend, device):
        assert dtypes != "bf16", "output: error 1"

    monkeypatch.setattr(fused.gate, "check_offsets_backend", wrong)
    monkeypatch.setattr(fused, "take_turns", lambda *args, **options: pytest.fail("timed"))
    assert fused.main([*RUN, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "the results are wrong: three-levels, bf16: output: error 1" in printed
    assert list(tmp_path.iterdir()) == []


def test_verdicts_name_what_is_missed():
    good = {"pass": "forward", "case": "a", "speed_up": 2.0, "memory_share": 0.5}
    bad = {"pass": "forward + backward", "case": "b", "speed_up": 1.1, "memory_share": 0.7}
    record = {"speed": [good, bad], "accuracy": [{"fused": 1.0, "once": 1.0}]}
    states = [line.split(":")[0] for line in fused.verdicts(record)]
    assert states == ["met", "met", "missed", "missed", "met"]


def test_unknown_shape_is_refused(capsys):
    with pytest.raises(SystemExit):
        fused.main(["--cases", "nothing"])
    assert "--cases: 'nothing' names none of injector-S-512" in capsys.readouterr().err


def test_distances_are_printed_for_the_dtypes_asked_for(capsys):
    assert numerics.main(["--dtype", "fp16"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2].strip() for row in rows] == ["fp16"] * len(numerics.WIDTHS)
    # Ours rounds the offset alone, the others the location: that is worse on every map, and in 16
    # bits, computed as well, worst.
    for row in rows:
        rounded, computed, ours = (float(cell.split("/")[0]) for cell in row[3:6])
        assert ours < rounded < computed
