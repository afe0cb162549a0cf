# make quickstart | routers | finetune | test | check | format: each makes .venv and installs what it needs.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

$(if $(filter finetune,$(MAKECMDGOALS)),$(if $(DIALOGUES),,$(error make finetune needs DIALOGUES=PATH, a folder of dialogues)))

.PHONY: quickstart routers finetune test lint check format

quickstart: .venv/installed
	@$(BIN)/python run.py -m sweeps=quickstart
	@$(BIN)/python -m analysis.report quickstart

routers: .venv/installed  # every method once
	@$(BIN)/python run.py -m sweeps=routers
	@$(BIN)/python -m analysis.report routers

finetune: .venv/installed  # DIALOGUES=PATH, a folder of dialogues; see sweeps/finetune.yaml
	@$(BIN)/python run.py -m sweeps=finetune experiment=finetune/pretrain,finetune/own data.folder=$(DIALOGUES)
	@$(BIN)/python -m analysis.report finetune

test: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

check: lint test

format: .venv/installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.venv/installed: requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "Switchyard needs Python 3.11, 3.12 or 3.13 on the path" >&2; exit 1; fi
	@echo "installing into .venv with $(PYTHON): some minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@
