# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/ceilings.py and the program that it builds: code, results, and ways to fail."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.gpu import ceilings
from benchmarks.gpu.ceilings import Ceiling
from benchmarks.op.bandwidth import NotMeasured
from optional import require_cuda

try:
    NVCC = ceilings._nvcc()
except NotMeasured:
    NVCC = None
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="runs shell scripts")

FOOTPRINTS = (4, 22, 45, 91)


def document():
    """What the program prints on a GPU of sm_90, with made-up rates."""
    results = []

    def add(name, unit, value, **parameters):
        each = {"name": name, "unit": unit, "value": value, "median": value * 0.9}
        results.append({**each, "parameters": parameters})

    for mib in (22, 45, 91, 1024):
        add("copy", "GB/s", 4000 - mib, mib=mib)
        add("memset", "GB/s", 3000 - mib, mib=mib)
    for mib in FOOTPRINTS:
        for row_bytes in (64, 128):
            for kib in (0, 8, 32, 256):
                window = kib * 1024 // row_bytes
                add("gather", "GB/s", 20000, mib=mib, row_bytes=row_bytes, window=window)
        for name, row_bytes in (("red.v4.f32", 128), ("red.v4.bf16x2", 64), ("red.u64", 256)):
            for window in (0, 800):
                add(name, "GB/s", 2500 + mib, mib=mib, row_bytes=row_bytes, window=window)
    for name, rate in (("mma.m16n8k16 bf16", 612.5), ("fma fp32", 60.25)):
        add(name, "TFLOP/s", rate)
        add(name, "per clock", 3.98)
        add(name, "GHz", 1.755)
    device = {"name": "some GPU", "compute_capability": "9.0", "multiprocessors": 132}
    return {"device": {**device, "l2_mib": 50}, "ceilings": results}


def program(folder, script):
    """A program that a shell runs in the place of the compiled one."""
    path = folder / "ceilings-script"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request, tmp_path_factory):
    """(architecture, ptxas's report, machine code of each kernel)."""
    if NVCC is None:
        pytest.skip("needs nvcc")
    output = tmp_path_factory.mktemp("ceilings") / "ceilings.cubin"
    command = [NVCC, "-cubin", "-O3", "-std=c++17", f"-arch={request.param}", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", str(ceilings.SOURCE), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="needs triton's disassembler")
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    text = subprocess.run(
        [str(tool), "-sass", str(output)], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"Function : (\S+)", text)
    return request.param, done.stderr, dict(zip(parts[1::2], parts[2::2], strict=True))


def code_of(kernels, name):
    (code,) = [code for kernel, code in kernels.items() if name in kernel]
    return code


def test_compiles_without_warnings_or_spills(compiled):
    _, report, kernels = compiled
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(frames) == len(kernels) == 8
    assert set(frames) == {("0", "0")}


@pytest.mark.parametrize(
    ("kernel", "instruction", "newer"),
    [
        ("10FourFloats", r"REDG?\.E\.ADD\.F32x4", True),
        ("11EightHalves", r"REDG?\.E\.ADD\.BF16x8", True),
        ("8OneFloat", r"REDG?\.E\.ADD\.F32\.", False),
        ("10OneInteger", r"REDG?\.E\.ADD\.64", False),
        ("17multiply_matrices", r"HMMA\.16816\.F32\.BF16", False),
        ("16multiply_and_add", r"FFMA", False),
    ],
)
def test_kernels_are_made_of_what_they_measure(compiled, kernel, instruction, newer):
    arch, _, kernels = compiled
    found = re.findall(instruction, code_of(kernels, kernel))
    # Unrolled; for what sm_80 has not, nothing is compiled and nothing measured.
    assert (len(found) >= 4) == (not newer or arch == "sm_90"), found
    assert bool(found) == (not newer or arch == "sm_90")


@pytest.mark.parametrize("kernel", ["6gatherILi4E", "6gatherILi8E"])
def test_gathers_keep_eight_loads_in_flight(compiled, kernel):
    instructions = re.findall(r"/\*[0-9a-f]{4}\*/\s+([^;]*);", code_of(compiled[2], kernel))
    loads = [i for i, text in enumerate(instructions) if "LDG.E.128" in text]
    assert len(loads) == 8
    waited_for = set()  # registers with what was loaded
    for text in instructions[loads[0] : loads[-1] + 1]:
        target, *sources = map(int, re.findall(r"\bR(\d+)", text))
        assert not waited_for & set(sources), text
        if "LDG" in text:
            waited_for |= set(range(target, target + 4))


@needs_nvcc
def test_the_program_is_built_once(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    built = ceilings.build(folder, (9, 0))
    assert re.fullmatch(r"ceilings-sm_90-[0-9a-f]{8}", built.name)
    assert os.listdir(folder) == [built.name]
    assert os.access(built, os.X_OK)
    # As copied from elsewhere, where there is no compiler.
    monkeypatch.setattr(ceilings, "_nvcc", lambda: pytest.fail("compiled again"))
    built.chmod(0o644)
    assert ceilings.build(folder, (9, 0)) == built
    assert os.access(built, os.X_OK)
    if not torch.cuda.is_available():
        with pytest.raises(NotMeasured, match=r"exit status 1: ceilings: cudaSetDevice\(0\)"):
            ceilings.measure(built)


def test_a_program_for_another_gpu_or_of_another_source_is_not_used(tmp_path, monkeypatch):
    def no_nvcc():
        raise NotMeasured("no nvcc")

    monkeypatch.setattr(ceilings, "_nvcc", no_nvcc)
    source = tmp_path / "ceilings.cu"
    source.write_bytes(ceilings.SOURCE.read_bytes())
    monkeypatch.setattr(ceilings, "SOURCE", source)
    present = ceilings.program_in(tmp_path, (9, 0))
    present.touch()
    assert ceilings.build(tmp_path, (9, 0)) == present
    with pytest.raises(NotMeasured, match="no nvcc"):
        ceilings.build(tmp_path, (8, 0))
    source.write_text("changed")
    with pytest.raises(NotMeasured, match="no nvcc"):
        ceilings.build(tmp_path, (9, 0))


@needs_nvcc
def test_a_failed_compilation_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "broken.cu"
    source.write_text("int main() { return missing; }\n")
    monkeypatch.setattr(ceilings, "SOURCE", source)
    with pytest.raises(NotMeasured, match=r'nvcc failed with exit status \d+: .*"missing"'):
        ceilings.build(tmp_path / "out", (9, 0))
    assert os.listdir(tmp_path / "out") == []


def test_without_nvcc_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(NotMeasured, match="needs nvcc, which is neither on PATH nor in CUDA_HOME"):
        ceilings.build(tmp_path, (9, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_built(tmp_path, capsys):
    with pytest.raises(NotMeasured, match="sees no GPU to measure"):
        ceilings.build(tmp_path)
    assert ceilings.main([str(tmp_path)]) == 1
    assert "ceilings: torch" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@POSIX
def test_what_the_program_prints_is_measured(tmp_path):
    (tmp_path / "document.json").write_text(json.dumps(document()))
    got = ceilings.measure(program(tmp_path, f"cat {tmp_path}/document.json"))
    assert len(got) == len(document()["ceilings"])
    assert got[0] == Ceiling("copy", "GB/s", 3978, 3978 * 0.9, {"mib": 22})


@POSIX
@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "echo 'ceilings: no memory' >&2; exit 1",
            "exit status 1: ceilings: no memory$",
        ),
        ("exit 3", "failed with exit status 3$"),
        ("kill -9 $$", "ended by signal 9$"),
        ("exec sleep 30", "ended after 1 s"),
        ("echo nothing", "printed no ceilings"),
    ],
)
def test_a_program_that_fails_says_why(tmp_path, script, why):
    with pytest.raises(NotMeasured, match=why):
        ceilings.measure(program(tmp_path, script), 1)


def test_a_program_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(NotMeasured, match="missing does not start"):
        ceilings.measure(tmp_path / "missing")


def with_result(**changes):
    changed = document()
    changed["ceilings"][0].update(changes)
    return json.dumps(changed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"ceilings": []}',
        '{"ceilings": [{"name": "copy"}]}',
        json.dumps(document())[:-200],
        with_result(value=0),
        with_result(value=None),
        with_result(median=float("nan")),
        with_result(value="much"),
        with_result(parameters=None),
        with_result(extra=1),
    ],
)
def test_other_documents_are_refused(text):
    with pytest.raises(NotMeasured, match="printed no ceilings"):
        ceilings.parse(text)


def shown(rates):
    console = Console(file=io.StringIO(), width=100)
    ceilings.show(console, rates)
    return console.file.getvalue()


def test_the_table_has_a_column_for_each_footprint():
    text = shown(ceilings.parse(json.dumps(document())))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("4 MiB 22 MiB 45 MiB 91 MiB 1024 MiB") for line in lines)
    for line in (
        "copy - 3978 3955 3909 2976",
        "gather, 64 B, anywhere 20000 20000 20000 20000 -",
        "gather, 128 B, among 64 rows 20000 20000 20000 20000 -",
        "red.v4.f32, 128 B, among 800 rows 2504 2522 2545 2591 -",
        "mma.m16n8k16 bf16: 612 TFLOP/s, 3.98 per clock, 1.75 GHz",
        "fma fp32: 60.2 TFLOP/s, 3.98 per clock, 1.75 GHz",
    ):
        assert line in lines, text
    assert len(lines) <= 30


def test_a_card_without_vector_reductions_has_no_rows_for_them():
    rates = ceilings.parse(json.dumps(document()))
    older = [each for each in rates if not each.name.startswith("red.v4")]
    assert "red.v4" not in shown(older)
    assert "red.u64" in shown(older)


def test_the_record_says_where_it_was_measured():
    record = ceilings.record(ceilings.parse(json.dumps(document())), torch.device("cpu"))
    assert set(record) == {
        *("schema", "benchmark", "date", "machine", "versions", "git", "ceilings")
    }
    assert record["ceilings"] == document()["ceilings"]


@needs_nvcc
def test_the_command_builds_for_another_machine(tmp_path, capsys):
    assert ceilings.main([str(tmp_path), "--build-for", "8.0"]) == 0
    (path,) = tmp_path.iterdir()
    assert capsys.readouterr().out.strip() == str(path)


@pytest.mark.parametrize("text", ["9", "sm_90", "9.0a", ""])
def test_the_command_refuses_what_is_no_capability(tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        ceilings.main([str(tmp_path), "--build-for", text])
    assert "expected a compute capability like 9.0" in capsys.readouterr().err


@pytest.mark.gpu
def test_ceilings_of_this_gpu(tmp_path):
    require_cuda()
    rates = ceilings.measure(ceilings.build(tmp_path))
    names = {each.name for each in rates}
    assert {"copy", "memset", "gather", "red.f32", "red.u64", "fma fp32"} <= names
    assert ("red.v4.f32" in names) == (torch.cuda.get_device_capability() >= (9, 0))
    assert all(each.median <= each.value for each in rates)
    assert shown(rates)
