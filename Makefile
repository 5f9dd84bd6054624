# make pretrain   set up everything and pretrain a small ScMoE GPT on real text
# make test       set up everything and run the test suite
# make help       all targets and variables

PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV := .venv
RUN ?= run
# What to train on: a file or folder of text or JSONL; stdlib is the Python standard library's own source.
CORPUS ?= stdlib
# Training iterations in all; a larger number continues a finished run.
ITERS ?= 300
# Which of Megatron's models holds the layers; said before anything is installed.
CONTAINER ?= gpt
ifeq ($(filter pretrain,$(MAKECMDGOALS))$(filter gpt hybrid,$(CONTAINER)),pretrain)
$(error CONTAINER is '$(CONTAINER)', which is no model of Megatron's: use gpt or hybrid)
endif

# Each corpus has a folder of its own.
FOLDER = $(RUN)/$(notdir $(CORPUS:/=))
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin

# Workers that run tests beside one another, more than 2 cores: ranks wait for one another, and processes for their start.
# A file's tests go to one of them, since they share what was made for them.
JOBS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 25

# What tests depend on, and with which contents of it test-full has passed.
TESTED := pretrain_gpt_scmoe.py requirements.txt pyproject.toml
TESTED += $(sort $(foreach kind,py sh sbatch yaml html css,$(shell find megatron_scmoe tools tests examples -name "*.$(kind)")))
PASSED := tests/full-passed.sha256

.DEFAULT_GOAL := help
.PHONY: help install pretrain test test-full test-gpu test-ci lint format docs package clean distclean

help: ## this text
	@echo "make TARGET [VARIABLE=value ...]"; echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14
	@echo; echo "variables of pretrain:"
	@echo "  CORPUS=stdlib  a file or folder of text or JSONL to train on; stdlib: the Python standard library's source"
	@echo "  ITERS=300      training iterations in all; a larger number continues a finished run"
	@echo "  CONTAINER=gpt  Megatron's model that holds the layers: gpt, or hybrid, with Mamba layers"
	@echo "  RUN=run        folder for data, checkpoints and logs"
	@echo "  ARGS=...       more flags for pretrain_gpt_scmoe.py, e.g. ARGS='--shortcut-position pos1 --overlap off'"
	@echo "  PYTHON=...     the Python 3.12 (or newer) that makes .venv"

install: $(INSTALLED) ## make .venv and install requirements.txt

$(INSTALLED): requirements.txt pyproject.toml
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	  echo "make: Python 3.12 or newer is needed, and '$(PYTHON)' is not one: install it, or say where it is:" >&2; \
	  echo "      make PYTHON=/path/to/python3.12" >&2; exit 2; fi
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install -r requirements.txt
	$(BIN)/pip install --no-deps -e .
	@touch $@

pretrain: $(INSTALLED) ## pretrain on CORPUS; a second call continues from the last checkpoint
	@$(BIN)/python tools/preprocess_data.py --input "$(CORPUS)" --document-kib 4 --output "$(FOLDER)/data"
	@CONTAINER="$(CONTAINER)" PATH="$(CURDIR)/$(BIN):$$PATH" examples/pretrain_small.sh "$(FOLDER)" $(ITERS) $(ARGS)

test: $(INSTALLED) ## the test suite: every module, every refusal, one case of each kind
	$(PYTEST)

test-full: test ## the test suite, and every other case
	$(PYTEST) -m full
	sha256sum $(TESTED) > $(PASSED).new && mv $(PASSED).new $(PASSED)

# Whatever Python there is: a container that brings its own torch has no .venv.
test-gpu: ## what a GPU has to show, at most 400 s on one; without any, a dry run of it. ARGS='--only late_wire'
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/gpu/run_parts.py $(ARGS)

test-ci: test ## what CI runs: test; and it says whether test-full has passed with the same sources
	@sha256sum $(TESTED) | cmp -s - $(PASSED) || echo "NOTE: make test-full has not passed with these sources ($(PASSED))"

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## draw docs/timeline.svg, write flags.md, refused.md, launches.md and gpu.md of docs/ anew
	$(BIN)/python docs/draw_timeline.py
	$(BIN)/python docs/flags_table.py
	$(BIN)/python docs/refused_table.py
	$(BIN)/python docs/gpu_results.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/launches.py

package: $(INSTALLED) ## build sdist and wheel into dist/, and import the package from the wheel
	rm -rf dist *.egg-info  # an old list of sources would bring files into the wheel that pyproject.toml forgets
	$(BIN)/python -m build
	$(BIN)/python .ci/check_wheel.py dist

clean: ## remove data, checkpoints and logs of make pretrain
	rm -rf $(RUN)

distclean: clean ## and .venv
	rm -rf $(VENV) dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
