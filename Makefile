# Two commands are all that a fresh machine needs: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow paper lint types clean

demo: .venv/installed
	$(BIN)/torchtrim demo

test: .venv/installed
	$(BIN)/python -m pytest

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# The experiments of docs/results: about 40 minutes.
paper: .venv/installed
	for name in iterative one_shot from_scratch all_at_once vgg16 connections; do \
		$(BIN)/python -m benchmarks.paper.$$name || exit 1; \
	done

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/basedpyright

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache
