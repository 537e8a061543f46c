# make help lists the targets. `make demo` and `make test` work on a fresh clone: each sets up what it needs.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
OUT ?= out
JOBS ?= 2
PART ?= 1/1
CODEGEN_VENV ?= .venv-codegen
CODEGEN_TRITON ?= triton==3.6.0
CODEGEN_OTHERS ?= 3.7.1 3.8.0 3.9.0
PYTEST_FLAGS ?= -q
# Draws of each fuzz target in C++, draws of each in the interpreter, and the seed that all draws follow from.
FUZZ_DRAWS ?= 3000
FUZZ_INTERP_DRAWS ?= 100
FUZZ_SEED ?= 0
FUZZ_TARGETS ?=
FAKE_VENV ?= .venv-fakecuda
FAKE_TORCH ?= torch==2.11.0
FAKE_CAPABILITIES ?= 80 86 100 120
FAKE_FLAGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
PYTEST := $(PY) -m pytest $(PYTEST_FLAGS)
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
BENCH_CPP := benchmarks/measure/read_all.cpp
FAKE_CPP := $(wildcard tools/fakecuda/driver/*)
# The nvcc on PATH may be a script that calls the toolkit's own. Its dry run prints the toolkit's folder.
CUDA_TOOLKIT = $(realpath $(or $(CUDA_HOME),$(shell nvcc --dryrun none.cu 2>&1 | sed -n "s/^\#\$$ TOP=//p")))
# The test files of the ops that have a C++ kernel, and of the ops that have a Triton kernel.
CPP_TESTS = $(wildcard $(patsubst csrc/cpu/%.cpp,tests/ops/test_%.py,$(wildcard csrc/cpu/*.cpp)))
TRITON_TESTS = $(wildcard $(patsubst kernels/%.py,tests/ops/test_%.py,$(wildcard kernels/*.py)))

# The tests of whole models that run in the interpreter. The other ones would take minutes there.
INTERP_MODELS = one_graph or export or functional_call or func_grad

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo '  variables: PYTHON=$(PYTHON)  TORCH="$(TORCH)"  VENV=$(VENV)  JOBS=$(JOBS)  OUT=$(OUT)'

# --- set-up: one stamp for each step that may have to be repeated ---

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'make: $(PYTHON) is missing or older than Python 3.10; name another: make PYTHON=python3.11 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo 'make: $(PYTHON) has no venv or ensurepip (Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }
	@command -v $${CXX:-c++} > /dev/null \
	  || { echo 'make: no C++ compiler (Debian and Ubuntu: apt install g++)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

TORCH_STAMP := $(VENV)/.stamp-torch-$(shell printf %s '$(TORCH)' | cksum | cut -d' ' -f1)
$(TORCH_STAMP): | $(VENV)/bin/python
	$(PIP) install "$(TORCH)" "setuptools>=77" wheel ninja
	@rm -f $(VENV)/.stamp-*; touch $@

# Installs the dependencies and the command without compiling. The extension is built separately, so that ninja can
# reuse its objects.
$(VENV)/.stamp-package: pyproject.toml $(TORCH_STAMP)
	GPT_FAST_NO_CPP=1 $(PIP) install --no-build-isolation --editable ".[dev]"
	@touch $@

$(VENV)/.stamp-extension: setup.py $(CSRC) $(TORCH_STAMP)
	@echo 'building gpt_fast._C'
	@mkdir -p build
	@$(PY) setup.py build_ext --inplace > build/extension.log 2>&1 || { cat build/extension.log >&2; exit 1; }
	@touch $@

.PHONY: install
install: $(VENV)/.stamp-package $(VENV)/.stamp-extension  ## virtual environment, torch, the package and its extension

# --- the demo ---

.PHONY: demo
demo: install  ## pre-train, fine-tune, generate, and compare with plain PyTorch (runs/demo)
	@start=$$SECONDS; set -x; \
	$(VENV)/bin/gpt-fast pretrain --out runs/demo/pretrained --steps 500 --overwrite; \
	$(VENV)/bin/gpt-fast finetune --from runs/demo/pretrained --out runs/demo/classifier --epochs 1 --overwrite; \
	$(VENV)/bin/gpt-fast evaluate --from runs/demo/classifier; \
	$(VENV)/bin/gpt-fast generate --from runs/demo/pretrained --prompt "def __init__(self" --max-new-tokens 100 --seed 0; \
	$(VENV)/bin/gpt-fast compare --from runs/demo/pretrained; \
	{ set +x; } 2> /dev/null; echo "demo: $$((SECONDS - start)) s; runs and loss curves are in runs/demo"

# --- tests ---

.PHONY: test
test: install  ## the tests on the CPU, then the Triton kernels in the interpreter
	OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --dist loadfile
	$(MAKE) --no-print-directory interp

.PHONY: interp
interp: install  ## the op tests on the Triton kernels, in Triton's interpreter, and whole models on them
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) $(TRITON_TESTS) \
	  tests/ops/test_activations.py tests/ops/test_transforms.py \
	  tests/fuzz/test_ops.py tests/fuzz/test_opinfo.py tests/fuzz/test_bounds.py
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) tests/model/test_torch_tools.py -k "gpt2 and ($(INTERP_MODELS))"

.PHONY: test-slow
test-slow: install mutants  ## the planted faults, then the tests that take too long for make test
	$(PYTEST) -m slow

.PHONY: fuzz
fuzz: install  ## compare drawn calls of every op with the reference, in C++ and in the interpreter (FUZZ_DRAWS=3000)
	$(PY) -m tests.fuzz $(FUZZ_TARGETS) --draws $(FUZZ_DRAWS) --seed $(FUZZ_SEED) --jobs $(JOBS)
	TRITON_INTERPRET=1 $(PY) -m tests.fuzz $(FUZZ_TARGETS) --draws $(FUZZ_INTERP_DRAWS) --seed $(FUZZ_SEED) --jobs $(JOBS)

.PHONY: mutants
mutants: install  ## plant faults in the kernels; the tests must catch every one (PART=2/6: every sixth of them)
	$(PY) -m tests.mutants --jobs $(JOBS) --part $(PART)

.PHONY: sanitize
sanitize: install  ## the op tests on a C++ extension built with the address and undefined-behaviour sanitizers
	@mkdir -p build/sanitize
	cp -R csrc gpt_fast gpt_fast_cli gpt_fast_settings kernels tests setup.py pyproject.toml README.md LICENSE build/sanitize
	rm -f build/sanitize/gpt_fast/_C*
	cd build/sanitize && GPT_FAST_SANITIZE=1 $(abspath $(PY)) setup.py build_ext --inplace > build.log 2>&1
	cd build/sanitize && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  $(abspath $(PY)) -m pytest $(PYTEST_FLAGS) -p no:cacheprovider $(CPP_TESTS) \
	  -k 'not peak_memory and not memory_is_linear'  # these tests would count the sanitizer's own memory

# --- the stand-in for CUDA ---

FAKE_PY := $(abspath $(FAKE_VENV))/bin/python
FAKE_TREE := build/fakecuda/tree
FAKE_PARTS := csrc gpt_fast gpt_fast_cli gpt_fast_settings kernels tests tools benchmarks examples .ci
FAKE_RUN = cd $(FAKE_TREE) && CUDA_HOME="$(CUDA_TOOLKIT)" PATH=$(abspath $(FAKE_VENV))/bin:$$PATH PYTHONPATH=$(abspath $(FAKE_TREE)) OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
  TRITON_CACHE_DIR=$(abspath build/fakecuda/triton) $(FAKE_PY) -m tools.fakecuda --library $(abspath build/fakecuda/lib)
FAKE_PYTEST = $(FAKE_PY) -m pytest $(PYTEST_FLAGS) -p no:cacheprovider tests/fakecuda $(FAKE_FLAGS)

# PyTorch's CUDA build comes from PyPI alone: pip's settings may prefer a mirror that has the CPU build of the version.
$(FAKE_VENV)/.stamp:
	@echo 'fake-gpu: downloading 4.7 GB, PyTorch with CUDA and its libraries, into $(FAKE_VENV)'
	$(PYTHON) -m venv $(FAKE_VENV)
	PIP_FIND_LINKS= PIP_CONFIG_FILE=/dev/null $(FAKE_PY) -m pip --disable-pip-version-check --quiet install \
	  "$(FAKE_TORCH)" "setuptools>=77,<82" wheel ninja
	PIP_FIND_LINKS= PIP_CONFIG_FILE=/dev/null GPT_FAST_NO_CPP=1 $(FAKE_PY) -m pip --disable-pip-version-check --quiet \
	  install --no-build-isolation --editable ".[train,hf,bench]"
	@touch $@

# This target builds in a copy of the tree, because the extension of this tree has the same name and is for another
# PyTorch.
.PHONY: fake-build
fake-build: $(FAKE_VENV)/.stamp
	@mkdir -p $(FAKE_TREE)
	@rm -rf $(addprefix $(FAKE_TREE)/,tests tools benchmarks)
	@tar cf - --exclude='_C*' --exclude=__pycache__ $(FAKE_PARTS) setup.py pyproject.toml README.md LICENSE Makefile \
	  | tar xf - -C $(FAKE_TREE)
	@test -d "$(CUDA_TOOLKIT)" \
	  || { echo 'make fake-gpu: no CUDA toolkit; expected nvcc on PATH or its folder in CUDA_HOME' >&2; exit 1; }
	cd $(FAKE_TREE) && CUDA_HOME="$(CUDA_TOOLKIT)" PATH=$(abspath $(FAKE_VENV))/bin:$$PATH GPT_FAST_CUDA=1 \
	  $(FAKE_PY) setup.py build_ext --inplace > ../extension.log 2>&1 || { cat ../extension.log >&2; exit 1; }
	cd $(FAKE_TREE) && CUDA_HOME="$(CUDA_TOOLKIT)" $(FAKE_PY) -m tools.fakecuda.build ../lib

.PHONY: fake-gpu
fake-gpu: fake-build  ## the library on a stand-in for CUDA that runs no kernel (needs nvcc; downloads 4.7 GB)
	$(FAKE_RUN) --devices 1 -- $(FAKE_PYTEST)
	$(FAKE_RUN) --devices 2 -- $(FAKE_PYTEST)
	for capability in $(FAKE_CAPABILITIES); do \
	  ($(FAKE_RUN) --capability $$capability -- $(FAKE_PYTEST)) || exit 1; done

# --- gates ---

$(CODEGEN_VENV)/.stamp: | $(VENV)/bin/python
	$(PY) -m venv $(CODEGEN_VENV)
	$(CODEGEN_VENV)/bin/python -m pip --disable-pip-version-check --quiet install "$(CODEGEN_TRITON)" setuptools numpy
	@touch $@

.PHONY: codegen-triton
codegen-triton: $(VENV)/.stamp-package $(CODEGEN_VENV)/.stamp
	@mkdir -p build
	$(PY) -m tools.record_launches build/launches.json
	$(CODEGEN_VENV)/bin/python -m tools.codegen build/launches.json $(CODEGEN_FLAGS)

# Each of the other releases of Triton that come with PyTorch 2.10 to 2.15 has an environment of its own.
.PHONY: codegen-all
codegen-all:  ## compile every kernel for sm_90 with Triton 3.7, 3.8 and 3.9, each with its own budget
	for version in $(CODEGEN_OTHERS); do \
	  $(MAKE) --no-print-directory codegen-triton CODEGEN_TRITON=triton==$$version \
	    CODEGEN_VENV=$(CODEGEN_VENV)-$$version CODEGEN_FLAGS="--targeted $(CODEGEN_FLAGS)" || exit 1; done

.PHONY: codegen
codegen: codegen-triton  ## compile every kernel for every architecture and hold it to its budget
	@command -v nvcc > /dev/null || { echo 'codegen: no nvcc, csrc/cuda is not compiled'; exit 0; }; \
	cublas=$$($(PY) -m tools.cublas_headers $(CODEGEN_VENV)/cublas); \
	nvcc="nvcc -std=c++17 -O3 -Xptxas=-warn-spills -Xcompiler=-Wall -Werror=all-warnings -I$$cublas -o build/nvcc.o -c"; \
	targets=$$($(PY) -m kernels.architectures); \
	for target in $$targets; do for file in csrc/cuda/*.cu; do $$nvcc -arch=sm_$$target $$file; done; done; \
	$$nvcc csrc/cuda/cublaslt.cpp; \
	echo 'codegen: csrc/cuda compiled by nvcc without spills for' $$targets

.PHONY: compile-isa
compile-isa: $(VENV)/.stamp-package  ## compile the C++ kernels for AVX2, AVX-512 and AVX-512 with bfloat16 products
	$(PY) -m tools.isa

.PHONY: lint
lint: $(VENV)/.stamp-package  ## ruff and clang-format, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) $(BENCH_CPP) $(FAKE_CPP)

.PHONY: format
format: $(VENV)/.stamp-package  ## ruff and clang-format, rewriting
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC) $(BENCH_CPP) $(FAKE_CPP)
	$(PY) -m ruff check --fix .  # last, because it stops at what it cannot mend

.PHONY: types
types: $(VENV)/.stamp-package  ## mypy
	$(PY) -m mypy

# --- measurements ---

.PHONY: bench
bench: install  ## time everything against floors and other implementations, into benchmarks/results (BENCH_FLAGS=--quick)
	$(PY) -m benchmarks --out benchmarks/results $(BENCH_FLAGS)
	$(PY) -m benchmarks.report

.PHONY: report
report: install  ## write every table and plot of benchmarks/results and README.md again
	$(PY) -m benchmarks.report

.PHONY: gpu
gpu:  ## the first minutes on a GPU: make gpu PART=1, then PART=2, PYTHON=python3 OUT=dir (no environment, no downloads)
	$(if $(CUDA_TOOLKIT),CUDA_HOME="$(CUDA_TOOLKIT)") PYTHON="$(PYTHON)" OUT="$(OUT)" PART="$(firstword $(subst /, ,$(PART)))" .ci/gpu

# --- documentation ---

$(VENV)/.stamp-docs: pyproject.toml $(VENV)/.stamp-package
	GPT_FAST_NO_CPP=1 $(PIP) install --no-build-isolation --editable ".[docs]"
	@touch $@

.PHONY: docs
docs: $(VENV)/.stamp-docs  ## the documentation, in build/docs; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo 'documentation: build/docs/index.html'

# --- packages ---

.PHONY: dist
dist: install  ## write to dist/: the sources, one wheel with the extension (AVX2, two kinds of AVX-512) and one without
	$(PY) -m build --no-isolation --sdist
	@rm -rf build/wheel
	GPT_FAST_PORTABLE=1 $(PY) -m build --no-isolation --wheel --outdir build/wheel
	@# The excluded libraries come with PyTorch: a second libgomp would start threads of its own.
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair --wheel-dir dist \
	  --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcu*' --exclude libgomp.so.1 build/wheel/*.whl
	GPT_FAST_NO_CPP=1 $(PY) -m build --no-isolation --wheel

.PHONY: clean
clean:  ## remove build outputs, but not the environments
	rm -rf build dist *.egg-info gpt_fast/_C*.so gpt_fast/_C.json gpt_fast/_isa .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.stamp-extension
