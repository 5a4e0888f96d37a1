# `make help` lists the commands. demo and test need Python >= 3.10, a C/C++ compiler and make; the rest they fetch
# once. What a run has done is remembered by stamp files in $(VENV) and build folders in build/.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

override VENV := $(abspath $(VENV))
export PATH := $(VENV)/bin:$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(VENV)/bin/python -m pip
CONSTRAINTS := $(VENV)/mmbal-constraints.txt
INSTALLED := $(VENV)/mmbal-installed
CMAKE_TESTS := -G Ninja -DMMBAL_BUILD_TESTS=ON -DMMBAL_WERROR=ON -DMMBAL_CUDA=OFF
NVCC := $(if $(filter 0,$(MMBAL_CUDA)),,$(shell command -v nvcc 2>/dev/null))
# A compiler of tomorrow may warn of more: that stops a test and no demo.
WERROR := OFF
test cuda-check: WERROR := ON
# What ptxas says of each kernel is kept beside its object file, for cuda-check.
CMAKE_INSTALLED = -DMMBAL_WERROR=$(WERROR) $(if $(NVCC),-DCMAKE_CUDA_FLAGS=-Xptxas=-v \
    '-DCMAKE_CUDA_COMPILER_LAUNCHER=$(VENV)/bin/python;$(CURDIR)/tests/cuda/ptxas_report.py;compile')

sources := $(shell find include ops cmake torch_ext -type f ! -name '*.pyc' ! -name '*.so')
c_files := $(shell find include ops torch_ext tests examples -name '*.[ch]' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo
	@echo "  Variables: PYTHON=python3     the Python that $(notdir $(VENV)) is made from; a torch it has is used"
	@echo "             VENV=.venv         the virtual environment; a torch it has is kept"
	@echo "             TORCH=$(TORCH)  what pip is given where there is no torch"
	@echo "             ARGS=              more arguments for demo, bench or pytest, such as ARGS=--quick"
	@echo "             JOBS=$(JOBS)             compilers and processes of tests at once"
	@echo "             MMBAL_CUDA=0       leave out CUDA though nvcc is there"

.PHONY: demo
demo: $(INSTALLED) ## upcycle a CLIP on real image-caption pairs and show what it gained
	@$(VENV)/bin/mmbal demo $(ARGS)

.PHONY: test
test: lint test-core test-example $(if $(NVCC),cuda-check) test-python ## formatters' checks, C tests, the C example, Python tests, cuda-check where nvcc is

.PHONY: test-core
test-core: $(INSTALLED) gtest
	cmake -S . -B build/tests $(CMAKE_TESTS) --log-level=WARNING
	cmake --build build/tests
	ctest --test-dir build/tests --output-on-failure --no-tests=error -j $(JOBS)

.PHONY: test-example
test-example: test-core
	rm -rf build/prefix
	cmake --install build/tests --prefix build/prefix > build/install.log
	cmake -S examples/c -B build/examples -G Ninja -Dmmbal_ROOT=$(CURDIR)/build/prefix --log-level=WARNING
	cmake --build build/examples
	ctest --test-dir build/examples --output-on-failure

.PHONY: test-python
test-python: $(INSTALLED) $(VENV)/mmbal-open-clip
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

.PHONY: bench
bench: $(INSTALLED) bench-phases ## benchmarks against peers, a chosen subset in less than ten minutes
	$(VENV)/bin/python tests/bench/run.py $(ARGS)
	$(VENV)/bin/python tests/bench/btw.py
	$(VENV)/bin/python tests/bench/amss.py
	$(VENV)/bin/python tests/bench/attribution.py
	$(VENV)/bin/python tests/bench/altmoe.py

.PHONY: bench-btw
bench-btw: $(INSTALLED) ## the part of bench about weights of modalities
	$(VENV)/bin/python tests/bench/btw.py $(ARGS)

.PHONY: bench-amss
bench-amss: $(INSTALLED) ## the part of bench about masked subnetworks
	$(VENV)/bin/python tests/bench/amss.py $(ARGS)

.PHONY: bench-attribution
bench-attribution: $(INSTALLED) ## the part of bench about attribution regularisation
	$(VENV)/bin/python tests/bench/attribution.py $(ARGS)

.PHONY: bench-altmoe
bench-altmoe: $(INSTALLED) ## the part of bench about aligning modalities and searching them
	$(VENV)/bin/python tests/bench/altmoe.py $(ARGS)

.PHONY: bench-full
bench-full: $(INSTALLED) bench-clip ## benchmarks of every shape, hours; goes on where it was stopped
	$(VENV)/bin/python tests/bench/run.py --full $(ARGS)

.PHONY: bench-clip
bench-clip: $(INSTALLED) ## the part of bench-full about real CLIPs: a step of a ViT-B/16, upcycling a ViT-L/14; minutes
	$(VENV)/bin/python tests/bench/clip_step.py
	$(VENV)/bin/python tests/bench/upcycle_l14.py

.PHONY: bench-phases
bench-phases: $(VENV)/mmbal-tools
	cmake -S . -B build/bench-build -G Ninja -DMMBAL_BUILD_BENCH=ON -DMMBAL_WERROR=ON --log-level=WARNING
	cmake --build build/bench-build --target phases
	build/bench-build/phases

.PHONY: lint
lint: $(INSTALLED) ## check the format of all sources (clang-format, ruff)
	@$(VENV)/bin/clang-format --dry-run -Werror $(c_files)
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet .

.PHONY: format
format: $(INSTALLED) ## format all sources
	@$(VENV)/bin/clang-format -i $(c_files)
	@$(VENV)/bin/ruff check --quiet --fix --exit-zero .
	@$(VENV)/bin/ruff format --quiet .

.PHONY: asan
asan: $(INSTALLED) gtest ## C tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B build/asan $(CMAKE_TESTS) -DMMBAL_SANITIZE=address --log-level=WARNING
	cmake --build build/asan
	ctest --test-dir build/asan --output-on-failure --no-tests=error -j $(JOBS)

.PHONY: tsan
tsan: $(INSTALLED) gtest ## C tests under ThreadSanitizer
	cmake -S . -B build/tsan $(CMAKE_TESTS) -DMMBAL_SANITIZE=thread --log-level=WARNING
	cmake --build build/tsan
	ctest --test-dir build/tsan --output-on-failure --no-tests=error -j $(JOBS)

.PHONY: cuda-check
cuda-check: $(INSTALLED) cuda-on-cpu ## the CUDA library as built (registers, operators) and its kernels on a CPU; needs nvcc
	@command -v nvcc > /dev/null || { echo "nvcc is missing: install the CUDA toolkit and put its bin folder on PATH."; exit 1; }
	@library=$$(ls -t build/*/libmmbal_cuda.so | head -1) && folder=$$(dirname "$$library") && \
	$(VENV)/bin/python tests/cuda/ptxas_report.py table "$$folder" && \
	$(VENV)/bin/python tests/cuda/registrations.py --cuda-library "$$library" --stand-in "$$folder/stand_in/libtorch_cuda.so"

.PHONY: cuda-on-cpu
cuda-on-cpu: $(INSTALLED) gtest ## the CUDA kernels on a CPU, against the C core; needs no nvcc
	cmake -S . -B build/cuda-on-cpu -G Ninja -DMMBAL_BUILD_CUDA_TESTS=ON -DMMBAL_CUDA=OFF -DMMBAL_OPENMP=OFF \
	    -DMMBAL_WERROR=ON --log-level=WARNING
	cmake --build build/cuda-on-cpu
	ctest --test-dir build/cuda-on-cpu --output-on-failure --no-tests=error -j $(JOBS)

.PHONY: gpu
gpu: ## everything that needs a GPU, and one report: tests, compute-sanitizer, benchmarks; needs no network
	$(PYTHON) tests/cuda/gpu.py $(ARGS)

.PHONY: clean
clean: ## remove what was built; .venv stays
	rm -rf build $(INSTALLED)

.PHONY: gtest
gtest:
	@has_gtest() { echo '#include <gtest/gtest.h>' | $${CXX:-c++} -E -x c++ - > /dev/null 2>&1; }; \
	install="apt-get install -y --no-install-recommends libgtest-dev"; \
	if has_gtest; then exit 0; fi; \
	if command -v apt-get > /dev/null; then \
	    if [ "$$(id -u)" = 0 ]; then apt-get update -q && $$install || true; \
	    elif sudo -n true 2> /dev/null; then sudo apt-get update -q && sudo $$install || true; fi; \
	fi; \
	has_gtest || { echo "GoogleTest is missing. Type: sudo apt-get install libgtest-dev"; exit 1; }

# A Python that was named and has torch lends its packages to the environment; the plain default starts clean.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "mmbal needs Python 3.10 or later. Type: make PYTHON=/path/to/python3 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifneq ($(origin PYTHON),file)
	@torch=$$($(PYTHON) -c "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"); \
	if [ -n "$$torch" ]; then \
	    dirname "$$(dirname "$$torch")" > "$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch-from.pth"; \
	fi
endif

# torch comes first: its version is pinned for all that pip installs after it, so that nothing brings another one.
$(VENV)/mmbal-tools: | $(VENV)/bin/python
	@$(VENV)/bin/python -c "import torch" 2> /dev/null || $(PIP) install $(TORCH)
	$(PIP) install -q scikit-build-core pybind11
	cmake --version 2> /dev/null | grep -qE ' (3\.(2[2-9]|3)|[4-9])' || $(PIP) install -q "cmake>=3.22"
	ninja --version > /dev/null 2>&1 || $(PIP) install -q ninja
	@touch $@

# open_clip, for its tests alone and where only they look: torchvision's wheel is for torch with CUDA, and one that does
# not load makes transformers fail as well (tests/torch_ext/peers.py).
$(VENV)/mmbal-open-clip: | $(VENV)/mmbal-tools
	@$(VENV)/bin/python -c "import open_clip" 2> /dev/null || \
	    $(PIP) install -q --no-deps --upgrade --target $(VENV)/open_clip "open_clip_torch>=3.1" torchvision timm ftfy wcwidth
	@touch $@

# An ordinary install, rebuilt step by step in build/, so that what is tested is what users get.
$(INSTALLED): pyproject.toml CMakeLists.txt README.md LICENSE $(sources) | $(VENV)/mmbal-tools
	@$(VENV)/bin/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(CONSTRAINTS)
	@echo "Building mmbal with $$(cat $(CONSTRAINTS)); the first time takes minutes."
	CMAKE_ARGS="$(CMAKE_INSTALLED) $${CMAKE_ARGS:-}" $(PIP) install -q -c $(CONSTRAINTS) --no-build-isolation '.[test,dev]'
	@touch $@
