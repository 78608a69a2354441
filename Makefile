# make demo    train with a server and clients on this machine (DATASET, NUM_CLIENTS, NUM_ROUNDS, SOURCE can be set)
# make test    lint, and all tests
# make bench   measure speed and memory beside their references
# make soak    train under a hail of faults, and without
# Each sets up .venv first, from python3 and a package registry. SETUP_PYTHON=python3.12 takes another Python.

SETUP_PYTHON ?= python3
PYTHON := .venv/bin/python
INSTALL := @$(PYTHON) -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test bench soak
export DATASET NUM_CLIENTS NUM_ROUNDS SOURCE

setup: .venv/setup

.venv/setup: requirements.txt constraints.txt
	@$(SETUP_PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv; the first time this takes a minute or two"
	$(INSTALL) --requirement requirements.txt
	@touch $@

.venv/setup-test: .venv/setup
	$(INSTALL) hypothesis pillow psutil pytest ruff
	@touch $@

demo: .venv/setup
	@bash deploy/demo.sh

test: .venv/setup-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check --target-version py38 libs.py data.py nets.py engines.py client.py
	$(PYTHON) -m pytest

bench: .venv/setup-test
	$(PYTHON) benchmarks/bench.py

soak: .venv/setup-test
	$(PYTHON) benchmarks/soak.py
