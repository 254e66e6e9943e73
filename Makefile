# `make run` and `make test` are all a newcomer needs; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# TORCH=keep reuses the torch of $(PYTHON), which must not be in a virtual environment; TORCH=pinned installs the version
# in constraints.txt.
TORCH ?= $(shell $(PYTHON) -c "import importlib.util as u, sys; print('keep' if sys.prefix == sys.base_prefix and u.find_spec('torch') else 'pinned')" 2>/dev/null || echo pinned)
OUT ?= runs/lr-transfer
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run test check bench docs help clean

run: $(VENV)/.run ## install, pull the built-in study `lr-transfer` and write its report
	$(BIN)/towtank sweep lr-transfer --out $(OUT)

test: $(VENV)/.dev ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

check: $(VENV)/.dev ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_layers.py

bench: $(VENV)/.dev ## the benchmarks behind docs/benchmarks.md
	$(BIN)/python bench/ensemble.py
	$(BIN)/python bench/monitor.py --skip values

docs: $(VENV)/.docs ## the documentation as a site in site/
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	@echo "torch: $(if $(filter keep,$(TORCH)),the one $(PYTHON) already has (TORCH=keep),$$(grep '^torch==' constraints.txt); a CPU build is about 0.2 GB to fetch and a CUDA build several GB, whichever pip finds first. TORCH=keep reuses an installed one)"
	$(PYTHON) -m venv $(if $(filter keep,$(TORCH)),--system-site-packages) $(VENV)
	$(if $(filter keep,$(TORCH)),grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt,cp constraints.txt $(VENV)/constraints.txt)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e '.[docs]'
	@touch $@

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) dist site

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
