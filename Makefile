# The two set-up-and-go commands of the README are `make demo` and `make test`; each makes its own environment.
PYTHON ?= python3
DEMO := .venv
DEV := .venv-dev

.PHONY: demo test test-slow test-parity lint clean

demo: $(DEMO)/.ready
	$(DEMO)/bin/python -m lensjax.select

test: $(DEV)/.ready
	$(DEV)/bin/python -m pytest

test-slow: $(DEV)/.ready
	$(DEV)/bin/python -m pytest -m slow

# Compares with the torch models of transformers; torch comes with the extra.
test-parity: $(DEV)/.ready
	$(DEV)/bin/python -m pip install --quiet --editable ".[dev,parity]"
	$(DEV)/bin/python -m pytest -m parity

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

clean:
	rm -rf $(DEMO) $(DEV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
