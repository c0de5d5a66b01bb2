# make quickstart | test | test-all | lint | docs | clean
#
# Each target starts from nothing but Python 3.11 to 3.13: it makes a virtual environment, installs the pinned versions of
# constraints.txt once, and goes on. Variables: PYTHON (interpreter), VENV (environment), JOBS (test processes), and
# PYTEST_ARGS (options to pytest, for example "-k flow").

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# One thread per test process: small networks gain nothing from more, and two processes with all threads each lose much.
PYTEST := OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 10
SOURCES := pyro_genmods tests tutorials benchmarks docs

.PHONY: quickstart test test-all lint docs clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/python tutorials/quickstart.py

test: lint
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: test
	$(PYTEST) -m slow $(PYTEST_ARGS)
	ls tutorials/*.py | OMP_NUM_THREADS=1 MPLBACKEND=Agg xargs -n 1 -P $(JOBS) $(BIN)/python

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/build.py build/docs

clean:
	rm -rf build dist outputs lightning_logs .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -exec rm -rf {} +

INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt -e
# A stamp says that an installation is done; a change of what is installed makes it stale.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(INSTALL) .
	touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) with the extra '$*'; the first time this takes a few minutes."
	$(INSTALL) ".[$*]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "make: pyro_genmods needs Python 3.11 to 3.13, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || \
	  echo missing). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
