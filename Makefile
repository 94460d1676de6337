# make setup | demo | demo-scratch | test | test-all | test-slurm | lint | clean-demo
# RUN=FOLDER: where a demo writes
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: setup demo demo-scratch test test-all test-slurm lint clean-demo

setup: $(VENV)/.installed

# The stamp is renewed when the dependencies change; otherwise a second call installs nothing.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python %d.%d is too old, wanted 3.10 or newer: make PYTHON=/path/to/python" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# From the shipped glyphs-base to anagrams
demo: RUN ?= runs/demo
demo: setup
	PY='$(PY)' RUN='$(RUN)' bash configs/glyphs/demo.sh

# From nothing to anagrams, on an easier set of letters
demo-scratch: RUN ?= runs/scratch
demo-scratch: setup
	PY='$(PY)' RUN='$(RUN)' bash configs/glyphs/demo_scratch.sh

clean-demo:
	rm -rf $(if $(RUN),'$(RUN)',runs/demo runs/scratch)

PARALLEL := -n auto --maxprocesses 8 --dist worksteal

test: setup
	$(PY) -m pytest -q $(PARALLEL)

test-all: setup
	$(PY) -m pytest -q $(PARALLEL) -m 'not slurm'
	$(PY) -m pytest -q -m slurm -rs tests/slurm

# The jobs of slurm/ on a Slurm of two nodes, started here; as root, after apt-get install slurm-wlm munge
test-slurm: setup
	$(PY) -m pytest -q -m slurm -rs tests/slurm

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
