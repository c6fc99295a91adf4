# Front door for people and CI. `make help` lists the targets; each says what it does as it runs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A folder of wheels for sites without a package index, and for a CPU build of torch.
PIP_FLAGS := --disable-pip-version-check $(if $(WEIGHTSMITH_WHEELS),--find-links $(WEIGHTSMITH_WHEELS))

# A mirror may have a bad minute: three tries.
define download
for pause in 5 20 0; do \
  $(1) && exit 0; \
  [ $$pause = 0 ] || { echo "setup: that failed; again in $$pause s, in case a download broke off" >&2; sleep $$pause; }; \
done; \
echo "setup: no package index? pip's own configuration is used, WEIGHTSMITH_WHEELS may name a folder of wheels" >&2; exit 1
endef

# What a machine has one of, so that only one test at a time may use it: the engine's names; a
# cluster's ports, and the memory that a server of vLLM takes. All else is a test's own.
ONE := docker or ray or slurm or vllm
# What only test-all runs, and a twelfth of it after each commit: the rest of large grids, and tests
# of what others show in brief.
REST := full or real
# What test-fast does without: other programs, and tests that take half a second or more.
FAST := not ($(ONE) or builders or registry or other_registries or browser or root or gpu or $(REST) or slow)
# All tests, and what they start, read and write compiled modules, also where a container's variable
# forbids to write these: that is a tenth of the time.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
# Each process has one thread for torch and numpy: their tests are small. One more than cores where
# tests wait for programs that they start.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
COMPILED := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m tests.compiled
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) --dist worksteal -n

# Run the tests of an expression: $(call tests,EXPRESSION,FLAGS). An engine and builders come first.
# Those that a machine has one of wait more than they compute: they run one by one beside all others,
# and what they say comes last. A shell lets such a process ignore Ctrl-C, and this one has clusters
# to end.
define tests
bash tests/engine.sh || test -z "$(WEIGHTSMITH_REQUIRE_DOCKER)" || exit; \
echo "test: making builders; ten minutes the first time, nothing afterwards"; \
$(BIN)/python -m tests.builders || exit; $(COMPILED) || exit; \
said=$$(mktemp); trap 'kill -INT $$one 2>/dev/null; wait $$one; rm -f $$said' EXIT; \
env --default-signal=INT $(PYTEST) -m "($(1)) and ($(ONE)) and not gpu" $(2) $(PYTEST_FLAGS) >$$said 2>&1 & one=$$!; \
$(PARALLEL) $$(($(CORES) + 1)) -m "($(1)) and not (gpu or $(ONE))" $(2) $(PYTEST_FLAGS) || exit; \
wait $$one; ended=$$?; cat $$said; exit $$ended
endef

# Print a lock: $(call locked,EXTRAS,WHAT IT IS).
define locked
printf 'hatchling\neditables\n' | $(BIN)/uv pip compile -q --universal --python-version 3.11 $(1) \
  --generate-hashes --no-annotate --no-header -c constraints.txt pyproject.toml - -o $(VENV)/lock >&2 \
  && echo '# $(2), by hash, on Python 3.11 to 3.14: `make lock` writes it.' && cat $(VENV)/lock
endef

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo check fix lock bases update release tool-image generate golden test test-fast test-all test-part test-gpu gpu-pack gpu-day fuzz docs bench clean

help: ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Make the virtual environment with the `invoke` command (about a minute)

setup-dev: $(VENV)/.ready-dev ## The same with the tests' tools and torch (some minutes)

$(VENV)/.ready: pyproject.toml requirements.lock
	@test ! -x $(BIN)/python || $(BIN)/python -I -c 'import importlib.util as u, os, sys; s = u.find_spec("weightsmith"); sys.exit(s and not os.path.samefile(os.path.dirname(s.origin), "toolchain/weightsmith") and f"setup: $(VENV) has another checkout installed, {s.origin}: give another VENV")'
	@echo "setup: making $(VENV) with the command line tool; about a minute"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3,11) <= v <= (3,14) else f"setup: Python 3.11 to 3.14 is needed, {sys.executable} is {v[0]}.{v[1]}: run `make setup PYTHON=python3.12`, say")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "setup: python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	@$(call download,$(BIN)/pip install -q $(PIP_FLAGS) --require-hashes -r requirements.lock)
	@$(BIN)/pip install -q $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready constraints.txt
	@echo "setup: adding test tools and torch; two to five minutes, torch may be a large download"
	@$(call download,$(BIN)/pip install -q $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[dev]')
	@touch $@

demo: setup ## Build the support bot and ask it questions (about 10 minutes the first time)
	@$(BIN)/python examples/support-bot/demo.py

check: setup-dev ## Lint, format, types, import contracts, generated files
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/generate.py --check
	@$(BIN)/python -m tests.locked

fix: setup-dev ## Repair what `check` can repair by itself
	@$(BIN)/ruff check --fix-only . && $(BIN)/ruff format .
	@$(BIN)/python docs/generate.py

lock: setup-dev ## Write requirements.lock, the tool's own packages by hash, from constraints.txt
	@{ $(call locked,,What the tool is installed from); } > requirements.lock
	@{ $(call locked,--extra keyless,The same with what signing without a key takes); } > requirements-keyless.lock

bases: setup-dev ## Pin upstream's base images by digest, where their registries can be reached
	@$(BIN)/python images/bases.py

update: setup-dev ## Say which pins have newer versions; PART=builders/merge moves that part's, if its tests pass
	@$(BIN)/python images/update.py $(if $(PART),--only $(PART) --accept $(PART))

release: check ## Make wheel and source package in dist/, if every base image is pinned
	@$(BIN)/python images/bases.py --check
	@$(BIN)/uv build -q --out-dir dist

tool-image: setup-dev ## Assemble an image of weightsmith itself in dist/; TOOL_FLAGS=--load gives it to Docker
	@$(BIN)/python images/tool/assemble.py --out dist/tool-image $(TOOL_FLAGS)

generate: setup-dev ## Write the generated reference pages and the JSON Schema
	@$(BIN)/python docs/generate.py

test: setup-dev ## Every kind of test, of large grids a sample; starts a container engine where it may
	@$(call tests,not ($(REST)),)

test-fast: setup-dev ## The tests that need neither builders nor an engine nor other programs
	@$(COMPILED) && $(PARALLEL) $(CORES) -m "$(FAST)" $(PYTEST_FLAGS)

test-all: setup-dev ## Every test that needs no GPU, on real weights and of whole grids too
	@$(call tests,not gpu,)

test-part: setup-dev ## Of what only test-all runs, the twelfth that PART says: 1 to 12
	@$(call tests,$(REST),--part $(PART)/12)

test-gpu: setup-dev ## The tests that need an NVIDIA GPU; prints what the GPU gave beside the CPU
	@$(BIN)/python -m pytest -m gpu -s tests/gpu $(PYTEST_FLAGS)

gpu-pack: setup-dev ## Fetch what gpu-day needs, on a machine without a GPU, into gpu-pack/
	@$(BIN)/python -m tests.gpu.pack $(PACK_FLAGS)

gpu-day: ## Try on a GPU, without a network, all that needs one; go on where it stopped, or do PART
	@test -x $(BIN)/invoke || $(MAKE) -s setup WEIGHTSMITH_WHEELS=gpu-pack/wheels PIP_NO_INDEX=1
	@PYTHONPATH=toolchain $(BIN)/python -m tests.gpu.day --pack gpu-pack $(if $(PART),--part "$(PART)") $(DAY_FLAGS)

fuzz: setup-dev ## Read inputs changed at random for WEIGHTSMITH_FUZZ_SECONDS (an hour), by new seeds
	@$(BIN)/python -m tests.hostile.fuzz $(FUZZ)

golden: setup-dev ## Write the golden plans and rendered files anew; then read the difference
	@UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/unit/serving/test_golden_plans.py

docs: generate ## Generate the reference pages

bench: setup-dev ## Run the benchmarks and print their tables (tens of minutes)
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean: ## Remove what was built here; the user's cache stays
	@rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/work
