# make setup | demo | demo-scratch | test | test-slow | test-faults | test-slurm | test-all | test-oldest | test-newest | gpu-check | lint | clean-demo
# RUN=FOLDER: where a demo writes.  LOCK=FILE: the versions that are installed; LOCK= takes the newest that there are
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
LOCK ?= requirements.lock
STAMP := $(VENV)/.installed$(if $(LOCK),,-newest)

.PHONY: setup demo demo-scratch test test-slow test-faults test-slurm test-all test-oldest test-newest gpu-check lint clean-demo

setup: $(STAMP)

# The stamp is renewed when the dependencies or their versions change; otherwise a second call installs nothing.
$(STAMP): pyproject.toml $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python %d.%d is too old, wanted 3.11 or newer: make PYTHON=/path/to/python" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(if $(LOCK),-c '$(LOCK)',--upgrade --upgrade-strategy eager) -e '.[dev]'
	rm -f $(VENV)/.installed*
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

# What takes more than some seconds each, real processes and signals among it
test-slow: setup
	$(PY) -m pytest -q $(PARALLEL) -m 'slow and not slurm'

test-all: test test-slow test-slurm

# On the lowest versions that pyproject.toml allows, and on the newest, each in a .venv of its own
test-oldest test-newest:
	$(PYTHON) tests/versions.py $(@:test-%=%) -q $(ARGS)

# What docs/reliability.md states: each kind of fault, TIMES times as often
test-faults: TIMES ?= 1
test-faults: setup
	$(PY) -m pytest -q $(PARALLEL) -m '' --times $(TIMES) tests/faults

# The jobs of slurm/ on a Slurm of two nodes, started here; as root, after apt-get install slurm-wlm munge
test-slurm: setup
	$(PY) -m pytest -q -m slurm -rs tests/slurm

# What there is to know of it on a GPU, in so many minutes: docs/gpu.md
gpu-check: MINUTES ?= 9
gpu-check: OUT ?= runs/gpu
gpu-check: setup
	$(PY) benchmarks/gpu.py --minutes '$(MINUTES)' --out '$(OUT)' $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
