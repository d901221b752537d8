# `make demo` and `make test` do all the set-up themselves, in one environment: torch, the package and its libraries.
# They need Python, a C++ compiler and make. `make test TORCH=2.11.0` does the same in an environment with that torch.

PYTHON ?= python3
TORCH  ?=
VENV   ?= .venv$(if $(TORCH),-$(TORCH))
SEED   ?= 0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# What pip installs first. Another torch comes alone: torchvision and timm pin theirs, and their tests are skipped.
TORCH_PACKAGES := $(if $(TORCH),torch==$(TORCH),torch torchvision)
comma          := ,
EXTRAS         := demo,test$(if $(TORCH),,$(comma)vision)
LINT_TORCH     := 2.13.0

# TESTS: what to test, a folder or a file. ARGS: more options of pytest.
TESTS  ?= tests
ARGS   ?=
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

SOURCES := gatedconv/_build.py $(shell find csrc -type f)
CPP     := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard benchmarks/*.c tests/native/*.cpp tests/native/*.h runtime/*/*.c runtime/*/*.cpp)

.PHONY: demo test test-slow test-all lint format build coverage docs wheel clean
.PHONY: bench bench-all bench-docs gpu

demo: $(VENV)/.build
	$(BIN)/gatedconv train --preset demo --seed $(SEED)

test: $(VENV)/.build
	$(PYTEST) -m "not slow" $(TESTS) $(ARGS)

# Compiles every kernel for every architecture, runs sanitizers and every row of the experiments, kills trainings, builds
# wheels, converts published networks.
test-slow: $(VENV)/.build
	$(PYTEST) -m slow $(TESTS) $(ARGS)

test-all: test test-slow

coverage: $(VENV)/.build
	$(PYTEST) -m "not slow" --cov --cov-report=term-missing:skip-covered $(ARGS)

# The tools and the torch whose annotations mypy reads are pinned, so that the result depends on the code alone.
lint:
	$(MAKE) --no-print-directory TORCH=$(LINT_TORCH) .lint

.PHONY: .lint
.lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format:
	$(MAKE) --no-print-directory TORCH=$(LINT_TORCH) .format

.PHONY: .format
.format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

build: $(VENV)/.build

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# dist/: a source distribution, and a wheel with the CPU library for every Python. The wheel's tag is the oldest
# manylinux that its symbols allow: manylinux_2_28 where it is built in that image, as .github/workflows/wheels.yml does.
wheel: $(VENV)/.dev
	rm -rf build/wheel dist
	FORCE_CUDA=0 GATEDCONV_BUILD=require $(BIN)/python -m build --no-isolation --sdist --wheel --outdir build/wheel
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist/

# A few minutes: the most telling cases, printed. BENCH="--benchmark-json FILE" keeps the rows.
bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks -m quick -q $(BENCH)

# Every case; on an idle machine with two cores about 25 minutes.
bench-all: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks -q $(BENCH)

bench-docs: $(VENV)/.build
	$(BIN)/python docs/write.py

# Needs a GPU: parity on poisoned memory, then timings, each case in a process of its own. STAGE=first takes at most six
# minutes; GPU="--max-minutes 20 --out DIR" sets a time limit and a folder.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(STAGE) $(GPU)

# Each stamp file marks a finished step: a second run does nothing, and an interrupted one continues where it stopped.
$(VENV)/bin/python:
	@test -w . || { echo "make: $(CURDIR) is read-only: clone it to a folder that can be written" >&2; exit 1; }
	@echo "== 1 of 4: Python environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# torch comes first: the libraries are compiled against it.
$(VENV)/.torch: | $(VENV)/bin/python
	@echo "== 2 of 4: $(TORCH_PACKAGES) (a large download the first time)"
	$(PIP) install $(TORCH_PACKAGES)
	@touch $@

$(VENV)/.packages: pyproject.toml setup.py $(VENV)/.torch
	@echo "== 3 of 4: the packages that gatedconv and its tests need"
	GATEDCONV_BUILD=off $(PIP) install --quiet --editable ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.build: $(SOURCES) $(VENV)/.packages
	@echo "== 4 of 4: the native libraries"
	$(BIN)/python gatedconv/_build.py
	@touch $@

# Neither the lint nor the documents need the libraries.
$(VENV)/.bench: $(VENV)/.build
$(VENV)/.dev $(VENV)/.bench $(VENV)/.docs: $(VENV)/.%: $(VENV)/.packages
	GATEDCONV_BUILD=off $(PIP) install --quiet --editable ".[$*]"
	@touch $@

clean:
	rm -rf build dist site .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache gatedconv/*.so gatedconv/_build_info.json
