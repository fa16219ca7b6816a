# Every target works alone from a fresh clone; all it needs is make and a python3 of 3.10 or later.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test lint wheel clean

demo: .venv/installed
	$(BIN)/evdit demo

# Test workers share the cores: idle OpenMP threads must sleep. The demo has the machine to itself, and
# its many short parallel regions are up to a third slower when every one has to wake a thread.
test: export OMP_WAIT_POLICY := passive
test: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/installed
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and alone: pip then takes the build that suits this machine (a local CPU wheel where
# there is one), and nothing that follows may ask for another.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off torch==2.13.0
	$(BIN)/python -m pip install --progress-bar off -e ".[diffusers,train,export,dev]"
	touch $@
