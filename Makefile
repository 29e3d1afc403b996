# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORAGE ?= runs
export TOKENIZERS_PARALLELISM = false
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-faults soak lint bench clean

$(VENV)/.installed: pyproject.toml infra/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c infra/constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## the main job: a sweep on two CPU cores, compared in MLflow
	$(BIN)/python -m memray run sweeps/demo.py --storage $(STORAGE)

# The first line proves that `memray` is this project and not the profiler of that name.
lint: $(VENV)/.installed  ## ruff, pyright, import-linter
	cd / && $(CURDIR)/$(BIN)/python -c "import memray; assert memray.__file__ == '$(CURDIR)/memray/__init__.py', memray.__file__"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Files in order, for the slow ones come first and the fast ones fill up.
test: $(VENV)/.installed  ## under ten minutes on two cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=25

test-faults: $(VENV)/.installed  ## kills and outages, under forty minutes
	$(BIN)/python -m pytest -q -m "fault and not quiet" -n 2 --dist loadfile --durations=25
	$(BIN)/python -m pytest -q -m "fault and quiet"

soak: $(VENV)/.installed  ## what takes long: a thousand trials, and a thousand strings, killed and resumed
	$(BIN)/python -m pytest -q -s -m soak

bench: $(VENV)/.installed  ## ratios, on an otherwise idle machine
	$(BIN)/python tests/bench/bench.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
