# `make` lists what there is. Everything runs in .venv, which the first target that needs it creates.

# What `make engine` builds.
MODEL       ?= smollm2-135m
KEEP        ?= 0.8
MEMORY      ?=
RUNTIME     ?=
EFFORT      ?= fast
TARGET      ?= auto
OUT         ?=
CALIBRATION ?=
EVAL        ?=
RESUME      ?=
OVERWRITE   ?=
ARGS        ?=

# What `make driving` makes: a folder, the steps of training, and scenes to train on.
DRIVING     ?= artefacts/driving
STEPS       ?= 3600
SCENES      ?= 2000
QAT_STEPS   ?= 100

# How the environment is made.
PYTHON      ?= python3
EXTRAS      ?=
VERBOSE     ?=

STAMP   := .venv/.skipcat-setup.json
DEV     := .venv/.skipcat-dev
VENV    := .venv/bin/
SOURCES := pipeline validate benchmarks ort_plugins trt_plugins tools tests

# RESUME=0 and RESUME=no mean what they say.
flag    = $(if $(filter-out 0 no false,$($(1))),$(2))
comma   := ,
setting = $(if $($(1)),$(2) "$($(1))")
engine_flags = $(strip $(call setting,OUT,-o) $(call setting,MEMORY,--memory) $(call setting,RUNTIME,--runtime) $(call setting,CALIBRATION,--calibration) \
    $(call setting,EVAL,--eval-text) $(call flag,RESUME,--resume) \
    $(call flag,OVERWRITE,--overwrite) $(ARGS))
setup_flags = $(strip $(call setting,EXTRAS,--extras) $(call flag,VERBOSE,--verbose))

.DEFAULT_GOAL := help
.PHONY: engine driving plugin test test-slow lint lint-style lint-format lint-types lint-spelling lint-figures \
    lint-tensorrt format docs table bench doctor setup clean help
.DELETE_ON_ERROR:

engine: $(STAMP) ## Compress MODEL, export it, build its engine, and validate every stage
	$(VENV)skipcat build -m "$(MODEL)" --keep-params $(KEEP) --effort $(EFFORT) --target $(TARGET) $(engine_flags)

# A folder that is there is finished: what was interrupted goes on when called again.
driving: $(DRIVING)/ledger $(DRIVING)/ledger-int8 $(DRIVING)/seen ## Draw scenes, train the driving network, float and int8; export, engine, validate, look

$(DRIVING)/scenes: | $(STAMP)
	$(VENV)python tools/draw_scenes.py -o $@ --scenes $(SCENES)

$(DRIVING)/net: | $(DRIVING)/scenes
	$(VENV)skipcat train -o $@ --data $|/wide --second-data $|/dense --steps $(STEPS) --resume $(ARGS)

$(DRIVING)/onnx: | $(DRIVING)/net
	$(VENV)skipcat export $| -o $@

$(DRIVING)/onnx-fp16: | $(DRIVING)/net
	$(VENV)skipcat export $| -o $@ --dtype float16

$(DRIVING)/engine: | $(DRIVING)/onnx-fp16
	@if $(VENV)python -c "import tensorrt_rtx" 2>/dev/null; \
	then $(VENV)skipcat engine $| -o $@ --target sm86; \
	else echo "no engine: tensorrt_rtx is not installed (make setup EXTRAS=rtx)"; fi

$(DRIVING)/ledger: | $(DRIVING)/onnx $(DRIVING)/engine
	$(VENV)skipcat validate --original $(DRIVING)/net --onnx $(DRIVING)/onnx --onnx $(DRIVING)/onnx-fp16 \
	    $$(test -d $(DRIVING)/engine && echo --engine $(DRIVING)/engine) --data $(DRIVING)/scenes/wide -o $@

$(DRIVING)/int8: | $(DRIVING)/net
	$(VENV)skipcat compress -m $| -o $@ --method int8 --runtime tensorrt --calibration $(DRIVING)/scenes/wide --resume

$(DRIVING)/int8-trained: | $(DRIVING)/int8
	$(VENV)skipcat recover $| -o $@ --data $(DRIVING)/scenes/wide --teacher $(DRIVING)/net --steps $(QAT_STEPS) --batch-size 8 --resume

$(DRIVING)/onnx-int8: | $(DRIVING)/int8-trained
	$(VENV)skipcat export $| -o $@ --dtype float32

$(DRIVING)/engine-int8: | $(DRIVING)/onnx-int8
	@if $(VENV)python -c "import tensorrt_rtx" 2>/dev/null; \
	then $(VENV)skipcat engine $| -o $@ --target sm86; \
	else echo "no engine: tensorrt_rtx is not installed (make setup EXTRAS=rtx)"; fi

$(DRIVING)/ledger-int8: | $(DRIVING)/onnx-int8 $(DRIVING)/engine-int8
	$(VENV)skipcat validate --original $(DRIVING)/net --beside $(DRIVING)/int8 --checkpoint $(DRIVING)/int8-trained \
	    --onnx $(DRIVING)/onnx-int8 $$(test -d $(DRIVING)/engine-int8 && echo --engine $(DRIVING)/engine-int8) \
	    --data $(DRIVING)/scenes/wide -o $@

$(DRIVING)/seen: | $(DRIVING)/onnx
	$(VENV)skipcat run $| --image $(DRIVING)/scenes/wide/images/100k/val -o $@

plugin: ## Compile the TensorRT plugin; TENSORRT_ROOT=, CUDA_HOME= choose; ARGS="--architectures 86-real"
	$(PYTHON) tools/build_plugin.py $(ARGS)

test: $(DEV) ## Run the fast tests: no network, no GPU
	$(VENV)python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(DEV) ## Run the slow tests: the real model, about an hour; ARGS="-n 0" one at a time
	$(VENV)python -m pytest -m slow --timeout 1800 -n auto --maxprocesses 2 --dist loadfile $(ARGS)

lint: lint-style lint-format lint-types lint-spelling lint-figures ## Check style, types, spelling, figures

# One target for each, so that `make --keep-going lint` shows the findings of all.
lint-style: $(DEV)
	$(VENV)ruff check .

lint-format: $(DEV)
	$(VENV)ruff format --check .

lint-types: $(DEV)
	$(VENV)mypy

lint-spelling: $(DEV)
	$(VENV)codespell

lint-figures: $(DEV)
	$(VENV)python -m benchmarks.documentation.write --check
	$(VENV)python tools/write_tree.py --check

lint-tensorrt: $(DEV) ## Check what calls TensorRT against its published stubs, from PyPI
	$(VENV)python tools/check_tensorrt_types.py

format: $(DEV) ## Rewrite the sources in house style
	$(VENV)ruff check --fix-only --quiet .
	$(VENV)ruff format .

docs: $(DEV) ## Write the figures and the tree of the documentation; ARGS=--check only looks
	$(VENV)python -m benchmarks.documentation.write $(ARGS)
	$(VENV)python tools/write_tree.py $(ARGS)

table: $(DEV) ## Measure the README's table of compression methods
	$(VENV)python -m benchmarks.quality.quality $(ARGS)

bench: $(DEV) ## Measure time, memory and disk of every stage against the targets
	$(VENV)python -m benchmarks.stages.stages $(ARGS)

doctor: $(STAMP) ## Say what this machine can do, and why
	$(VENV)skipcat doctor $(ARGS)

setup: ## Create .venv, or find that it is complete; EXTRAS=dev,hub adds to it
	@$(PYTHON) tools/setup_environment.py $(setup_flags)

$(STAMP): pyproject.toml tools/setup_environment.py
	@$(PYTHON) tools/setup_environment.py $(setup_flags)

# What tests, lint and benchmarks need beside what the program needs.
$(DEV): pyproject.toml tools/setup_environment.py
	@$(MAKE) --no-print-directory setup EXTRAS="dev$(if $(EXTRAS),$(comma)$(EXTRAS))"
	@touch $@

clean: ## Remove caches and build products; .venv and artefacts/ stay
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## List the targets and the variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables of make engine, with their defaults:'
	@echo '  MODEL=$(MODEL)  alias, hub id, local folder or .gguf file'
	@echo '  KEEP=$(KEEP)  fraction of the decoder-linear parameters that is kept'
	@echo '  MEMORY=  bytes that all weights may take, such as 70MB: ranks and bits are searched, not KEEP'
	@echo '  RUNTIME=  whose low-bit formats: cpu (default) or tensorrt'
	@echo '  EFFORT=$(EFFORT)  fast, default or max: minutes against quality, see the README'
	@echo '  TARGET=$(TARGET)  GPU to build the engine for (skipcat doctor lists them)'
	@echo '  OUT=  folder to write        CALIBRATION=  text to calibrate on'
	@echo '  EVAL=  text to evaluate on   RESUME=1, OVERWRITE=1'
	@echo 'Variables of make driving, with their defaults:'
	@echo '  DRIVING=$(DRIVING)  folder to write; what lies in it is not made again'
	@echo '  STEPS=$(STEPS)  of training   SCENES=$(SCENES)  to train on   QAT_STEPS=$(QAT_STEPS)  under rounding'
	@echo 'Of every target:  ARGS=  further arguments'
	@echo 'Of make setup:    EXTRAS=  further packages   PYTHON=$(PYTHON)   VERBOSE=1'
