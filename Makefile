# The commands of the project; BUILD.md explains them. Needs Python 3.10 to 3.13 and make.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: help quickstart test test-fast lint bench clean

help:
	@echo "make quickstart   install into $(VENV) and run the toy experiment (no download)"
	@echo "make test         install into $(VENV) and run the tests"
	@echo "make test-fast    the tests that take seconds, for while one works"
	@echo "make lint         check style, errors and types by ruff and mypy"
	@echo "make bench        time fit and gradient_moments against plain Keras, with the targets"
	@echo "make clean        remove $(VENV) and build products (never runs/)"

quickstart: $(VENV)/installed
	$(RUN) -m tf_gsnr.main --flagfile=flags/quickstart.flags

test: $(VENV)/installed
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

test-fast: $(VENV)/installed
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not slow"

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/installed
	$(RUN) benchmarks/fit.py --seconds 5
	$(RUN) benchmarks/moments.py --seconds 4

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else "tf_gsnr needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing TensorFlow and the rest into $(VENV); this takes a minute or two"
	@# The pip of an older Python searches for minutes where a newer one knows the answer.
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
