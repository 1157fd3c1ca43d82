# make demo | make test: each does all the set-up it needs, in .venv, once.
#
# Variables: PYTHON      the interpreter to build .venv with (3.11 or newer)
#            VENV_FLAGS  e.g. --system-site-packages: use the torch (2.8 or newer) that PYTHON already has
#            PYTEST_FLAGS, DEMO_FLAGS  e.g. PYTEST_FLAGS="-x -k store"
#            TEST_PROCESSES  files of tests that run at a time

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV_FLAGS ?=
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
TEST_PROCESSES ?= 2

BIN := .venv/bin
STAMP := .venv/.installed

.DELETE_ON_ERROR:
.PHONY: help setup demo test soak lint bench clean

help:
	@echo "make setup   the environment .venv, which the others make where it is missing"
	@echo "make demo    train on rendered clips, from videos to accuracy"
	@echo "make lint    ruff and mypy"
	@echo "make test    lint, and the tests: minutes"
	@echo "make soak    the tests that take longer: more schedules of failures, whole benchmarks"
	@echo "make bench   measurements; the last line of each is JSON"
	@echo "make clean   remove what was built, but .venv, caches and runs"

setup: $(STAMP)

# The stamp is last, so that an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt .ci/pins.py
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: install one, or make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python .ci/pins.py > .venv/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c .venv/constraints.txt -e '.[test]'
	@$(BIN)/python -c 'import torchvision' || { echo "torchvision does not fit this torch: install the pair of one release from one source" >&2; exit 1; }
	@touch $@

demo: setup
	$(BIN)/evl-cache demo $(DEMO_FLAGS)

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

test: lint
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_FLAGS)

# What `make test` leaves out, and what must be quick on a machine that does nothing else.
soak: setup
	$(BIN)/python -m pytest -m "soak or timed" $(PYTEST_FLAGS)

# Every module that needs no argument of its own; the last line of each is one JSON object of ratios.
bench: setup
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c .venv/constraints.txt -e '.[bench]'
	@set -e; for f in $$(grep -l '__name__ == "__main__"' benchmarks/*.py | xargs grep -L 'required=True'); do \
		name=$$(basename $$f .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name --json; \
	done

# Not .venv (gigabytes to fetch again: rm -r .venv), and never caches/ or runs/: those are work.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
