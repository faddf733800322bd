# The daily words. `make` alone lists them.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MANIFESTS := pyproject.toml packaging/setup.sh packaging/fbgemm-gpu-name/pyproject.toml

FAST := not slow and not exhaustive and not gpu
SLOW := slow and not exhaustive and not gpu
SEVERAL := (distributed or ray)
PYTEST := $(BIN)/pytest
# Tests of one process (and a local S3) share the cores, whole files at a time; those that start several have them to
# themselves. With ARGS one of the two may find nothing to run, which is pytest's code 5.
ONE_EACH := -n logical --maxprocesses 8 --dist loadfile
NONE := $(if $(ARGS),|| [ $$? = 5 ])
define RUN_TESTS
$(PYTEST) $(ONE_EACH) -m "$(1) and not $(SEVERAL)" $(ARGS) $(NONE)
$(PYTEST) -m "$(1) and $(SEVERAL)" $(ARGS) $(NONE)
endef
GPU = $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),yes)
RUN_SETUP = PYTHON='$(PYTHON)' DEVICE='$(DEVICE)' TORCH_INDEX='$(TORCH_INDEX)' packaging/setup.sh

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-all lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv and install everything (PYTHON=…, DEVICE=cpu|cuda, TORCH_INDEX=… when needed)
	@$(RUN_SETUP)

# Everything else installs when it has to, and not again.
$(INSTALLED): $(MANIFESTS)
	@$(RUN_SETUP)

# One thread a process, since tests start processes of their own. Not for quickstart: launchers divide the cores among
# the ranks they start, unless OMP_NUM_THREADS is set.
test test-slow test-all lint: export OMP_NUM_THREADS ?= 1

quickstart: $(INSTALLED) ## Train and compare the attention types on a small data set (DATA=path for your own)
	$(BIN)/genatt quickstart $(if $(DATA),--data '$(DATA)') --out runs/quickstart

test: $(INSTALLED) ## Run the fast tests
	$(call RUN_TESTS,$(FAST))

test-slow: $(INSTALLED) ## Run the slow tests
	$(call RUN_TESTS,$(SLOW))

test-all: $(INSTALLED) ## Run every test, exhaustive ones too, those for a GPU where there is one
	$(PYTEST) -m "$(if $(GPU),,not gpu)" $(ARGS)

lint: $(INSTALLED) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches and build outputs (not .venv, not runs)
	rm -rf build dist packaging/*/build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -print0 | xargs -0 rm -rf
