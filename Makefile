# The commands of this project. `make help` lists them. Nothing is needed but Python 3.11 to 3.13 and pip.

SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
PROFILE ?= embedded

# The first Python that fits, unless PYTHON names one.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(if $(shell command -v $(name)),$(shell \
	$(name) -c 'import sys; print("$(name)" if (3, 11) <= sys.version_info[:2] < (3, 14) else "")' 2>/dev/null))))

# pip is asked for what the lock names and for nothing else; the hashes are checked.
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --require-hashes --only-binary :all:
INSTALL_PROJECT := $(PIP) install --quiet --no-deps --no-build-isolation --editable .

# Files that say which lock is installed; a lock that changed is newer than its file.
RUNTIME := $(VENV)/installed-runtime
DEVELOPMENT := $(VENV)/installed-development

.PHONY: help run demo test test-faults-long chromium full-servers faketime unit check bench bench-gpu soak lock install clean
.DEFAULT_GOAL := help

help:  ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(RUNTIME)  ## Install, start everything, put sample pictures; stays until Ctrl-C (PROFILE=embedded or full)
	@exec $(BIN)/image-search up --profile $(PROFILE) --samples

demo: $(RUNTIME)  ## Start a stack of its own, search with an edited picture, print the hits, stop everything
	@PROFILE=$(PROFILE) $(BIN)/python -m infra.local_stack.demo

test: check chromium full-servers  ## Install what the tests need, run all checks and all tests
	$(BIN)/pytest

test-faults-long: full-servers faketime  ## The faults that take minutes each, an hour in all: a storm of rebalances, stores away for long, a wrong clock
	$(BIN)/pytest tests/faults_long

# A wrong clock is a library's lie, the system's package faketime.
faketime:
	@ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& echo "installing faketime for the tests of a wrong clock" \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends faketime >/dev/null; } \
		|| echo "faketime is missing and only root may install it: the tests of a wrong clock are skipped (on CI they fail). apt install faketime"

# The page is tested in the system's Chromium, the one part of the tests that pip cannot bring.
chromium:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& echo "installing Chromium for the tests of the page" \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "Chromium is missing and only root may install it: the tests of the page are skipped (on CI they fail). apt install chromium"

# MinIO is built from its source, MariaDB is the system's package: neither comes with pip.
full-servers: $(DEVELOPMENT)  ## Build MinIO (4 minutes, once) and install MariaDB, for the tests of the full profile
	@$(BIN)/python -m infra.local_stack.fetch \
		|| echo "the tests of the full profile are skipped (on CI they fail)"

unit: $(DEVELOPMENT)  ## Unit tests only: no servers, under a minute
	$(BIN)/pytest tests/unit

check: $(DEVELOPMENT)  ## Lint, format, types (strict), import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: full-servers  ## Measure against the goals (ONLY=decode,model, QUICK=1); writes build/bench.json, .md and .png
	$(BIN)/python -m tests.benchmarks --only "$(ONLY)" $(if $(QUICK),--quick)

bench-gpu: $(DEVELOPMENT)  ## Measure an NVIDIA GPU: pictures a second by precision and batch, and with decoding; prints its own table
	$(BIN)/python -m tests.benchmarks --gpu $(if $(QUICK),--quick)

soak: full-servers  ## Constant load and a kill every minute (MINUTES=30 PROFILE=embedded); writes build/soak.json
	MINUTES=$(or $(MINUTES),30) PROFILE=$(PROFILE) $(BIN)/python -m tests.soak

lock:  ## Resolve the dependencies anew and write both lock files (needs the program uv)
	@command -v uv >/dev/null || { echo "make lock needs the program uv: pip install uv"; exit 1; }
	uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header pyproject.toml \
		--extra local --extra training --extra dev --output-file requirements-dev.lock
	uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header pyproject.toml \
		--extra local --extra training --constraint requirements-dev.lock --output-file requirements.lock

install: $(RUNTIME)  ## Only install what running needs

clean:  ## Remove the environment and what was built; leaves the stack's data (image-search down --wipe removes that)
	rm -rf $(VENV) build

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found. Name one: make run PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11, 3.12 or 3.13 is needed: make run PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test "$$(uname -sm)" = "Linux x86_64" || echo "Note: the local servers are built for Linux x86-64; this is $$(uname -sm)."
	@echo "making $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)

$(RUNTIME): requirements.lock pyproject.toml | $(BIN)/python
	@echo "installing the locked dependencies: several gigabytes the first time, most of it torch"
	@$(INSTALL) --requirement requirements.lock
	@$(INSTALL_PROJECT)
	@touch $@

$(DEVELOPMENT): requirements-dev.lock pyproject.toml | $(BIN)/python
	@echo "installing the locked dependencies and what the tests need"
	@$(INSTALL) --requirement requirements-dev.lock
	@$(INSTALL_PROJECT)
	@touch $@ $(RUNTIME)
