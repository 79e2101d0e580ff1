# SPDX-License-Identifier: Apache-2.0
"""Lists that csrc holds once: Python, the units of the build and the documentation agree with them.

And a dtype that is on the list, but that some kernel cannot read, does not compile.
"""

import itertools
import os
import re
import shutil
import subprocess

import pytest
import torch

import children
import native
from vitadapter_ops import (
    BackendUnavailable,
    _build,
    _extension,
    available_backends,
    ms_deform_attn,
)
from vitadapter_ops.compat import _common
from vitadapter_ops.testing import cases

CSRC = _extension.source_dir()
CXX = os.environ.get("CXX", "c++")
PAIRS = native.dtype_pairs()
VALUES = {value for value, _ in PAIRS.values()}
OTHERS = {torch.int32, torch.complex64, torch.float8_e4m3fn}


def test_the_cases_have_every_pair_of_dtypes():
    assert cases.DTYPES == PAIRS


@pytest.mark.parametrize("op", ["ms_deform_attn", "ms_deform_attn_reference"])
def test_operators_take_these_pairs_and_no_others(op):
    if op == "ms_deform_attn" and "cpu" not in available_backends():
        pytest.skip("needs the CPU library")
    taken = set()
    for value, points in itertools.product(sorted(VALUES | OTHERS, key=str), repeat=2):
        locations = torch.full((1, 1, 1, 1, 1, 2), 0.5).to(points)
        given = torch.ones(1, 1, 1, 1).to(value), [1, 1], [0], locations, locations[..., 0]
        try:
            getattr(torch.ops.vitadapter_ops, op)(*given)
            taken.add((value, points))
        except ValueError as error:
            text = str(error).replace("\n", " ")
            assert re.match(r"(value|sampling_locations): expected dtype .*, got \w+", text), text
    assert taken == {*PAIRS.values()}


def test_triton_knows_the_dtypes_of_value():
    pytest.importorskip("triton")
    from vitadapter_ops.triton import launch

    assert {*launch._TYPES} == VALUES


def test_drop_ins_widen_points_to_what_has_kernels():
    narrow = {dtype for dtype in VALUES if dtype.itemsize < 4}
    for value, points in itertools.product(VALUES, narrow):
        widened = _common.widened(torch.ones(1, dtype=value), torch.ones(1, dtype=points))
        assert (value, widened.dtype) in PAIRS.values()


def test_each_pair_has_its_units():
    units = {path.relative_to(CSRC).as_posix(): path.read_text() for path in CSRC.rglob("*.cu")}
    assert {file for file in _build.SOURCES["cuda"] if file.endswith(".cu")} == {*units}
    compiled = [
        (direction.lower(), pair, file)
        for file, text in units.items()
        for direction, pair in re.findall(r"^VITADAPTER_(\w+)\((\w+)\);$", text, re.MULTILINE)
    ]
    assert sorted(compiled) == sorted(
        (direction, pair, f"cuda/{pair if pair == 'fp64' else f'{direction}_{pair}'}.cu")
        for direction in ("forward", "backward")
        for pair in PAIRS
    )


def test_the_documentation_has_the_head_widths():
    text = " ".join((children.ROOT / "docs" / "cuda.md").read_text().split())
    (listed,) = re.findall(r"D = ([\d, ]+ and \d+) have kernels of their own", text)
    assert [int(number) for number in re.findall(r"\d+", listed)] == native.head_dims()


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_python_knows_the_limit_of_levels(backend):
    if "cpu" not in available_backends():
        pytest.skip("needs the CPU library")

    def call(levels):
        points = torch.full((1, 1, 1, levels, 1, 2), 0.5)
        value = torch.ones(1, levels, 1, 1)
        return ms_deform_attn(value, [(1, 1)] * levels, points, points[..., 0], backend=backend)

    most = native.max_levels()
    call(most)
    if backend == "auto":
        call(most + 1)  # by the reference
    else:
        with pytest.raises(BackendUnavailable, match=f"at most {most} levels, got {most + 1}"):
            call(most + 1)


# A dtype of value that is added to the list alone; then to storage.h, but to no load of a vector.
STORED = """
struct tiny { uint8_t bits; };
template <> struct Accumulator<tiny> { using type = float; };
VITADAPTER_HD float to_acc(tiny v) { return v.bits; }
VITADAPTER_HD void from_acc(float v, tiny& out) { out.bits = static_cast<uint8_t>(v); }
"""


@pytest.mark.parametrize(
    ("stored", "error"),
    [
        (None, None),
        ("using tiny = uint8_t;", r"incomplete type .*Accumulator<unsigned char>"),
        (STORED, r"no matching function for call to .*load"),
    ],
    ids=["as it is", "only on the list", "without loads"],
)
def test_a_dtype_that_a_kernel_cannot_read_does_not_compile(tmp_path, stored, error):
    if shutil.which(CXX) is None:
        pytest.skip("needs a C++ compiler")
    shutil.copytree(CSRC, tmp_path / "csrc")
    if stored is not None:
        path = tmp_path / "csrc" / "storage.h"
        head, end, tail = path.read_text().rpartition("}  // namespace vitadapter")
        path.write_text(head + stored + end + tail)
        path = tmp_path / "csrc" / "dtypes.h"
        first = "DTYPE_PAIRS(X)"
        text = path.read_text()
        assert text.count(first) == 1
        path.write_text(text.replace(first, f"{first} X(tiny_pair, tiny, float, Char, Float)"))
    unit = tmp_path / "csrc" / "cpu" / "kernels_baseline.cpp"
    done = subprocess.run(
        [CXX, "-std=c++17", "-fsyntax-only", str(unit)],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    if error is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert re.search(error, done.stderr), done.stderr[:2000]


def test_a_unit_of_a_pair_that_is_not_on_the_list_does_not_compile(tmp_path):
    if shutil.which(CXX) is None:
        pytest.skip("needs a C++ compiler")
    for pair, compiles in (("bf16", True), ("fp8", False)):
        unit = tmp_path / "unit.cpp"
        unit.write_text(f'#include "dtypes.h"\nvitadapter::dtypes::{pair}::value_t number;\n')
        command = [CXX, "-std=c++17", "-fsyntax-only", f"-I{CSRC}", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) == compiles, done.stderr
