# Every target does its own set-up: it needs Python (3.11 or newer) and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread a process: the tests are small, and two processes fill the two cores of CI.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-slurm check docs clean-docs format demo sizes studies bench bench-data bench-gpu test-gpu clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make .venv and install swift in it (again only when pyproject.toml changes)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "swift needs Python 3.11 or newer; name one with make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "could not make $(VENV): install Python's venv module (Debian: python3-venv)" >&2; exit 2; }
	@echo "installing swift and what it needs into $(VENV) (about 6 GB with torch's CUDA libraries; minutes)"
	@# editable_mode: by a path, so that Python finds swift also beside a clone that is called swift.
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable '.[dev,docs]'
	@touch $@

test: setup ## Run the CPU test suite, two files at a time
	$(PYTEST)

# In the order of their names: the files that take minutes begin first. Else those with few tests would come last.
test-slow: setup ## Run the slow tests too: several ranks, kills, whole commands
	$(PYTEST) --no-loadscope-reorder -m 'slow and not gpu and not slurm'

test-slurm: setup ## Run the tests that need Slurm: installs (Debian, root), starts and stops four nodes on this machine
	launch/local_slurm.sh install
	$(BIN)/python -m pytest tests/slurm -m slurm

test-gpu: setup ## Run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

check: setup ## Format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" lint-imports

# Warnings are errors. The gallery's examples run when they have changed; make clean-docs runs all of them again.
docs: setup ## Build the documentation site in site/ (a few minutes: it runs the gallery's examples)
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m sphinx -W --keep-going -q -b html docs site
	@echo "the site: site/index.html"

clean-docs: ## Remove the site and what was made for it
	rm -rf site docs/made docs/examples runs/gallery

format: setup ## Format the code in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: setup ## Pre-train the tiny model on real fMRI on a CPU (about three minutes after set-up)
	$(BIN)/python -m swift.train model.maps=40 trainer.max_steps=100

sizes: setup ## Print the exact parameter counts of every size
	$(BIN)/python -m swift.plan

STUDIES := pretraining strong_scaling scaling_laws temporal ablation throughput

studies: setup ## Run the report's studies at laptop size and draw them (goes on where it stopped; figures: runs/figures)
	$(BIN)/python -m swift.study $(STUDIES:%=experiments/%/laptop.yaml)
	@# A check that fails ends this with status 1, but the page is made first, and says so.
	status=0; $(BIN)/python experiments/mu_transfer/run.py || status=$$?; \
	$(BIN)/python -m swift.report html runs/pretraining runs/mu_transfer $(STUDIES:%=runs/figures/%) \
		--title "swift: the report's studies at laptop size" --out runs/studies.html && exit $$status

bench: setup ## Time the encoder against the slow reference, and a step on brain tokens against one on the box
	$(BIN)/python -m tests.bench.encoder
	$(BIN)/python -m tests.bench.tokens

bench-data: setup ## Time reading clips: raw reads, the store, per-frame files, gzip HDF5
	$(BIN)/python -m tests.bench.data

# PART=gates,steps: only these parts.
PART ?= all
OUT ?= runs/bench_gpu.json
bench-gpu: setup ## Gates, speed and memory on a GPU, in parts that go on where they stopped (small form on a CPU)
	$(BIN)/python -m tests.bench.gpu --part $(PART) --out $(OUT)

clean: ## Remove .venv and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
