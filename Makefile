# One environment, two commands: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Workers of pytest-xdist, each of which runs one test file at a time, in the order of collection.
JOBS ?= 2
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: install demo ablation test test-unit test-ray test-chaos mutants check-vllm docs lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/raylava demo

ablation: install
	$(BIN)/raylava toy toy
	$(BIN)/raylava sweep jobs/recipes/toy-ablations.yaml

# The unit tier first, since it takes seconds; the others in one run, since two would each end with an idle worker.
test: test-unit
	$(PYTEST) tests/chaos tests/ray

test-unit: install
	$(PYTEST) tests/unit

test-ray: install
	$(PYTEST) tests/ray

test-chaos: install
	$(PYTEST) tests/chaos

# Breaks the lines that carry promises, and expects a named test to notice each; see tests/mutants/run.py.
mutants: install
	$(BIN)/python -m tests.mutants.run --jobs $(JOBS)

# Compares answers of vLLM, in an environment of its own, with those of the demo's model; see tests/vllm/check.py.
check-vllm: demo
	$(BIN)/python -m tests.vllm.check raylava-storage

# Builds the documentation into site/; a link, anchor or name that leads nowhere fails. See docs/build_site.py.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/build_site.py site

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

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
