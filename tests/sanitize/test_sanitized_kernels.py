# SPDX-License-Identifier: Apache-2.0
"""The CPU library passes its tests under AddressSanitizer and UndefinedBehaviorSanitizer.

A copy of the package whose flags ask for both is compiled as any JIT build is, and runs in a Python
into which the sanitizers' libraries are preloaded, so that torch's memory is watched too. That they
catch mistakes is tested: tensors that claim more memory than they have, and kernels with a mistake.

`make sanitize` does all of it, in minutes; otherwise the baseline kernels pass a part of the tests.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import children
import mutants
from once import once
from vitadapter_ops import _extension

# Compiling for the sanitizers takes a minute.
pytestmark = pytest.mark.exhaustive

EVERYTHING = os.environ.get("SANITIZE_EVERYTHING") == "1"
ISAS = children.ISAS if EVERYTHING else ("baseline",)
CXX = os.environ.get("CXX", "c++")
FLAGS = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined,float-cast-overflow",
    # AddressSanitizer sees both as they happen; to test for them again doubles the compile time.
    "-fno-sanitize=null,object-size",
    "-fno-sanitize-recover=all",
]
# libstdc++ beside them: the sanitizer looks for what throws exceptions before torch brings it.
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")


def runtimes() -> list[str]:
    """The libraries to preload, or a skip where the compiler has none."""
    if not sys.platform.startswith("linux") or shutil.which(CXX) is None:
        pytest.skip("needs Linux and a C++ compiler")
    paths = []
    for name in RUNTIMES:
        command = [CXX, f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        path = Path(done.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"{CXX} has no {name}")
        paths.append(str(path.resolve()))
    return paths


def copy_source(folder: Path, every_isa: bool) -> Path:
    """The package without prebuilt libraries; returns the folder of its kernels' source.

    The kernels of one instruction set compile in a third of the time.
    """
    package = folder / "vitadapter_ops"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "csrc")
    shutil.copytree(Path(_extension.__file__).parent, package, ignore=ignore)
    shutil.copytree(_extension.source_dir(), package / "csrc")
    if not every_isa:
        for path in (package / "csrc" / "cpu").glob("*.*"):
            path.write_text(path.read_text().replace("defined(__x86_64__)", "0"))
    return package / "csrc"


def compile_package(folder: Path, flags: list[str]) -> None:
    """Compiles the library of a copy with flags after its own."""
    with (folder / "vitadapter_ops" / "_build.py").open("a") as file:
        # The compiler, a child of the process that needs the preloaded libraries, does not.
        file.write(f"\nCXX_FLAGS += {flags!r}\n__import__('os').environ.pop('LD_PRELOAD', None)\n")
    code = "import vitadapter_ops as v; print(v.explain_backend())"
    done = children.python(["-c", code], folder, **environment(folder))
    assert "chosen by auto (JIT library" in done.stdout, done.stdout + done.stderr[-4000:]


def environment(folder: Path) -> dict[str, str]:
    """For a process that uses the copy in `folder`; the library stays there too."""
    return {
        "TORCH_EXTENSIONS_DIR": str(folder / "cache"),
        "LD_PRELOAD": " ".join(runtimes()),
        # Python keeps what it allocates until it exits.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the sanitized package, its library compiled."""
    runtimes()

    def build(folder: Path) -> None:
        copy_source(folder, every_isa=EVERYTHING)
        compile_package(folder, FLAGS)

    return once(tmp_path_factory, "sanitized", build)


# Left out: what is slow here, and in it nothing of the kernels that other tests do not have.
ONLY = f"{children.CPU_TESTS_ONLY} and not other_python_threads and not 1000"
FEWER = f"{ONLY} and not fp64 and not bf16 and not run_to_run"


@pytest.mark.parametrize("isa", ISAS)
def test_the_kernels_are_clean(site, isa):
    children.require_isa(isa)
    only = ONLY if EVERYTHING else FEWER
    done = children.pytest_on_cpu_kernels(only, site, VITADAPTER_CPU_ISA=isa, **environment(site))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "passed" in done.stdout


ARGUMENTS = ("value", "locations", "weights", "gradient")
# For each name, in a process forked off: a call in which the argument of this name is shorter than
# its shape says. numpy lets it.
LIES = """
import os, sys
import numpy, torch
from vitadapter_ops import _extension, ms_deform_attn
assert _extension.load("cpu").origin == "JIT", _extension.load("cpu")

def call(liar):
    def tensor(name, *shape):
        held = numpy.full(int(numpy.prod(shape)) - (name == liar), 0.5, numpy.float32)
        strides = numpy.empty(shape, numpy.float32).strides
        return torch.from_numpy(numpy.lib.stride_tricks.as_strided(held, shape, strides))
    value = tensor("value", 1, 16, 2, 19).requires_grad_()
    points = tensor("locations", 1, 50, 2, 1, 3, 2)
    points[0, 0] = 0.875  # the last pixel
    weights = tensor("weights", 1, 50, 2, 1, 3)
    out = ms_deform_attn(value, [(4, 4)], points, weights, backend="cpu")
    print("forward done", file=sys.stderr)
    out.backward(tensor("gradient", 1, 50, 38))
    print("backward done", file=sys.stderr)

for name in sys.argv[1:]:
    print("call:", name, file=sys.stderr, flush=True)
    child = os.fork()
    if child == 0:
        call(name)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_reading_beyond_the_memory_of_an_argument_is_caught(site, isa):
    children.require_isa(isa)
    arguments = ["-c", LIES, "nothing", *ARGUMENTS]
    done = children.python(arguments, site, VITADAPTER_CPU_ISA=isa, **environment(site))
    assert done.returncode == 0, done.stderr
    reports = dict(text.split("\n", 1) for text in done.stderr.split("call: ")[1:])
    assert reports.pop("nothing") == "forward done\nbackward done\n"
    assert tuple(reports) == ARGUMENTS
    for argument, report in reports.items():
        # A vector that is only partly beyond the memory is an "unknown-crash".
        assert re.search("AddressSanitizer: (heap-buffer-overflow|unknown-crash)", report), argument
        assert "csrc/cpu/kernels/" in report, argument
        assert ("forward done" in report) == (argument == "gradient")


# What the sanitizers say of each mistake.
REPORTS = {
    "column beyond the map": "AddressSanitizer: heap-buffer-overflow",
    "points off the map behind the pixel of zeros": "AddressSanitizer: heap-buffer-overflow",
    "vectors that must be aligned": "runtime error: load of misaligned address",
}


@pytest.fixture(scope="module")
def mutant_site(tmp_path_factory) -> Path:
    """As `site`, of one instruction set, with kernels that make a mistake when they are told to."""
    return once(tmp_path_factory, "sanitized-mutants", build_mutants)


def build_mutants(folder: Path) -> None:
    prelude = mutants.plant(copy_source(folder, every_isa=False), mutants.SANITIZED)
    compile_package(folder, [*FLAGS, "-include", str(prelude)])


@pytest.mark.skipif(not EVERYTHING, reason="compiles for minutes: make sanitize")
def test_kernels_that_make_no_mistake_are_clean(mutant_site):
    done = children.pytest_on_cpu_kernels(FEWER, mutant_site, **environment(mutant_site))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


@pytest.mark.skipif(not EVERYTHING, reason="compiles for minutes: make sanitize")
@pytest.mark.parametrize("name", mutants.SANITIZED)
def test_a_mistake_in_the_kernels_is_caught(mutant_site, name):
    told = {mutants.CHOICE: name, **environment(mutant_site)}
    done = children.pytest_on_cpu_kernels(FEWER, mutant_site, **told)
    assert done.returncode != 0
    assert REPORTS[name] in done.stderr, done.stdout[-4000:] + done.stderr[-4000:]
