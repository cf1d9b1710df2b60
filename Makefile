# Everything happens in .venv, made on first use. Another interpreter: make demo PYTHON=python3.13
PYTHON ?= python3
# Test processes at a time: one more than two cores, for tests that wait for processes of their own.
JOBS ?= 3

BIN := .venv/bin
READY := .venv/.ready
# One thread a test process, so that they do not fight for the cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow torture check audit bench bench-long clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv and install bertpipe with the tested versions

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "bertpipe needs Python 3.11 or newer, and there is no '$(PYTHON)' here"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "bertpipe needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)."; \
	  echo "With another interpreter: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.13"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' can't make virtual environments; install its venv package (on Debian: python3-venv)"; exit 1; }
	@echo "Installing into .venv, once; this takes some minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY) ## text to a fine-tuned BERT and its report, under 10 minutes on 2 cores fast in bf16
	@$(BIN)/bertpipe all --config configs/demo.yaml

test: $(READY) ## the tests, 10 minutes at most
	$(PYTEST) -m "not slow and not gpu and not torture"

test-slow: $(READY) ## the long tests
	$(PYTEST) -m "slow and not gpu and not torture"

torture: $(READY) ## kills, power cuts, flipped bits, fuzzing at length; two hours at most; writes docs/results/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture

check: $(READY) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: ## known holes in the versions of constraints.txt, by pip-audit; asks the network, so no part of test
	@$(PYTHON) -m venv .venv/audit
	@.venv/audit/bin/python -m pip install --quiet -c constraints.txt "pip-audit"
	.venv/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

bench: $(READY) ## the CPU measurements, 20 minutes on 2 idle cores, into benchmarks/results/
	$(BIN)/python benchmarks/pretrain_speed.py
	$(BIN)/python benchmarks/loader_speed.py
	$(BIN)/python benchmarks/data_speed.py
	$(BIN)/python benchmarks/processes_speed.py

bench-long: $(READY) ## time to a loss; exactness; memory of the data stages (wants BERTPIPE_DATA)
	$(BIN)/python benchmarks/time_to_loss.py
	$(BIN)/python benchmarks/exactness.py
	$(BIN)/python benchmarks/stage_memory.py "$${BERTPIPE_DATA:?set it to a folder of real data}/corpus/enwiki-train-*.parquet"

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
