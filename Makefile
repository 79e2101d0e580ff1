# SPDX-License-Identifier: Apache-2.0
# The commands of a fresh machine: `make bench`, `make bench-op` and `make test`. Each makes .venv if
# needed, installs the package with what it needs, and runs the job. `make bench-rivals` adds what
# bench-op can compare with, `make integrations` other projects that the tests then compare with.
# `make test` leaves out the sweeps that `make test-all` adds. `make sanitize` runs the CPU kernels
# under AddressSanitizer and UndefinedBehaviorSanitizer, of which `make test-all` does a part.
#
# `make gpu-check OUT=dir` needs no network and makes no .venv: it builds, checks and times with PYTHON's
# own torch on this machine's GPU, in stages, and writes the results to dir.
#
#   TORCH   which torch, as pip writes it: TORCH=torch==2.13.0. Default: any supported release, which
#           is the newest one on a fresh machine.
#   PYTHON  which Python makes .venv; for gpu-check, which one has torch.
#   OUT     where gpu-check writes; RIVALS: a folder of wheels and source archives to compare with;
#           STAGES: which of its stages to run.
#   ARGS    passed on: make bench ARGS=--paper, make test ARGS="-k gradcheck".

TORCH ?= torch>=2.11
PYTHON ?= python3
ARGS ?=
OUT ?= benchmarks/out/gpu-check
RIVALS ?=
STAGES ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Pinned: what the patches reach into moves from release to release.
PROJECTS := transformers==5.24.0 kernels==0.17.2 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 \
	torchao==0.18.0 scipy safetensors
# Pinned: another version formats differently.
LINT := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
CPP := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NATIVE := $(shell find csrc -type f) setup.py pyproject.toml vitadapter_ops/_build.py

.PHONY: bench bench-op bench-fused bench-rivals gpu-check integrations test test-all sanitize lint format wheel sdist clean FORCE

bench: .venv/installed
	$(BIN)/python benchmarks/attn.py $(ARGS)

bench-op: .venv/installed
	$(BIN)/python -m benchmarks.op $(ARGS)

bench-fused: .venv/installed
	$(BIN)/python -m benchmarks.op.fused $(ARGS)

# Compiled here, against the installed torch: seconds for the first, about 15 minutes for the second.
# Each is optional.
bench-rivals: .venv/installed
	$(PIP) wheel packaging
	$(PIP) --no-build-isolation --no-deps torch-ms-deform-attn==0.1.1 \
		|| echo "torch-ms-deform-attn is not installed (above): it will not be compared with"
	MMCV_WITH_OPS=1 FORCE_CUDA=0 $(PIP) --no-build-isolation onedl-mmcv \
		|| echo "onedl-mmcv is not installed (above): it will not be compared with"

gpu-check:
	$(PYTHON) -m benchmarks.gpu.check --out $(OUT) $(if $(STAGES),--stages $(STAGES)) \
		$(if $(RIVALS),--rivals $(RIVALS)) $(ARGS)

# Those of the projects in tests/integrations that need no compiling and no torchvision. With them,
# `make test` compares with them.
integrations: .venv/installed
	$(PIP) $(PROJECTS)

# Over all cores; ARGS="-n 0" in one process. What is marked `exhaustive` is left to test-all.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: .venv/installed
	$(PYTEST) -m "not exhaustive" $(ARGS)

test-all: .venv/installed
	$(PYTEST) $(ARGS)

sanitize: .venv/installed
	SANITIZE_EVERYTHING=1 $(BIN)/python -m pytest tests/sanitize $(ARGS)

lint: .venv/installed .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: .venv/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: .venv/installed
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

sdist: .venv/installed
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")'

clean:
	rm -rf .venv build dist *.egg-info vitadapter_ops/_cpu.* vitadapter_ops/_cuda.*

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Holds the torch requirement, and is touched only when that changes.
.venv/torch: FORCE .venv/bin/python
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# torch first: the native libraries are compiled against it.
.venv/installed: .venv/torch $(NATIVE)
	$(PIP) "$(TORCH)" "setuptools>=77" ninja
	$(PIP) --no-build-isolation --editable ".[test,bench]"
	@touch $@

.venv/lint: .venv/bin/python Makefile
	$(PIP) $(LINT)
	@touch $@
