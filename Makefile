# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
EXTRAS ?= dev,eval
STAMP := $(VENV)/.installed-$(shell cat setup.py requirements.lock 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: help install quickstart test check format clean

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

test: $(STAMP) check  ## Lint, types and the whole CPU suite
	$(PY) -m pytest -n 2 --dist loadfile -q $(PYTEST_ARGS)

check: $(STAMP)  ## Lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)  ## Put every file in the house format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## Remove environments and caches; runs stay
	rm -rf .venv .venv-te .venv-peers .cache .pytest_cache .ruff_cache .mypy_cache
