# `make demo` and `make test` need nothing but Python 3.11 or later; both set up .venv with the pinned constraints.

# The first Python that is new enough; override with `make PYTHON=...`.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
EXTRAS ?= openvino,serve,ray,sign,dev
SLOW_TESTS ?= slow
# Test processes; a file's tests stay in one, because they share what its fixtures make.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet --constraint constraints.txt
TEST := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint typecheck triton

help:
	@echo "make demo | test | test-slow | lint | typecheck | setup | triton"

setup: $(STAMP)

# torch goes first, so that a build of it that is already chosen (a CPU wheel, say) is kept by everything after it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found: install one, or use make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	$(PIP_INSTALL) --editable '.[rtx]' || echo "warning: TensorRT-RTX cannot be installed here; its backend stays off" >&2
	touch $@

demo: $(STAMP)
	$(BIN)/s2p-deploy demo --out build/demo

test: lint typecheck
	$(TEST) -m "not slow and not gpu and not trt"

# pytest exits 5 where no test is marked so.
test-slow: $(STAMP)
	$(MAKE) triton || echo "warning: no tritonserver here; its tests are skipped" >&2
	$(TEST) -m "$(SLOW_TESTS)" || test $$? -eq 5

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

# A checker sees s2p_deploy.calib and its like only in an installed tree. build/lib would carry deleted files over.
typecheck: $(STAMP)
	rm -rf build/lib build/bdist.* build/typecheck
	$(PIP) install --quiet --no-deps --no-build-isolation --target build/typecheck .
	rm -rf build/lib build/bdist.*
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p s2p_deploy
