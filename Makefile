# The only two commands a newcomer needs: make demo, make test. Both make .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin
# a file's tests stay in one process, for they share what is slow to make
PYTEST := pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint check clean

demo: .venv/installed
	$(BIN)/megakd demo

test: .venv/installed
	$(BIN)/$(PYTEST)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# `make check test` runs the tests once
check: lint test

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# of demo/ only what `make demo` put there
clean:
	rm -rf .venv demo/kd demo/ce
	rmdir demo 2>/dev/null || true
