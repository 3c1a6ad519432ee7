# One environment, two commands: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Workers of pytest-xdist. Most tests wait for processes to start, so that two at once take half the time.
JOBS ?= 2

.PHONY: install demo ablation test test-unit test-ray test-chaos lint format clean

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

test: test-unit test-ray test-chaos

test-unit: install
	$(BIN)/pytest tests/unit -n $(JOBS) --dist loadfile

test-ray: install
	$(BIN)/pytest tests/ray -n $(JOBS) --dist loadfile

test-chaos: install
	$(BIN)/pytest tests/chaos -n $(JOBS) --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) raylava-storage
