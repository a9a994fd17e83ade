# make quickstart   install into .venv, then fine-tune the embedded model on the embedded data
# make test         install the test extra, then run the suite
# make oracle       install torch, transformers' friends, then compare with them
# make lint         ruff and pyright
# make clean        remove what these made
#
# Options: VENV=dir, PYTHON=python3.13, ARGS="optim.lr=1e-3" (quickstart) or ARGS="-k lora" (test, oracle)

VENV ?= .venv
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
PYTEST = $(VENV)/bin/python -m pytest -n 2
PACKAGING = setup.cfg pyproject.toml

.PHONY: quickstart test oracle lint clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/.installed
	$(VENV)/bin/python run.py --config configs/quickstart.py $(ARGS)

# The oracle tests need another extra and have their own target.
test: $(VENV)/.installed-test
	$(PYTEST) --ignore=tests/oracle $(ARGS)

oracle: $(VENV)/.installed-oracle
	$(PYTEST) tests/oracle $(ARGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python >= 3.12 is needed and none was found. Install it, or name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No virtual environment: on Debian and Ubuntu install python3-venv"; exit 1; }

# Each stamp is as new as the packaging it installed, so that a second make installs nothing.
$(VENV)/.installed: $(PACKAGING) | $(VENV)/bin/python
	@echo "Installing into $(VENV) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(PACKAGING) | $(VENV)/bin/python
	@echo "Installing with the test extra into $(VENV) ..."
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-oracle: $(PACKAGING) | $(VENV)/bin/python
	@echo "Installing with the test and oracle extras into $(VENV) (torch is large) ..."
	$(PIP) --editable '.[test,oracle]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
