# Every target calls the `tsugiki` console script; `make help` lists them.
export PYTHONSAFEPATH = 1
DOMAIN ?= setsubi
BASE ?= tiny-llama
RUNS ?= runs
CORPUS ?=
CUDA ?=
PYTHON ?= python3

BIN := .venv/bin
ARGS = "$(DOMAIN)" --base "$(BASE)" --runs "$(RUNS)"
# Forced into llama.cpp's compilation: matrix tiles (AMX) that do not crash. The flag takes no path with a space.
TILES := $(if $(word 2,$(CURDIR)),,-DCMAKE_CXX_FLAGS=-include$(CURDIR)/evaluate/amx_tiles.h)
# llama.cpp is compiled for this machine, without its programs.
LLAMA := $(TILES) -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF $(if $(CUDA),-DGGML_CUDA=on)
STAMP := .venv/.installed$(if $(CUDA),-cuda)

.PHONY: help setup recipe chat compare scale test lint upstream bench tiny-bases clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo; echo "variables: DOMAIN=$(DOMAIN) BASE=$(BASE) RUNS=$(RUNS) SET=\"sweep.epochs=3 …\" DATA_DIR= CORPUS= CUDA=1"

setup: $(STAMP)  ## create .venv and install everything (CUDA=1: llama.cpp for an NVIDIA GPU)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; llama.cpp is compiled for this machine, which takes a few minutes"
	@$(BIN)/pip install -qq --upgrade pip
	@CMAKE_ARGS="$(LLAMA)" $(BIN)/pip install -qq -c constraints.txt -e ".[test$(if $(CUDA),$(comma)gpu)]"
	@touch $@

comma := ,

recipe: setup  ## adapt, quantize and prove: make recipe DOMAIN=construction BASE=tiny-llama
	@$(BIN)/tsugiki recipe run $(ARGS) $(if $(DATA_DIR),--data-dir "$(DATA_DIR)") $(foreach s,$(SET),--set '$(s)')

chat: setup  ## talk to the finished model
	@$(BIN)/tsugiki chat $(ARGS) $(if $(LEVEL),--level $(LEVEL))

compare: setup  ## the same questions to every quantization level
	@$(BIN)/tsugiki compare $(ARGS)

scale: setup  ## score against compute: published models and yours, laws and figures (SCORES=FILE)
	@$(BIN)/tsugiki evaluate scaling --runs "$(RUNS)" $(if $(SCORES),--scores "$(SCORES)")

test: setup  ## run the tests
	@$(BIN)/pytest -n 2 --dist loadfile

lint: setup  ## check style
	@$(BIN)/ruff check .

# llama.cpp's own programs and converter, from llama-cpp-python's source archive, to be compared with.
UPSTREAM := build/upstream
upstream: setup  ## build llama.cpp's own programs, for the side-by-side runs of make bench
	@test -x $(UPSTREAM)/bin/llama-bench || { set -e; mkdir -p build/llama-cpp-python; \
	$(BIN)/pip download -q -c constraints.txt --no-deps --no-binary llama-cpp-python -d build llama-cpp-python; \
	tar xzf build/llama_cpp_python-*.tar.gz -C build/llama-cpp-python --strip-components=1; \
	cmake -S build/llama-cpp-python/vendor/llama.cpp -B $(UPSTREAM) -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF $(TILES) \
	-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF > /dev/null; \
	cmake --build $(UPSTREAM) -j --target llama-quantize llama-imatrix llama-perplexity llama-bench > /dev/null; }

bench: upstream  ## time the parts side by side; tables here, numbers in build/bench (an hour; alone: make bench ONLY=repair_curve)
	@$(BIN)/pip install -qq -c constraints.txt -e ".[bench]"
	@mkdir -p build/bench; failed=; for file in benchmarks/$(or $(ONLY),*).py; do \
	TSUGIKI_UPSTREAM=$(UPSTREAM)/bin TSUGIKI_LLAMA_CPP=build/llama-cpp-python/vendor/llama.cpp \
	$(BIN)/python $$file --json build/bench/$$(basename $$file .py).json || failed="$$failed $$file"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

tiny-bases: setup  ## pre-train the bundled bases from a folder of text: make tiny-bases CORPUS=DIR
	@$(BIN)/tsugiki recipe tiny-bases --corpus "$(CORPUS)"

clean:  ## remove .venv (runs stay)
	rm -rf .venv
