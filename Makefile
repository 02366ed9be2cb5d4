# The two set-up-and-go commands of the README are `make demo` and `make test`; each makes its own environment.
PYTHON ?= python3
DEMO := .venv
DEV := .venv-dev
TORCH := .venv-torch

.PHONY: demo test test-slow test-parity torch lint clean

demo: $(DEMO)/.ready
	$(DEMO)/bin/python -m lensjax.select

test: $(DEV)/.ready
	$(DEV)/bin/python -m pytest -n auto --dist worksteal

test-slow: $(DEV)/.ready
	$(DEV)/bin/python -m pytest -m slow

# Compares with the torch models of transformers, in an environment of their own: with torch there, transformers takes
# other ways than it does for our users.
test-parity: torch
	$(TORCH)/bin/python -m pytest -n auto --dist worksteal -m parity

torch: $(TORCH)/.ready

lint: $(DEV)/.ready
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

$(DEMO)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(DEV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

$(TORCH)/.ready: pyproject.toml
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,parity]"
	touch $@

clean:
	rm -rf $(DEMO) $(DEV) $(TORCH) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
