# SPDX-License-Identifier: Apache-2.0
"""Every way to install works, and every way to have no kernel is survived and explained.

Each wheel is built from a copy of the sources, unpacked into an empty folder and used from there
by a process that cannot see the checkout.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

from vitadapter_ops import _build, _extension

ROOT = Path(__file__).parents[2]
SOURCES = (
    "csrc",
    "vitadapter",
    "vitadapter_ops",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"
)
needs_checkout = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the checkout's setup.py"
)

# Imports, trains a step and says what ran.
TRAIN = """
import torch, vitadapter, vitadapter_ops
module = vitadapter_ops.MSDeformAttn(d_model=16, n_levels=1, n_heads=2)
out = module(torch.randn(2, 5, 16), torch.rand(2, 5, 1, 2), torch.randn(2, 12, 16), [(3, 4)])
out.square().sum().backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
from vitadapter.analysis.counting import count
assert count(torch.nn.Conv2d(3, 4, 1), (8, 8)).params == 16
print("backends:", vitadapter_ops.available_backends())
print(vitadapter_ops.explain_backend())
"""


def environment(site: Path, **changes: str) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("VITADAPTER", "TORCH_EXT"))}
    return {**keep, "PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1", **changes}


def python(code: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def wheel(folder: Path, env: dict[str, str]) -> Path:
    """Builds a wheel from a copy of the sources."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        origin = ROOT / name
        if origin.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(origin, source / name, ignore=ignore)
        elif origin.exists():
            shutil.copy(origin, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), "."],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def pure_site(tmp_path_factory) -> Path:
    """What `pip install .` leaves: in its isolated build environment torch cannot be imported."""
    folder = tmp_path_factory.mktemp("pure")
    (folder / "no_torch").mkdir()
    (folder / "no_torch" / "torch.py").write_text("raise ImportError('no torch here')\n")
    path = wheel(folder, environment(folder / "no_torch"))
    assert path.name.endswith("-py3-none-any.whl")
    site = folder / "site"
    zipfile.ZipFile(path).extractall(site)
    return site


@pytest.fixture
def no_compiler(tmp_path) -> str:
    """A PATH without any program."""
    folder = tmp_path / "empty-path"
    folder.mkdir()
    return str(folder)


@needs_checkout
def test_pure_wheel_carries_the_kernels_source(pure_site):
    packaged = {
        p.relative_to(pure_site / "vitadapter_ops" / "csrc")
        for p in (pure_site / "vitadapter_ops" / "csrc").rglob("*")
        if p.is_file()
    }
    expected = {p.relative_to(ROOT / "csrc") for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert packaged == expected
    assert (pure_site / "vitadapter_ops" / "py.typed").exists()


@needs_checkout
def test_trains_with_neither_compiler_nor_triton(pure_site, no_compiler, tmp_path):
    code = "import sys; sys.modules['triton'] = None\n" + TRAIN
    env = environment(pure_site, PATH=no_compiler, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    text = python(code, tmp_path, env).stdout
    assert "backends: ['reference']" in text
    assert "reference  chosen by auto" in text
    assert "cpu        cannot run: its library is not available: no C++ compiler" in text


@needs_checkout
@needs_compiler
def test_jit_builds_once_says_so_and_is_cached(pure_site, tmp_path):
    env = environment(pure_site, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    first = python(TRAIN, tmp_path, env)
    assert "chosen by auto (JIT library" in first.stdout
    assert "compiling the cpu kernels for this machine, once" in first.stderr
    assert "compiled in" in first.stderr
    second = python(TRAIN, tmp_path, env)
    assert "chosen by auto (JIT library" in second.stdout
    assert "compil" not in second.stderr


@needs_checkout
@needs_compiler
def test_jit_finds_pips_ninja_without_an_activated_environment(pure_site, tmp_path):
    pytest.importorskip("ninja")
    folder = tmp_path / "bin"
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*"):
            link = folder / program.name
            if not program.name.startswith(("ninja", "python")) and not link.exists():
                link.symlink_to(program)
    env = environment(pure_site, PATH=str(folder), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert "chosen by auto (JIT library" in python(TRAIN, tmp_path, env).stdout


@needs_checkout
@needs_compiler
def test_failed_build_is_remembered_and_the_reference_serves(pure_site, tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text('#!/bin/sh\necho "this compiler is broken" >&2\nexit 1\n')
    compiler.chmod(0o755)
    env = environment(pure_site, CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    done = python(TRAIN, tmp_path, env)
    assert "backends: ['reference']" in done.stdout
    assert "compiling failed" in done.stdout
    assert done.stderr.count("compiling the cpu kernels") == 1


@needs_checkout
@needs_compiler
def test_broken_prebuilt_library_is_replaced_and_reported(pure_site, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(pure_site, site)
    (site / "vitadapter_ops" / "_cpu.abi3.so").write_bytes(b"not a library")
    env = environment(site, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    text = python(TRAIN, tmp_path, env).stdout
    assert "chosen by auto (JIT library" in text
    assert "_cpu.abi3.so does not load" in text


@needs_checkout
@needs_compiler
def test_prebuilt_wheel_holds_a_library_without_python_symbols(tmp_path):
    env = environment(tmp_path / "nothing", MAX_JOBS="2")
    env.pop("PYTHONPATH")
    if CUDA_HOME is not None and torch.version.cuda is not None:
        env["TORCH_CUDA_ARCH_LIST"] = "9.0"  # one architecture is enough to test the packaging
    path = wheel(tmp_path, env)
    assert "-cp310-abi3-" in path.name
    site = tmp_path / "site"
    zipfile.ZipFile(path).extractall(site)
    env = environment(site, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    done = python(TRAIN, tmp_path, env)
    assert "chosen by auto (prebuilt library" in done.stdout
    assert "compil" not in done.stderr
    libraries = list((site / "vitadapter_ops").glob("_c*.so"))
    assert libraries
    if shutil.which("nm"):
        for library in libraries:
            symbols = subprocess.run(
                ["nm", "-D", str(library)], capture_output=True, text=True, check=True
            ).stdout
            assert not [s for s in symbols.splitlines() if s.split()[-1].startswith(("Py", "_Py"))]


@needs_checkout
def test_cuda_library_is_built_loads_and_registers_without_a_gpu(monkeypatch):
    why_not = _build.why_no_cuda_build(torch.version.cuda, CUDA_HOME)
    if why_not is not None:
        pytest.skip(why_not)
    if not torch.cuda.is_available() and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    library = _extension.load("cuda")
    assert library.origin is not None, library.error
    for op in ("ms_deform_attn", "ms_deform_attn_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vitadapter_ops::{op}", "CUDA")


def test_module_prints_what_works_here():
    done = subprocess.run(
        [sys.executable, "-m", "vitadapter_ops"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "available backends:" in done.stdout
    assert "chosen by auto" in done.stdout
