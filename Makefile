# make up      a supervised daemon on the embedded model (GGUF=/path: on your own file), one question asked
# make webui   Open WebUI on loopback with the Pipe in it
# make test    everything that CI runs
# make down    stops what `up` and `webui` started
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.SILENT:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Slow set-ups that outlive a checkout: Open WebUI (3 GB), the built llama.cpp.
export KTD_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ktd
WEBUI_VERSION := 0.12.4
WEBUI_ENV := $(KTD_CACHE)/webui-$(WEBUI_VERSION)
PEERS_VERSION := 0.3.36
# llama.cpp is built for the processor at hand, so an environment made on another one is not reused.
PEERS_ENV := $(KTD_CACHE)/peers-$(PEERS_VERSION)-$(shell grep -m1 '^flags' /proc/cpuinfo | cksum | cut -d' ' -f1)
PEERS_AVX2 := $(KTD_CACHE)/peers-avx2-$(PEERS_VERSION)
export KTD_PEERS_PYTHON := $(PEERS_ENV)/bin/python
export KTD_WEBUI_ENV := $(WEBUI_ENV)
# Compiled kernels outlive a checkout too.
ifneq ($(shell command -v ccache 2>/dev/null),)
export CMAKE_CXX_COMPILER_LAUNCHER := ccache
export CCACHE_DIR ?= $(KTD_CACHE)/ccache
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
endif
# So does what mypy found out: it looks at the contents of a file before it believes this.
export MYPY_CACHE_DIR ?= $(KTD_CACHE)/mypy
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet
SANITIZE := build/sanitize
AVX2_TYPES := Q4_0,Q4_1,Q5_0,Q5_1,Q8_0,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,IQ1_S,IQ1_M,IQ2_XXS,IQ2_XS,IQ2_S,IQ3_XXS,IQ3_S,IQ4_NL,IQ4_XS,TQ1_0,TQ2_0,MXFP4
SOURCES := $(shell find kernels/csrc -type f) CMakeLists.txt pyproject.toml

# Seconds a stage of `make test` is meant to take on two quiet cores: 25 minutes together, 60 with a cold set-up.
# What takes longer is told; what takes three times as long is stopped as hung.
BUDGET_SETUP := 2400
BUDGET_LINT := 70
BUDGET_TESTS := 580
BUDGET_SANITIZE := 215
BUDGET_QEMU := 220
BUDGET_PEERS := 50
BUDGET_WEBUI := 215

.PHONY: help proto stub up down webui test lint bench wheel clean tests tests-sanitize tests-qemu tests-peers tests-webui peers peers-avx2 bench-avx2 webui-env format bench-pipe pictures

help:
	sed -n '1,4s/^# //p' Makefile

$(VENV)/.created:
	PYTHON=$(PYTHON) deploy/require.sh g++ python3-venv python3-dev
	$(PYTHON) -c 'import sys; sys.exit("ktd needs Python 3.11 or newer: set PYTHON=python3.12, say") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	touch $@

# An already installed torch (a CUDA build from your own index) is left alone.
$(VENV)/.run: $(VENV)/.created pyproject.toml constraints.txt
	echo "Installing the Python packages of ktd into $(VENV)"
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt 'scikit-build-core>=1.0' 'nanobind>=2.4' ninja cmake
	$(BIN)/python deploy/requirements.py | $(PIP) -c constraints.txt -r /dev/stdin
	touch $@

$(VENV)/.dev: $(VENV)/.run
	echo "Installing what the tests need into $(VENV)"
	$(BIN)/python deploy/requirements.py dev | $(PIP) -c constraints.txt -r /dev/stdin
	touch $@

$(VENV)/.built: $(VENV)/.run $(SOURCES)
	echo "Building the kernels (a minute or two)"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	touch $@

up: $(VENV)/.built
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/up.sh "$(GGUF)"

down:
	$(BIN)/python deploy/webui.py stop
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/stop.sh

webui: $(VENV)/.built webui-env
	$(BIN)/python deploy/webui.py start

$(WEBUI_ENV)/.ready:
	echo "Installing Open WebUI $(WEBUI_VERSION) into $(WEBUI_ENV): about 3 GB, a few minutes"
	rm -rf $(WEBUI_ENV); mkdir -p $(KTD_CACHE)
	$(PYTHON) -m venv $(WEBUI_ENV)
	$(WEBUI_ENV)/bin/pip install --quiet -c constraints.txt torch
	$(WEBUI_ENV)/bin/pip install --quiet -c constraints.txt open-webui==$(WEBUI_VERSION)
	touch $@

webui-env: $(WEBUI_ENV)/.ready

$(PEERS_ENV)/.ready:
	echo "Building llama-cpp-python $(PEERS_VERSION) into $(PEERS_ENV): about 7 minutes"
	rm -rf $(PEERS_ENV); mkdir -p $(KTD_CACHE)
	$(PYTHON) -m venv $(PEERS_ENV)
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF' \
	  $(PEERS_ENV)/bin/pip install --quiet llama-cpp-python==$(PEERS_VERSION) numpy
	touch $@

peers: $(PEERS_ENV)/.ready

# Only the products are needed of the AVX2 build, not the models: ggml alone, from the same sources.
$(PEERS_AVX2)/.ready: $(VENV)/.run
	echo "Building ggml of llama-cpp-python $(PEERS_VERSION) for AVX2 into $(PEERS_AVX2): about 2 minutes"
	rm -rf $(PEERS_AVX2); mkdir -p $(PEERS_AVX2)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip download --quiet --no-deps --no-binary :all: --no-build-isolation -d $(PEERS_AVX2) llama-cpp-python==$(PEERS_VERSION)
	tar xzf $(PEERS_AVX2)/*.tar.gz -C $(PEERS_AVX2) --strip-components=3 --wildcards '*/vendor/llama.cpp/ggml'
	rm $(PEERS_AVX2)/*.tar.gz
	printf 'cmake_minimum_required(VERSION 3.18)\nproject(peer C CXX)\nadd_subdirectory(ggml)\n' >$(PEERS_AVX2)/CMakeLists.txt
	PATH="$(CURDIR)/$(BIN):$$PATH"
	cmake -S $(PEERS_AVX2) -B $(PEERS_AVX2)/build -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF \
	  -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF >/dev/null
	cmake --build $(PEERS_AVX2)/build --target ggml-cpu >/dev/null
	touch $@

peers-avx2: $(PEERS_AVX2)/.ready

test:
	for stage in setup lint tests sanitize qemu peers webui; do
	  start=$$SECONDS; echo "== $$stage"
	  case $$stage in
	    setup) limit=$(BUDGET_SETUP); goal="test-setup" ;;
	    lint) limit=$(BUDGET_LINT); goal="lint" ;;
	    tests) limit=$(BUDGET_TESTS); goal="tests" ;;
	    sanitize) limit=$(BUDGET_SANITIZE); goal="tests-sanitize" ;;
	    qemu) limit=$(BUDGET_QEMU); goal="tests-qemu" ;;
	    peers) limit=$(BUDGET_PEERS); goal="tests-peers" ;;
	    webui) limit=$(BUDGET_WEBUI); goal="tests-webui" ;;
	  esac
	  timeout --foreground $$((3 * limit)) $(MAKE) --no-print-directory $$goal
	  took=$$((SECONDS - start))
	  echo "== $$stage took $$took s of $$limit s$$([ $$took -le $$limit ] || echo ', OVER ITS BUDGET')"
	done

.PHONY: test-setup
test-setup:
	deploy/require.sh ccache chromium chromium-driver fonts-noto-cjk qemu-user-static binutils g++-aarch64-linux-gnu
	$(MAKE) --no-print-directory $(VENV)/.dev $(VENV)/.built peers webui-env

lint: $(VENV)/.dev $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find kernels/csrc -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/mypy --scripts-are-modules deploy/*.py plugin/*.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	find kernels/csrc -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format -i

# The files of few long tests first, or one process would wait for the other at the end.
tests: $(VENV)/.dev $(VENV)/.built
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not peers and not webui' \
	  --cov --cov-report=term:skip-covered tests/repo tests/deploy tests/embedded tests

# The kernels with AddressSanitizer and UndefinedBehaviorSanitizer: a read or write past a buffer ends the run, told on
# the terminal (-s). The environment of their own finds this module first; an editable install would hand out its own.
# Left out is what touches no other memory than the rest, only more often, and what counts pages: the sanitizer's are
# among them.
tests-sanitize: $(VENV)/.dev
	export PATH="$(CURDIR)/$(BIN):$$PATH"
	cmake -S . -B $(SANITIZE)/cmake -G Ninja -DKTD_SANITIZE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python >/dev/null
	cmake --build $(SANITIZE)/cmake >$(SANITIZE)/build.log || { cat $(SANITIZE)/build.log; exit 1; }
	rm -rf $(SANITIZE)/ktd_kernels; cp -r kernels/ktd_kernels $(SANITIZE)/
	cp $(SANITIZE)/cmake/kernels/csrc/_C*.so $(SANITIZE)/ktd_kernels/
	python -m venv --clear --without-pip $(SANITIZE)/venv
	path=$$($(SANITIZE)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ktd.pth
	{ echo $(CURDIR)/$(SANITIZE); python -c 'import sys; print(*sys.path[1:], sep="\n")'; } >$$path
	export LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
	$(SANITIZE)/venv/bin/python -c 'from ktd_kernels import _C; assert _C.__file__.startswith("$(CURDIR)/$(SANITIZE)/"), _C.__file__'
	$(SANITIZE)/venv/bin/python -m pytest -q -s -x -n 2 -p no:cacheprovider tests/kernels -m 'not slow' \
	  -k 'not size_of_r1 and not depend and not extreme and not threads_ and not tiles_match and not touched_by'

# The scalar and AVX2 kernels on processors that have nothing newer: a wrong instruction traps. Those that have AVX2 leave
# the scalar ones to the others.
tests-qemu: $(VENV)/.dev $(VENV)/.built
	$(MAKE) --no-print-directory -j2 -Otarget tests-qemu-Nehalem tests-qemu-Haswell

tests-qemu-%:
	echo "A $*:"
	qemu-x86_64-static -cpu $* $(BIN)/python -m pytest -q -p no:cacheprovider tests/kernels -m 'not slow' \
	  $(if $(filter Haswell,$*),-k 'not scalar')

tests-peers: $(VENV)/.dev $(VENV)/.built peers
	$(BIN)/python -m pytest -q -m peers

tests-webui: $(VENV)/.dev $(VENV)/.built webui-env
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m webui

# The README's table: our kernels and llama.cpp's on the same blocks, in turns.
bench: $(VENV)/.built peers
	$(BIN)/ktd bench kernels --types Q8_0,Q4_K,Q6_K,IQ1_S,IQ2_XXS,IQ3_XXS --tokens 1,512 --threads 1 --against llama.cpp --peer-lib $(PEERS_ENV)

# What the Pipe adds to each token, and what other requests of Open WebUI notice of it (docs/pipe.md).
bench-pipe: $(VENV)/.dev $(VENV)/.built webui-env
	$(BIN)/python tests/webui/overhead.py

# The pictures of the documentation, from the real page.
pictures: $(VENV)/.dev $(VENV)/.built webui-env
	$(BIN)/python tests/webui/screenshots.py

# Our AVX2 kernels and llama.cpp built for AVX2, every type; about 5 minutes.
bench-avx2: $(VENV)/.built peers-avx2
	$(BIN)/ktd bench kernels --isa avx2 --tokens 1,512 --threads 1 --types $(AVX2_TYPES) --against llama.cpp --peer-lib $(PEERS_AVX2)

# Regenerates the committed gRPC code from the proto file.
proto: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --mypy_out=proto \
	  --grpc_python_out=proto --mypy_grpc_out=proto ktd_proto/v1/engine.proto

# Regenerates the committed types of the kernel module.
stub: $(VENV)/.built
	$(BIN)/python -m nanobind.stubgen -q -m ktd_kernels._C -o kernels/ktd_kernels/_C.pyi

wheel: $(VENV)/.run
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip wheel --quiet --no-build-isolation --no-deps -w dist .
	ls dist/*.whl

clean: down
	rm -rf build dist $(VENV) run
