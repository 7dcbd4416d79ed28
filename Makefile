# `make demo` and `make test` each work as the first command in a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-cpus lint pictures

demo: $(VENV)/installed
	$(BIN)/flashu run demo
	@echo "Open demo/report.html. The built-in model is small, and draws flat shapes: see flashu/embedded/README.md."

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder --durations=10

test-cpus: $(VENV)/installed-test # the numeric tests, as other CPUs would run them
	$(BIN)/python -m tests.cpus

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pictures: $(VENV)/installed # those of README and docs, anew; the screenshots need Chromium
	$(BIN)/python docs/drawing/make_pictures.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) -e '.[test]'
	@touch $@
