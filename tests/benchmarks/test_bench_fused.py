# SPDX-License-Identifier: Apache-2.0
"""benchmarks.op.fused: both ways compute the same, what it counts is so, and it tells the truth."""

import dataclasses
import json

import pytest
import torch

from benchmarks.op import fused
from vitadapter_ops.testing import cases

CASE = dataclasses.replace(
    cases.fused(cases.vit_adapter("S", 64)[0]), name="small", heads=2, channels=8
)


@pytest.mark.parametrize("which", fused.PASSES)
def test_both_ways_compute_the_same(which):
    results = []
    for method in fused.METHODS:
        torch.manual_seed(0)
        results.append(fused.prepare(CASE, method, which, torch.float32, "cpu")())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", fused.PASSES)
def test_one_product_computes_what_two_do(which):
    results = []
    for together in (False, True):
        torch.manual_seed(0)
        results.append(fused.prepare_products(CASE, together, which, "cpu")())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


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
    row = fused.accuracy(167, "cpu")
    assert row["fused"] <= fused.MOST_ERROR * row["once"]
    assert row["native"] > 10 * row["once"]
    # A normalised location of 8 bits on 167 pixels: a fifth of a pixel, more than one at worst.
    mean, largest = row["native_pixels"]
    assert 0.1 < mean < 0.4
    assert 1.0 < largest < 4.0


def test_command_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "fused.json"
    assert fused.main(["--cases", "injector-S-512", "--repeats", "1", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert [row["pass"] for row in record["speed"]] == list(fused.PASSES)
    assert all(row["speed_up"] > 0 and row["memory_share"] > 0 for row in record["speed"])
    assert [row["pass"] for row in record["products"]] == list(fused.PASSES)
    text = capsys.readouterr().out
    assert "injector-S-512" in text
    assert "error at most" in text


def test_verdicts_name_what_is_missed():
    good = {"pass": "forward", "case": "a", "speed_up": 2.0, "memory_share": 0.5}
    bad = {"pass": "forward + backward", "case": "b", "speed_up": 1.1, "memory_share": 0.7}
    record = {"speed": [good, bad], "accuracy": [{"fused": 1.0, "once": 1.0}]}
    states = [line.split(":")[0] for line in fused.verdicts(record)]
    assert states == ["met", "met", "missed", "missed", "met"]


def test_unknown_shape_is_refused(capsys):
    with pytest.raises(SystemExit):
        fused.main(["--cases", "nothing"])
    assert "--cases: expected a part of one of" in capsys.readouterr().err
