# Every target does its own set-up: a virtual environment in .venv, installed under constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check docs format clean

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lorareg needs Python 3.11 or later; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV): some minutes, the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev --editable .
	@touch $@

demo: $(VENV)/installed  ## the whole idea, on tensors it trains itself, in about two minutes
	@$(BIN)/lorareg quickstart --out quickstart --force

test: $(VENV)/installed  ## the tests
	@$(BIN)/python -m pytest -n auto --dist loadgroup

check: $(VENV)/installed  ## style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed  ## regenerate docs/cli.md and docs/recipe.schema.json
	$(BIN)/python docs/generate.py

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) quickstart
