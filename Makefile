# Set-up and the commands of every day. `make demo` and `make test` do all the set-up they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installed once per change of what is asked for; an old pip takes minutes longer to find out what goes together.
READY := $(VENV)/.ready

.PHONY: install demo test test-all containers lint audit ui bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/fedmeta run experiments/digits.toml

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# With Ray, deployed processes, a browser and real data: many minutes.
test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The image is built and the default compose file brought up and checked; says why where this machine cannot.
containers: $(READY)
	$(BIN)/python -m pytest -rA tests/deployment/test_containers.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known vulnerabilities of what is installed, where PyPI's list of them answers.
audit: $(READY)
	$(BIN)/python .ci/audit.py

ui: $(READY)
	$(BIN)/fedmeta ui experiments/digits.toml

# BENCH takes the options of experiments/benchmarks/run.py.
bench: $(READY)
	MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=536870912 $(BIN)/python experiments/benchmarks/run.py $(BENCH)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
