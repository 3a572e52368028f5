# One environment, .venv, made from pyproject.toml and constraints.txt. `make help` lists the targets.
PYTHON ?= python3
EXTRAS ?= dev,clients
VENV := .venv
comma := ,
SERVING := $(VENV)/.serving
COMPLETE := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
CLIENTS := $(VENV)/clients/.installed
NODE := tests/server/serving/clients/node
NODE_CLIENTS := $(if $(shell command -v npm),$(NODE)/node_modules/.installed)

# Installs the packages $(2) into the environment $(1), with uv: it takes a fraction of pip's time. uv does not read
# pip's configuration; where it fails, because packages come from an index named there, pip does the same.
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
install-into = $(VENV)/bin/uv pip install --quiet --system-certs --python $(1)/bin/python $(2) \
	|| $(PIP) --python $(1)/bin/python install --quiet $(2)
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
# The server and its tests start many processes: each reads what the first has compiled.
unexport PYTHONDONTWRITEBYTECODE
# A process a core, each with whole files of tests; with more than four, tests that look at the clock get in each
# other's way.
PYTEST := $(VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: help install serve test test-slow test-long test-agents rehearsal lint clean

help:
	@echo "make serve      install what serving needs, then start the server; flags: make serve ARGS='--port 9000'"
	@echo "make test       install the rest, then ruff, mypy and the tests"
	@echo "make test-slow  tests of a second or more, and the other cases of tables that make test has a few of"
	@echo "make test-long  tests that take minutes each"
	@echo "make test-agents  Claude Code, Codex, opencode, Cline and aider against the server; needs npm"
	@echo "make rehearsal  GLM-5.2 at full size without its weights; flags: make rehearsal ARGS='--layers 6'"
	@echo "make install    a complete $(VENV) and nothing else"

$(SERVING): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"glmserve needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.12")'
	@test -d $(VENV) || { echo "installing into $(VENV), once"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) install --quiet --only-binary :all: -c constraints.txt uv || true
	@$(call install-into,$(VENV),-c constraints.txt -e .)
	@touch $@

# Compiled here once, because tests start many processes; pip always compiles.
$(COMPLETE): $(SERVING)
	@$(call install-into,$(VENV),-c constraints.txt -e '.[$(EXTRAS)]')
	@$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

# Clients that are large, or want other versions than the tests: an environment inside the other.
$(CLIENTS): $(SERVING)
	@$(VENV)/bin/python -m venv --without-pip $(VENV)/clients
	@$(call install-into,$(VENV)/clients,langchain-openrouter==0.2.9 openrouter==0.11.46 langchain-openai==1.7.4 \
		openai-agents==0.24.0 litellm==1.110.2 vllm-router==0.1.17 sglang-router==0.3.2)
	@touch $@

# Where there is no npm the tests of node's clients are skipped.
$(NODE)/node_modules/.installed: $(NODE)/package.json
	@cd $(NODE) && npm install --silent --no-package-lock --no-audit --no-fund --ignore-scripts
	@touch $@

install:
	@$(MAKE) --no-print-directory -j2 $(COMPLETE) $(if $(findstring clients,$(EXTRAS)),$(CLIENTS) $(NODE_CLIENTS))

serve: $(SERVING)
	$(VENV)/bin/glmserve $(ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(PYTEST)

# CI runs them after `make test`.
test-slow: install
	$(PYTEST) -m 'slow and not long'

test-long: install
	$(PYTEST) -m long

# Real agents by their own binaries, 1.2 GB of them: not part of `make test`.
AGENTS := tests/server/serving/agents
test-agents: install
	@test -d $(VENV)/aider || $(VENV)/bin/python -m venv --without-pip $(VENV)/aider
	@$(call install-into,$(VENV)/aider,aider-chat==0.86.2)
	cd $(AGENTS) && npm install --silent --no-package-lock --no-audit --no-fund
	$(VENV)/bin/python -m $(subst /,.,$(AGENTS)).talk

# GLM-5.2 at full size without its weights, from plan to shutdown; docs/rehearsal.md has flags and figures.
rehearsal: install
	$(VENV)/bin/python -m benchmarks.rehearsal $(ARGS)

clean:
	rm -rf $(VENV) $(NODE)/node_modules $(AGENTS)/node_modules build dist *.egg-info
