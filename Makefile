# `make demo` and `make test` each work alone on a fresh machine with Python 3.11, 3.12 or 3.13, git and make.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
# Named exactly, so that a CPU build that pip was configured to prefer is taken; any torch >=2.11,<2.14 works.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Tests at once. More keep cores busier while tests wait for processes; some tests measure time and may then fail.
WORKERS ?= 2
# One math thread a process: the tests run several engines at once. On the CPU, also where there is a GPU: `make gpu`
# tests that one.
# Bytecode is kept whatever the environment says: hundreds of processes start from the same files.
QUIET := PYTHONDONTWRITEBYTECODE= CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test lint types unit slow gpu gpu-check bench-cpu rotation-picture clean

demo: .venv/.runtime
	@$(BIN)/superinfer demo

# The types are checked while the first tests run.
test: lint
	@$(MAKE) --no-print-directory --jobs 2 types unit

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python benchmarks/readme.py --check

types: .venv/.dev
	$(BIN)/mypy

unit: .venv/.dev
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 5 -m "not slow" tests

# The few tests that take longest, of the measuring tools and of great numbers. CI runs them after `make test`.
slow: .venv/.dev
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 5 -m slow tests

gpu: .venv/.dev
	$(BIN)/python -m pip install --quiet --editable ".[cuda]"
	$(BIN)/python -m pytest -rs tests/gpu tests/kernels

# Tests and measurements that only a GPU can show, each with a time limit; where there is no network, run the script.
gpu-check: .venv/.dev
	$(BIN)/python -m pip install --quiet --editable ".[cuda]"
	$(BIN)/python benchmarks/gpu_session.py

bench-cpu: .venv/.dev
	$(BIN)/python benchmarks/cpu_throughput.py

# docs/rotation.png: a load that rotates, on the CPU body, and the picture of its trace. About a minute.
rotation-picture: .venv/.dev
	$(BIN)/python -m pip install --quiet --editable ".[plot]"
	$(BIN)/superinfer bench offline --device cpu --requests 24 --prompt-tokens 100:400 --output-tokens 100:200 \
		--policy lru --kv-tokens 4096 --dram-tokens 32768 --link-gbps 0.5 --max-batch-size 32 --threads 1 --trace rotation.json
	$(BIN)/superinfer trace plot rotation.json --out docs/rotation.png \
		--title "Taking turns in HBM: embedded model, CPU body, link of 0.5 GB/s each way"

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed; install one or run make PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.runtime: pyproject.toml | .venv/bin/python
	@echo "Installing superinfer and $(TORCH) into .venv; a download of torch takes minutes."
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable .
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	@echo "Installing superinfer, $(TORCH) and what the tests need into .venv; a download takes minutes."
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[dev]"
	@touch $@ .venv/.runtime

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
