# `make demo` and `make test` do all the set-up themselves: a virtual environment, torch, the package and its libraries.
# Nothing but Python, a C++ compiler and make has to be there.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch torchvision
SEED   ?= 0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

SOURCES  := setup.py pyproject.toml gatedconv/_build.py $(wildcard csrc/*.* csrc/*/*.*)
CPP      := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/native/*.cpp)
PYTHON_FILES := gatedconv kernels reproduce tests benchmarks examples docs setup.py

.PHONY: demo test lint format build coverage bench bench-all bench-docs clean gpu gpu-experiments gpu-data gpu-merge

demo: $(VENV)/.build
	$(BIN)/gatedconv train --preset demo --seed $(SEED)

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.build
	$(BIN)/ruff check $(wildcard $(PYTHON_FILES))
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.build
	$(BIN)/ruff check --fix $(wildcard $(PYTHON_FILES))
	$(BIN)/clang-format -i $(CPP)

build: $(VENV)/.build

coverage: $(VENV)/.build
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

# A few minutes: the most telling cases, printed. BENCH="--results" keeps the rows in benchmarks/results/.
bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --ignore=benchmarks/gpu -m quick -q $(BENCH)

# Everything, kept in benchmarks/results/, then the cases that have a goal once more with all libraries held to AVX2;
# an interrupted run goes on where it stopped. On an idle machine with two cores about 25 minutes.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 GATEDCONV_ISA=avx2
bench-all: $(VENV)/.bench
	@failed=0; \
	$(BIN)/python -m pytest benchmarks --ignore=benchmarks/gpu -q --results $(BENCH) || failed=1; \
	$(AVX2) $(BIN)/python -m pytest benchmarks --ignore=benchmarks/gpu -q -m goals --results $(BENCH) || failed=1; \
	exit $$failed

bench-docs: $(VENV)/.build
	$(BIN)/python -m benchmarks.tables

# Needs a GPU, and a Python with torch, triton and the package's dependencies; installs nothing. STAGE is one or more of
# the stages, each of which ends within nine minutes; without it, all of them. Rows go to benchmarks/results and to OUT.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(STAGE)

# Training runs of the experiment table, nine minutes at a time; benchmarks/gpu/experiments.py tells the settings.
# gpu-data takes DATA, a part of a data set, before; gpu-merge takes FROM, what came back, into results/ after.
gpu-experiments:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu.experiments

gpu-data:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu.data

gpu-merge:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu.merge $(FROM)

# Each stamp stands for a finished step, so a second run does nothing and a broken one goes on where it stopped.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: the libraries are compiled against the one that is there.
$(VENV)/.torch: | $(VENV)/bin/python
	$(BIN)/python -c "import torch, torchvision" 2>/dev/null || $(PIP) install $(TORCH)
	@touch $@

$(VENV)/.packages: pyproject.toml $(VENV)/.torch
	GATEDCONV_BUILD=off $(PIP) install --editable ".[demo,test]"
	@touch $@

$(VENV)/.build: $(SOURCES) $(VENV)/.packages
	$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/.bench: $(VENV)/.build
	$(PIP) install --editable ".[bench]"
	@touch $@

clean:
	rm -rf build dist .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache gatedconv/*.so gatedconv/_build_info.json
