# `make demo` runs the main job, `make test` the tests; each sets up what it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint setup clean

demo: setup
	$(BIN)/python -m experiments digits

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml setup.sh
	PYTHON="$(PYTHON)" sh setup.sh

clean:
	rm -rf .venv runs build *.egg-info
