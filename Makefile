# make install builds the environment, as make demo, make test and others do first. They build it again only if
# pyproject.toml, setup.py or constraints.txt has changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo test test-unit test-all test-gpu faults lint parity benchmark

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

# The stamp is written last, so that an interrupted installation is repeated.
$(STAMP): pyproject.toml setup.py constraints.txt
	@echo "building .venv (takes some minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

install: $(STAMP) ## Build the environment .venv alone

demo: $(STAMP) ## Train a small model with SFT and DPO on two CPU ranks (four minutes); SEED=0
	@$(BIN)/python -m prefopt_dist.demo --seed $(or $(SEED),0)

lint: $(STAMP) ## Run ruff, mypy --strict, shellcheck and the check of prose
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary prefopt_dist
	@$(BIN)/python tests/lint/prose.py
	@{ git ls-files '*.sh' slurm; printf '%s\n' launch/run.sh launch/env.sh .ci/run; } | sort -u \
		| xargs $(BIN)/shellcheck -x

test-unit: $(STAMP) ## Run the quick tests of single modules, tests/unit (90 seconds)
	@$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=5 tests/unit

test: lint ## Run lint and the quick tests
	@$(BIN)/python -m pytest -q -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-all: lint ## Run lint and all tests
	@$(BIN)/python -m pytest -q -m "not gpu" --durations=15

test-gpu: $(STAMP) ## Run the tests on this machine's GPU (8 minutes); without one, say what they would run
	@$(BIN)/python -m pytest -q -m gpu tests/gpu

faults: $(STAMP) ## Kill a small job KILLS times (100) and compare the result; SEED=0, RANKS=2 or 2,1,3; resumes if stopped
	@$(BIN)/python tests/faults/campaign.py --kills $(or $(KILLS),100) --seed $(or $(SEED),0) --ranks $(or $(RANKS),2)

parity: $(STAMP) ## Compare each loss with TRL's on the same model and rows (a minute); fails if they differ
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmark]'
	@$(BIN)/python -m benchmarks.parity

benchmark: $(STAMP) ## Compare the speed with TRL's on one CPU thread (half an hour); RESULT=NAME, OPTIONS=--cuda
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmark]'
	@$(BIN)/python -m benchmarks.imbalance
	@$(BIN)/python -m benchmarks.step --ladder --save $(or $(RESULT),cpu) $(OPTIONS)
