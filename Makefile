# Two commands do everything on a fresh machine: `make demo`, `make test`.

PY ?= python3
V := .venv
BIN := $(V)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
export PYTHONNOUSERSITE := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-slow lint check bench docs clean

demo: $(V)/.run  ## train a small Transformer on real text, kill it, resume it, write the report
	$(BIN)/mupace demo --out runs/demo

test: $(V)/.dev  ## the default test suite, a file at a time in each of two processes of one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(V)/.dev  ## the slow tests, then those that start several processes, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not dist and not gpu" -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "dist and not gpu" -n 2 --dist loadfile

lint: $(V)/.dev  ## format, lint, types
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

check: lint docs test-slow test  ## what CI runs

bench: $(V)/.dev  ## the figures that the README states; exits non-zero when one is missed
	$(BIN)/python benchmarks/run.py

docs: $(V)/.dev  ## the documentation site, in site/
	$(BIN)/zensical build --clean

clean:
	rm -rf $(V) site .pytest_cache .mypy_cache .ruff_cache

$(V)/.venv: constraints.txt
	$(PY) -m venv $(V)
	$(PIP) torch==2.13.0 numpy
	touch $@

$(V)/.run: $(V)/.venv pyproject.toml
	$(PIP) -e ".[hf,plot]"
	touch $@

$(V)/.dev: $(V)/.venv pyproject.toml
	$(PIP) -e ".[dev]"
	$(BIN)/pip check
	touch $@ $(V)/.run
