# Each target does its own set-up. What is installed is installed once: the stamp files
# say so until pyproject.toml or the constraints change.

PYTHON ?= python3
BACKENDS := tensorflow jax torch
# The versions under test are stated in the constraints. TORCH can say more to pip, for
# example where a build without CUDA is to be had.
TORCH ?= $(shell grep '^torch==' requirements/constraints.txt)
KERAS ?= $(shell sed -n 's/.*"keras>=\([0-9.]*\)".*/\1/p' pyproject.toml)

VENV := .venv
OLDEST := .venv-oldest
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
BACKEND_EXTRAS := tensorflow,jax,torch

ifneq ($(filter-out $(BACKENDS),$(BACKEND)),)
$(error unknown BACKEND "$(BACKEND)": choose from $(BACKENDS), or leave it out for all)
endif

.DEFAULT_GOAL := help
.PHONY: help demo benchmark docs test quick test-oldest test-accelerator lint format
.PHONY: clean

help:
	@echo "make demo                  train the example and compare the three backends"
	@echo "make test                  the suite under each backend, then the matrix"
	@echo "make test BACKEND=jax      the suite under one backend ($(BACKENDS))"
	@echo "make test ARGS='-k mask'   further arguments for pytest"
	@echo "make quick                 the core of the suite under PyTorch, or BACKEND=jax"
	@echo "make test-oldest           the suite under the oldest Keras supported ($(KERAS))"
	@echo "make test-oldest KERAS=V   the suite under another version of Keras"
	@echo "make test-accelerator      what a GPU or TPU shows, with what \$$(PYTHON) has"
	@echo "make benchmark             measure beside the peers, write the README's figures;"
	@echo "                           goes on where it was stopped (ARGS=--again: anew)"
	@echo "make docs                  build the documentation site into site/"
	@echo "make lint                  ruff: the rules and the format"
	@echo "make format                ruff: apply the format and the safe fixes"
	@echo "make clean                 remove the environments and what the tools left"

demo: $(VENV)/demo.stamp
	$(VENV)/bin/python -m keras_mha demo

benchmark: $(VENV)/benchmark.stamp
	$(VENV)/bin/python -m benchmarks $(ARGS)

# The variable keeps the theme from advertising another generator on every build.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

test: $(VENV)/dev.stamp
	$(VENV)/bin/python scripts/run_tests.py $(BACKEND) --pytest='$(ARGS)'

# For the loop of a change: what it breaks first.
quick: $(VENV)/dev.stamp
	$(VENV)/bin/python scripts/run_tests.py $(or $(BACKEND),torch) --core --pytest='$(ARGS)'

test-oldest: $(OLDEST)/keras-$(KERAS).stamp
	$(OLDEST)/bin/python scripts/run_tests.py $(BACKEND) --pytest='$(ARGS)'

# With what is installed there already: which build of a backend knows a device is not
# for pip to choose.
test-accelerator:
	$(PYTHON) scripts/test_accelerator.py $(BACKEND) --pytest='$(ARGS)'

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) build dist site .pytest_cache .ruff_cache .hypothesis .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and by its pin: left to a resolver it may come with gigabytes of CUDA.
$(VENV)/demo.stamp: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) $(TORCH)
	$(VENV)/bin/python $(PIP_INSTALL) -c requirements/constraints.txt \
		-e ".[$(BACKEND_EXTRAS),demo]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(VENV)/bin/python $(PIP_INSTALL) -c requirements/constraints.txt -e ".[test,peers,docs]"
	@touch $@

$(VENV)/benchmark.stamp: $(VENV)/demo.stamp
	$(VENV)/bin/python $(PIP_INSTALL) -c requirements/constraints.txt -e ".[benchmark]"
	@touch $@

$(VENV)/docs.stamp: $(VENV)/demo.stamp
	$(VENV)/bin/python $(PIP_INSTALL) -c requirements/constraints.txt -e ".[docs]"
	@touch $@

$(OLDEST)/keras-$(KERAS).stamp: pyproject.toml requirements/constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	@rm -f $(OLDEST)/keras-*.stamp
	$(OLDEST)/bin/python $(PIP_INSTALL) $(TORCH)
	$(OLDEST)/bin/python $(PIP_INSTALL) -c requirements/constraints-oldest.txt \
		"keras==$(KERAS)" -e ".[$(BACKEND_EXTRAS),test]"
	@touch $@
