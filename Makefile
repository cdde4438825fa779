# Needs Python >= 3.11 and make. `make demo` and `make test` create .venv and install into it once.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# Many threads per process only get in each other's way: models are tiny, and the tests run in two processes.
test: export OMP_NUM_THREADS = 1

.PHONY: help demo test lint types check dist

help:
	@echo 'make demo    train and compare threads that talk and threads that do not (minutes, CPU)'
	@echo 'make test    the tests'
	@echo 'make lint    ruff: style and formatting'
	@echo 'make types   mypy'
	@echo 'make check   lint, types and test'
	@echo 'make dist    wheel and source distribution of the last commit, the same bytes everywhere'

demo: $(INSTALLED)
	$(BIN)/lace demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test

dist: $(INSTALLED)
	tools/dist.sh $(BIN)/python dist

# torch comes first and alone: the pinned version settles which build is used before anything else can ask for one.
# setuptools builds this project without an isolated environment of its own.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'lace-lightning needs Python >= 3.11, and $(PYTHON) is not: make PYTHON=python3.12 …' >&2; exit 1; }
	@echo 'Installing into .venv: once, some minutes.'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@
