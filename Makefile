# Each line is a command a person could type. `make demo` and `make test` set everything up in .venv first.
# Without a GPU, point pip at PyTorch's CPU wheels to spare the CUDA download: make demo PIP_ARGS="--extra-index-url URL"
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test lint format setup clean

demo: .venv/ready
	$(BIN)/python -m pipelines demo --out out/demo

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: .venv/dev

clean:
	rm -rf .venv out

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt $(PIP_ARGS) -e .
	touch .venv/ready

.venv/dev: .venv/ready
	$(BIN)/pip install -q -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	touch .venv/dev
