# make demo and make test build their environment first, again only when its description changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test test-all faults lint parity benchmark

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

# The stamp comes last: an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@echo "building .venv (some minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## A small model through the whole way, on two CPU ranks, four minutes; SEED=0
	@$(BIN)/python -m prefopt_dist.demo --seed $(or $(SEED),0)

lint: $(STAMP) ## ruff, mypy --strict, shellcheck
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary prefopt_dist
	@{ git ls-files '*.sh' slurm; printf '%s\n' launch/run.sh launch/env.sh .ci/run; } | sort -u \
		| xargs $(BIN)/shellcheck -x

test: lint ## lint and the quick tests
	@$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-all: lint ## lint and every test
	@$(BIN)/python -m pytest -q --durations=15

faults: $(STAMP) ## Kill a small job KILLS times (100) and compare; SEED=0, RANKS=2 or 2,1,3; goes on where it was stopped
	@$(BIN)/python tests/faults/campaign.py --kills $(or $(KILLS),100) --seed $(or $(SEED),0) --ranks $(or $(RANKS),2)

parity: $(STAMP) ## Each loss beside TRL's on the same model and rows, a minute; fails where they differ
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmark]'
	@$(BIN)/python -m benchmarks.parity

benchmark: $(STAMP) ## Ours beside TRL on one CPU thread, half an hour; RESULT=NAME, OPTIONS=--cuda
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmark]'
	@$(BIN)/python -m benchmarks.imbalance
	@$(BIN)/python -m benchmarks.step --ladder --save $(or $(RESULT),cpu) $(OPTIONS)
