# make demo: the whole job on embedded data    make test: the tests    make lint    make bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench

demo: $(STAMP)
	$(BIN)/dopfast demo --force

test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	for script in bench/*.py; do case $$script in bench/_*) ;; *) \
		$(BIN)/python $$script --json bench/results/cpu-$$(basename $$script .py).json || exit 1 ;; esac; done

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
