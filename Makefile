# make figures   regenerate every figure and table
# make test      lint, types, tests, notebooks: what a change needs, one process per core
# make test-all  also the slow tests: the paper path, Ray with a killed worker, offloaded devices
# make notebooks execute the notebooks in place, to commit their outputs
# make docs      build the documentation in docs/build/html; warnings are errors
# make lint      ruff and mypy
# make test-families  the equality tests with another transformers, the newest or the oldest in turn
# make test-lowest  unit tests with the oldest supported transformers, in an environment of its own
# Each creates .venv on first use. PYTHON names another interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

LOWEST := .venv-lowest
PEFT := peft==0.21.2
NEWEST := transformers==5.24.0 $(PEFT)
OLDEST := transformers==5.17.0 huggingface_hub==1.33.0 $(PEFT)
EQUALITY := $(patsubst %,tests/unit/test_%.py,every_family families pictured_families wrapped)
EACH_CORE := --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: figures test test-all notebooks docs lint test-families test-lowest
.DELETE_ON_ERROR:

figures: $(INSTALLED)
	$(BIN)/python reproduce.py

notebooks: $(INSTALLED)
	$(BIN)/python reproduce.py --in-place

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . docs/build/html
	@echo docs/build/html/index.html

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# One thread per process: several threads per process on busy cores are many times slower. The cells
# of a notebook run in one process, in their order; the scores that notebooks share are shipped.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' $(EACH_CORE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval-lax --nbval-current-env $(EACH_CORE) notebooks

test-all: test test-families
	$(BIN)/python -m pytest -m slow

# The parity of the commit's hash says which of the two; only transformers is another one, and PEFT
# comes with it. Where it cannot be downloaded, the tests are left out, which is said.
# It takes about a minute on two cores; the limit is four.
test-families: $(INSTALLED)
	hash=$$(git rev-parse HEAD); case $$hash in *[02468ace]) of="$(NEWEST)";; *) of="$(OLDEST)";; esac; \
	other=$$(mktemp -d); trap 'rm -r "$$other"' EXIT; echo "equality tests with $$of, commit $$hash"; \
	if $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps --target "$$other" $$of; then \
		PYTHONPATH="$$other" OMP_NUM_THREADS=1 timeout 240 $(BIN)/python -m pytest $(EACH_CORE) $(EQUALITY); \
	else echo "skipped: $$of could not be downloaded"; fi

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
