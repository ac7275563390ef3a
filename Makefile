PYTHON ?= python3
VENV ?= .venv
# Tests run in so many processes; they take half an hour of one slow core.
WORKERS ?= 2
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: demo test check format notebooks bench hta-check clean

demo: $(VENV)/.base ## the simulator's main job: a feasible region, as a picture and a table
	$(BIN)/weft demo

test: $(VENV)/.test ## all tests
	$(BIN)/python -m pytest -q -n $(WORKERS)

check: $(VENV)/.dev ## style, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/.test ## build the .ipynb beside every notebook source
	$(BIN)/python notebooks/build.py

bench: $(VENV)/.base ## speed, growth and memory of the simulator
	$(BIN)/python benchmarks/speed.py

hta-check: $(VENV)/.base .hta-venv/.done ## our overlap against Holistic Trace Analysis, from the same timeline
	$(BIN)/python benchmarks/hta_check.py --hta .hta-venv/bin/python

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] \
	  + "; try: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e . && touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '.[calibration,executor,hf,test]' && touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e '.[dev]' && touch $@

.hta-venv/.done:
	$(PYTHON) -m venv .hta-venv && .hta-venv/bin/python -m pip install -q --disable-pip-version-check \
	  HolisticTraceAnalysis==0.5.0 && touch $@

clean:
	rm -rf $(VENV) .hta-venv weft-demo weft-hta .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
