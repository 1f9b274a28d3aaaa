# Every target calls the `tsugiki` console script; `make help` lists them.
export PYTHONSAFEPATH = 1
DOMAIN ?= setsubi
BASE ?= tiny-llama
RUNS ?= runs
CORPUS ?=
CUDA ?=
PYTHON ?= python3

BIN := .venv/bin
ARGS = $(DOMAIN) --base $(BASE) --runs $(RUNS)
# llama.cpp is compiled for this machine, without its programs.
LLAMA := -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF $(if $(CUDA),-DGGML_CUDA=on)
STAMP := .venv/.installed$(if $(CUDA),-cuda)

.PHONY: help setup recipe chat compare scale test lint bench tiny-bases clean

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
	@$(BIN)/tsugiki recipe run $(ARGS) $(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(foreach s,$(SET),--set '$(s)')

chat: setup  ## talk to the finished model
	@$(BIN)/tsugiki chat $(ARGS) $(if $(LEVEL),--level $(LEVEL))

compare: setup  ## the same questions to every quantization level
	@$(BIN)/tsugiki compare $(ARGS)

scale: setup  ## score against compute: published models and yours, laws and figures (SCORES=FILE)
	@$(BIN)/tsugiki evaluate scaling --runs $(RUNS) $(if $(SCORES),--scores "$(SCORES)")

test: setup  ## run the tests
	@$(BIN)/pytest

lint: setup  ## check style
	@$(BIN)/ruff check .

bench: setup  ## time the parts side by side
	@for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

tiny-bases: setup  ## pre-train the bundled bases from a folder of text: make tiny-bases CORPUS=DIR
	@$(BIN)/tsugiki recipe tiny-bases --corpus "$(CORPUS)"

clean:  ## remove .venv (runs stay)
	rm -rf .venv
