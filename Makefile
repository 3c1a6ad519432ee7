# One environment, two commands: `make demo` runs the main job, `make test` passes the tests.
# The newest Python of those supported that runs and can create virtual environments; PYTHON=… selects another.
SUPPORTED := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c '$(SUPPORTED)' 2> /dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Workers of pytest-xdist, each of which runs one test file at a time, in the order of collection. Ten failures end the
# run: where Ray itself hangs, every further test would take its time-out.
JOBS ?= 2
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --maxfail=10

.PHONY: install demo ablation test test-unit test-ray test-chaos test-extended mutants check-vllm docs lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2> /dev/null || { echo "error: no Python 3.11 to 3.13 with venv is \
	installed here; install one (Debian and Ubuntu: apt install python3 python3-venv), or set PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/raylava demo

ablation: install
	$(BIN)/raylava toy toy --ablations
	$(BIN)/raylava sweep toy-ablations

# The unit tier first, since it takes seconds; the others in one run, since two would each end with an idle worker.
test: test-unit
	$(PYTEST) tests/chaos tests/ray

test-unit: install
	$(PYTEST) tests/unit

test-ray: install
	$(PYTEST) tests/ray

test-chaos: install
	$(PYTEST) tests/chaos

# Further variants of tests that `make test` runs.
test-extended: install
	$(PYTEST) -m extended tests

# Breaks the lines that carry promises, and expects a named test to notice each; see tests/mutants/run.py.
mutants: install
	$(BIN)/python -m tests.mutants.run --jobs $(JOBS)

# Compares answers of vLLM, in an environment of its own, with those of the demo's model; see tests/vllm/check.py.
check-vllm: demo
	$(BIN)/python -m tests.vllm.check raylava-storage

# Builds the documentation into site/; a link, anchor or name that leads nowhere fails. See docs/build_site.py.
docs: install
	$(BIN)/python docs/build_site.py site

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keeps raylava-storage, which holds trained models; remove it yourself if you do not need them.
clean:
	rm -rf $(VENV) .venv-vllm site .mypy_cache .pytest_cache .ruff_cache .hypothesis
