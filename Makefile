# Every target sets up what it needs in .venv; the second time that takes no time.
PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?=
BENCHMARKS ?= collectives start

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help demo test check bench clean
help:
	@echo 'make demo    train on real data: a gang of readers and trainers on Ray (DEMO_ARGS="--epochs 8")'
	@echo 'make test    run the tests (TEST_ARGS="-k digits")'
	@echo 'make check   run ruff, mypy and the tests of the import rules'
	@echo 'make bench   run the benchmarks (BENCHMARKS="collectives")'
	@echo 'make clean   remove .venv and what the tools left'

demo: $(READY)
	$(RUN) examples/digits.py $(DEMO_ARGS)

test: $(READY)
	$(RUN) -m pytest $(TEST_ARGS)

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_imports.py

bench: $(READY)
	set -e; for benchmark in $(BENCHMARKS); do $(RUN) -m benchmarks $$benchmark; done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Gangline needs Python 3.11 or later: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
