# make figures   regenerate every figure and table
# make test      lint, types, unit tests, notebooks
# make notebooks execute the notebooks in place, to commit their outputs
# make lint      ruff and mypy
# make test-lowest  unit tests with the oldest supported transformers, in an environment of its own
# Each creates .venv on first use. PYTHON names another interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

LOWEST := .venv-lowest

.PHONY: figures test notebooks lint test-lowest
.DELETE_ON_ERROR:

figures: $(INSTALLED)
	$(BIN)/python reproduce.py

notebooks: $(INSTALLED)
	$(BIN)/python reproduce.py --in-place

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env notebooks

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest

$(LOWEST)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(LOWEST)/constraints.txt
	echo 'transformers==5.17.0' >> $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/constraints.txt --editable '.[dev]'
	touch $@
