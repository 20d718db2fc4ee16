# Every target is complete on a fresh machine: it creates .venv and installs what it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := test
.PHONY: environment demo test soak sanitize quality style docs clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS := build/docs-venv
BUILD := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# Built for CUDA only: beside the CPU torch they fail to load, and vLLM needs them for no text model.
NOT_ON_CPU := torchvision torchaudio torchcodec

$(VENV)/.installed: pyproject.toml deploy/cpu/alias_vllm.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[$(BUILD),dev]'
ifeq ($(BUILD),cpu)
	$(BIN)/python -m pip uninstall --yes $(NOT_ON_CPU)
	$(BIN)/python deploy/cpu/alias_vllm.py
endif
	touch $@

environment: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/flashmemory demo

# An engine of these tests takes one core. Tests on a GPU share it one after the other.
ifeq ($(BUILD),cpu)
WORKERS ?= 2
else
WORKERS ?= 0
endif
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--durations 40 --durations-min 10

# On a CPU both model runners, one after the other, the second one through Triton's interpreter, which is slow: 45 minutes
# with the texts of vLLM's own backend. On a GPU 8 minutes with full graphs.
soak: $(VENV)/.installed
ifeq ($(BUILD),cpu)
	$(BIN)/flashmemory soak --runners v1 --scheduling sync,async --seconds 800 --requests 1600 --out docs/results/soak-cpu.json
	$(BIN)/flashmemory soak --runners v2 --scheduling sync,async --triton-cpu tests/tools/triton_cpu \
	--seconds 1000 --requests 400 --out docs/results/soak-cpu.json
else
	$(BIN)/flashmemory soak --runners v1,v2 --scheduling async --seconds 480 --requests 100000 --out docs/results/soak-gpu.json
endif

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m flashmemory_vllm.cli.docs --check

# Needs a GPU and NVIDIA's compute-sanitizer; some minutes
sanitize: $(VENV)/.installed
	for tool in memcheck racecheck; do \
	compute-sanitizer --tool $$tool --error-exitcode 9 $(BIN)/python -m pytest -q tests/gpu/test_kernels_cuda.py \
	-k "(case0 or case1) and not configuration and not tiles" --timeout 0 || exit; done

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site needs neither vLLM nor this package, so it has an environment of its own with the extra alone.
$(DOCS)/.installed: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]\
	["optional-dependencies"]["docs"])' | xargs $(DOCS)/bin/python -m pip install
	touch $@

docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
