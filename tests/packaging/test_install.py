# SPDX-License-Identifier: Apache-2.0
"""Every way to install works, and every way to have no kernel is survived and explained.

A source distribution is made of a copy of the checkout, the wheels are built from what it holds,
and each is used from an empty folder by a process that cannot see the checkout. Most of these tests
compile kernels that take seconds; those that are shipped take minutes and are `exhaustive`.
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

from once import once
from vitadapter_ops import _build, _extension

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"
)
needs_checkout = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the checkout's setup.py"
)
every_kernel = pytest.mark.parametrize(
    "kernels", ["quick", pytest.param("shipped", marks=pytest.mark.exhaustive)]
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


def wheel(source: Path, env: dict[str, str]) -> Path:
    """Builds a wheel in a folder of sources."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", "dist", "."], cwd=source, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = source.glob("dist/*.whl")
    return path


def unpack(wheel: Path, site: Path) -> Path:
    zipfile.ZipFile(wheel).extractall(site)
    return site


def make_quick(build: Path, csrc: Path) -> None:
    """Leaves the kernels of one instruction set, and the optimiser out."""
    for path in csrc.rglob("*"):
        if path.is_file():
            path.write_text(path.read_text().replace("defined(__x86_64__)", "0"))
    with build.open("a") as file:
        file.write("\nCXX_FLAGS[CXX_FLAGS.index('-O3')] = '-O0'\n")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution of a checkout in which builds and runs have left files."""

    def build(folder: Path) -> None:
        checkout = folder / "checkout"
        ignore = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "dist", "out")
        shutil.copytree(ROOT, checkout, ignore=ignore)
        for left in (
            "benchmarks/out/op-cpu.json",
            "build/lib/vitadapter/old.py",
            "tests/__pycache__/conftest.pyc",
            "vitadapter_ops/_cpu.abi3.so",
        ):
            (checkout / left).parent.mkdir(parents=True, exist_ok=True)
            (checkout / left).touch()
        code = "from setuptools.build_meta import build_sdist; build_sdist('..')"
        python(code, checkout, environment(folder / "nothing"))
        (archive,) = folder.glob("vitadapter-*.tar.gz")
        shutil.unpack_archive(archive, folder, filter="data")
        (folder / archive.name.removesuffix(".tar.gz")).rename(folder / "source")

    return once(tmp_path_factory, "sdist", build) / "source"


@pytest.fixture(scope="session")
def pure_site(tmp_path_factory, sdist) -> Path:
    """What `pip install .` leaves: in its isolated build environment torch cannot be imported."""

    def build(folder: Path) -> None:
        shutil.copytree(sdist, folder / "source")
        (folder / "no_torch").mkdir()
        (folder / "no_torch" / "torch.py").write_text("raise ImportError('no torch here')\n")
        path = wheel(folder / "source", environment(folder / "no_torch"))
        assert path.name.endswith("-py3-none-any.whl")
        unpack(path, folder / "site")

    return once(tmp_path_factory, "pure-wheel", build) / "site"


@pytest.fixture(scope="session")
def quick_site(tmp_path_factory, pure_site) -> Path:
    """The same with kernels that compile in seconds."""

    def build(folder: Path) -> None:
        shutil.copytree(pure_site, folder / "site")
        package = folder / "site" / "vitadapter_ops"
        make_quick(package / "_build.py", package / "csrc")

    return once(tmp_path_factory, "quick-wheel", build) / "site"


@pytest.fixture
def no_compiler(tmp_path) -> str:
    """A PATH without any program."""
    folder = tmp_path / "empty-path"
    folder.mkdir()
    return str(folder)


@needs_checkout
def test_sdist_holds_what_is_tracked(sdist):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git's list of files")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    packed = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    made = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert packed - made == tracked


@needs_checkout
def test_pure_wheel_holds_every_package_and_the_kernels_source(pure_site, tmp_path):
    def files(folder: Path) -> set[Path]:
        return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}

    def packages(folder: Path) -> set[Path]:
        return {p.relative_to(folder) for p in folder.glob("vitadapter*/**/__init__.py")}

    assert files(pure_site / "vitadapter_ops" / "csrc") == files(ROOT / "csrc")
    assert packages(pure_site) == packages(ROOT)
    assert all(
        (pure_site / name / "py.typed").exists() for name in ("vitadapter", "vitadapter_ops")
    )
    imports = ["import torch"] + [
        f"import {'.'.join(path.parent.parts)}" for path in packages(pure_site)
    ]
    python("\n".join(imports), tmp_path, environment(pure_site))


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
@every_kernel
def test_jit_builds_once_says_so_and_is_cached(kernels, pure_site, quick_site, tmp_path):
    site = quick_site if kernels == "quick" else pure_site
    env = environment(site, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    first = python(TRAIN, tmp_path, env)
    assert "chosen by auto (JIT library" in first.stdout
    assert "compiling the cpu kernels for this machine, once" in first.stderr
    assert "compiled in" in first.stderr
    second = python(TRAIN, tmp_path, env)
    assert "chosen by auto (JIT library" in second.stdout
    assert "compil" not in second.stderr


@needs_checkout
@needs_compiler
def test_jit_finds_pips_ninja_without_an_activated_environment(quick_site, tmp_path):
    pytest.importorskip("ninja")
    folder = tmp_path / "bin"
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*"):
            link = folder / program.name
            if not program.name.startswith(("ninja", "python")) and not link.exists():
                link.symlink_to(program)
    env = environment(quick_site, PATH=str(folder), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
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
def test_broken_prebuilt_library_is_replaced_and_reported(quick_site, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(quick_site, site)
    (site / "vitadapter_ops" / "_cpu.abi3.so").write_bytes(b"not a library")
    env = environment(site, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    text = python(TRAIN, tmp_path, env).stdout
    assert "chosen by auto (JIT library" in text
    assert "_cpu.abi3.so does not load" in text


@needs_checkout
@needs_compiler
@every_kernel
def test_prebuilt_wheel_holds_a_library_without_python_symbols(kernels, sdist, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(sdist, source)
    if kernels == "quick":
        make_quick(source / "vitadapter_ops" / "_build.py", source / "csrc")
    env = environment(tmp_path / "nothing", MAX_JOBS="2")
    env.pop("PYTHONPATH")
    if CUDA_HOME is not None and torch.version.cuda is not None:
        env["TORCH_CUDA_ARCH_LIST"] = "9.0"  # one architecture is enough to test the packaging
    path = wheel(source, env)
    assert "-cp310-abi3-" in path.name
    site = unpack(path, tmp_path / "site")
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
