# `make demo` and `make test` need nothing but Python 3.11 or later; both set up .venv with the pinned constraints.

# The first Python that is new enough; override with `make PYTHON=...`.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
EXTRAS ?= adapters,openvino,serve,ray,sign,docs,dev
SLOW_TESTS ?= slow
# Test processes; a file's tests stay in one, because they share what its fixtures make.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet --constraint constraints.txt
TEST := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint typecheck installed docs browser triton

help:
	@echo "make demo | test | test-slow | lint | typecheck | docs | setup | browser | triton"

setup: $(STAMP)

# torch goes first, so that a build of it that is already chosen (a CPU wheel, say) is kept by everything after it.
$(STAMP): pyproject.toml research/pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found: install one, or use make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	$(PIP_INSTALL) --editable '.[rtx]' || echo "warning: TensorRT-RTX cannot be installed here; its backend stays off" >&2
	$(PIP_INSTALL) --no-deps --editable research
	touch $@

demo: $(STAMP)
	$(BIN)/s2p-deploy demo --out build/demo

test: lint typecheck
	$(TEST) -m "not slow and not gpu and not trt"

# The laboratory's tests run here, slow or not. pytest exits 5 where no test is marked so.
test-slow: $(STAMP) docs
	$(MAKE) browser || echo "warning: no Chromium here; tests of pages are skipped, or fail where CI is set" >&2
	$(MAKE) triton || echo "warning: no tritonserver here; its tests are skipped" >&2
	$(TEST) research/tests -m "not gpu and not trt"
	$(TEST) -m "$(SLOW_TESTS)" || test $$? -eq 5

# The system's Chromium, for the tests of pages.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit 0; done; \
	command -v apt-get > /dev/null && test "$$(id -u)" = 0 || { echo "install Chromium with your package manager" >&2; exit 1; }; \
	apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends chromium

# A tritonserver for the tests that need one (they skip without), as nvidia-pytriton's wheel carries it, and the NumPy
# that its Python backend was compiled for.
TRITON := $(VENV)/triton
triton: $(TRITON)/.set-up
$(TRITON)/.set-up: $(STAMP)
	rm -rf $(TRITON)
	$(PIP) download --quiet --no-deps --dest $(TRITON)/wheels nvidia-pytriton==0.7.0 numpy==1.26.4
	$(BIN)/python -m zipfile -e $(TRITON)/wheels/nvidia_pytriton-0.7.0-*.whl $(TRITON)
	$(BIN)/python -m zipfile -e $(TRITON)/wheels/numpy-1.26.4-*.whl $(TRITON)/numpy1
	rm -r $(TRITON)/wheels
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .

# A static tool sees s2p_deploy.calib and its like only in an installed tree. build/lib would carry deleted files over.
installed: $(STAMP)
	rm -rf build/lib build/bdist.* build/typecheck research/build
	$(PIP) install --quiet --no-deps --no-build-isolation --target build/typecheck . ./research
	rm -rf build/lib build/bdist.* research/build

# Types, and the order of imports.
typecheck: installed
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		-p s2p_deploy -p s2p_research
	cd build/typecheck && ../../$(BIN)/lint-imports ../../pyproject.toml --no-cache

# The documentation, to be read at build/site/index.html.
docs: installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
