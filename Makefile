# Every target sets up what it needs in .venv; the second time that takes no time.
PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?=
BENCHMARKS ?= calls collectives scopes n_to_m repartition rows store start idle
BENCH_ARGS ?=
RESULTS ?= build/benchmarks

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: help demo test check bench figures clean
help:
	@echo 'make demo    train on real data: a gang of readers and trainers on Ray (DEMO_ARGS="--epochs 8")'
	@echo 'make test    run the tests (TEST_ARGS="-k digits")'
	@echo 'make check   run ruff, mypy and the tests of the import rules'
	@echo 'make bench   run the benchmarks (BENCHMARKS="collectives", BENCH_ARGS="--repeat 2")'
	@echo 'make figures run them, and put what they say into README.md'
	@echo 'make clean   remove .venv and what the tools left'

demo: $(READY)
	$(RUN) examples/digits.py $(DEMO_ARGS)

test: $(READY)
	$(RUN) -m pytest $(TEST_ARGS)

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_imports.py

bench: $(PEERS)
	set -e; for benchmark in $(BENCHMARKS); do \
		$(RUN) -m benchmarks $$benchmark $(BENCH_ARGS) --json $(RESULTS)/$$benchmark.json; done

figures: RESULTS := benchmarks/results
figures: bench
	$(RUN) -m benchmarks readme $(RESULTS)

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Gangline needs Python 3.11 or later: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(PEERS): $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	touch $@
