# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
EXTRAS ?= dev,eval
STAMP := $(VENV)/.installed-$(shell cat setup.py requirements.lock 2>/dev/null | cksum | cut -d' ' -f1)

TE := .venv-te
TE_STAMP := $(TE)/.installed-$(shell cat tests/te/requirements.txt 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: help install quickstart test slurm test-te test-peers test-faults soak test-gpu check format clean

help:  ## What there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

$(STAMP): setup.py requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[$(EXTRAS)]'
	rm -f $(VENV)/.installed-*
	touch $@

install: $(STAMP)  ## The environment, with pinned versions

quickstart: $(STAMP)  ## Train, resume, export and sample a small model on real text
	$(PY) -m tools.quickstart

slurm:  ## Slurm for the suite, where this is root on Debian
	@command -v slurmctld >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && tests/slurm/loopback.sh install; } || \
	  echo "no Slurm, and no root on Debian to install it: its tests will be skipped"

test: $(STAMP) slurm check  ## Lint, types and the whole CPU suite
	$(PY) -m pytest -n 2 --dist loadfile -q $(PYTEST_ARGS)

# Layered over $(VENV) by a path file: only Transformer Engine's Python files and triton are new.
$(TE_STAMP): $(STAMP) tests/te/requirements.txt
	test -x $(TE)/bin/python || $(PY) -m venv --without-pip $(TE)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(TE)/lib/python3*/site-packages)/core.pth
	$(TE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps transformer-engine==2.20.2
	$(TE)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/te/requirements.txt
	rm -f $(TE)/.installed-*
	touch $@

test-te: $(TE_STAMP)  ## Transformer Engine's real layers, built on a CPU
	OMP_NUM_THREADS=1 $(TE)/bin/python -m pytest -n 2 --dist load -q tests/te $(PYTEST_ARGS)

.cache/peers/.installed: $(TE_STAMP)
	$(TE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .cache/peers megatron-bridge==0.3.1
	touch $@

test-peers: .cache/peers/.installed  ## Our converted tensors against Megatron-Bridge's
	PYTHONPATH=.cache/peers OMP_NUM_THREADS=1 $(TE)/bin/python -m pytest -q tests/peers $(PYTEST_ARGS)

test-faults: $(STAMP) slurm  ## The fault matrix on a loopback Slurm (hours)
	$(PY) -m tools.faults

soak: $(STAMP) slurm  ## Faults at random against one run: make soak MINUTES=120
	$(PY) -m tools.soak --minutes $(or $(MINUTES),60)

test-gpu: $(STAMP)  ## On a GPU: proof, and runs/gpu_report/report.md
	$(PY) -m tools.gpu_report

check: $(STAMP)  ## Lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)  ## Put every file in the house format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## Remove environments and caches; runs stay
	rm -rf .venv .venv-te .venv-peers .cache .pytest_cache .ruff_cache .mypy_cache
