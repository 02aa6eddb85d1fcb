# Everything below works from a fresh clone with Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUDGET ?= 50s
# Processes that share the tests, a core and 2 GB each.
WORKERS ?= 2
# On Linux the package index's own torch brings several GB of CUDA along. On a machine without a
# GPU give the index of torch's CPU builds instead: make demo TORCH_INDEX=...
TORCH_INDEX ?=

# Rules and cases that are tested: those that span the others, or all.
CASES ?= spanning

.PHONY: demo test test-all check bench clean

demo: $(VENV)/installed
	$(BIN)/hyperdescent demo --out runs/demo --budget $(BUDGET)

# A class or the functions of a file stay together, for what they share; those with few tests, not
# the quick ones, would come last in any other order.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) \
		--dist loadscope --no-loadscope-reorder $(if $(filter all,$(CASES)),--thorough)

test-all:
	$(MAKE) test CASES=all

# Format, lint and types; mypy sees the root under the package's name through a link.
check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p build/typing && ln -sfn ../.. build/typing/hyperdescent
	MYPYPATH=build/typing $(BIN)/mypy -p hyperdescent

# Against other libraries; the tools for development bring one of them. HYPERDESCENT_DATA names the
# folder with the language model's text.
bench: $(VENV)/installed-dev
	$(BIN)/hyperdescent bench metagradient --out BENCHMARKS.md
	$(BIN)/hyperdescent bench implicit --out BENCHMARKS.md
	$(BIN)/hyperdescent bench optimizers --out BENCHMARKS.md

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch by itself first: pinned, it is the build that the rest was tested with.
$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
