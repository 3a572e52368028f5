# One environment, .venv, made from pyproject.toml and constraints.txt. `make help` lists the targets.
PYTHON ?= python3
EXTRAS ?= dev,clients
VENV := .venv
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: help install serve test test-fast test-long lint clean

help:
	@echo "make serve      install, then start the server on its default model"
	@echo "make test       install, then ruff, mypy and every test"
	@echo "make test-fast  the inner loop: ruff and the quick tests"
	@echo "make test-long  tests that take minutes each"
	@echo "make install    a complete $(VENV) and nothing else"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"glmserve needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.12")'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# langchain-openrouter pins the openrouter SDK below 1.0: it gets an environment inside the other.
$(VENV)/langchain/.installed: $(STAMP)
	$(VENV)/bin/python -m venv $(VENV)/langchain
	$(VENV)/langchain/bin/python -m pip install --quiet --disable-pip-version-check langchain-openrouter==0.2.9 openrouter==0.11.46
	@touch $@

install: $(STAMP)

serve: install
	$(VENV)/bin/glmserve $(ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint $(if $(findstring clients,$(EXTRAS)),$(VENV)/langchain/.installed)
	$(VENV)/bin/pytest

test-fast: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pytest -m 'not slow and not long' -x -q

test-long: install
	$(VENV)/bin/pytest -m long

clean:
	rm -rf $(VENV) build dist *.egg-info
