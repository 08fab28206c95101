# Every target sets up what it needs. PYTHON: the interpreter to build the environment from; VENV: where it goes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests run many small products; more threads than cores wait for each other, and the machine may be shared.
test test-slow: export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow check bench setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch by its exact version first: a range would fetch a CUDA build of several gigabytes.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/trace-offline demo --store demo.duckdb

# Two processes, one file of tests at a time each: the suite is made for two cores.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The peers that slow tests and benchmarks compare with, the names of the extra `benchmark`; without their own needs,
# which would bring other versions of torch and NumPy. They are installed once, again when the names change.
PEERS := $(VENV)/.peers
$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		$$(sed -n '/^benchmark = \[/,/^\]/s/^ *"\(.*\)",*$$/\1/p' pyproject.toml)
	touch $@

test-slow: setup $(PEERS)
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup $(PEERS)
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) demo.duckdb demo.duckdb.lock build *.egg-info .pytest_cache .mypy_cache .ruff_cache
