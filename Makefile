# `make demo`, `make test` and `make docs` each work as the first command in a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo docs pictures test test-cpus lint

demo: $(VENV)/installed
	$(BIN)/flashu run demo
	@echo "Open demo/report.html. The built-in model is small, and draws flat shapes: see flashu/embedded/README.md."

docs: $(VENV)/installed-docs
	$(BIN)/python docs/write_reference.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html."

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

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[docs]'
	@touch $(VENV)/installed $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[test]'
	@touch $(VENV)/installed $(VENV)/installed-docs $@
