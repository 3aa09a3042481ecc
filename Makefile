# Two commands matter: `make quickstart` (the whole product on this machine) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test test-gate test-slow lint benchmark install install-dev install-peers clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# --no-compile: most of the packages' files are never imported, and Python compiles the others when they are. It keeps
# what it compiled, also where the environment says otherwise (as many container images do): each of a run's processes
# would compile torch anew: importing it and timm took 16 CPU seconds instead of 6.
export PYTHONDONTWRITEBYTECODE :=
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (one to three minutes) ..."
	@started=$$(date +%s); $(PIP) --no-compile -e . && echo "installed in $$(($$(date +%s) - started)) s"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.installed-peers: $(VENV)/.installed-dev
	$(PIP) -e ".[dev,peers]"
	@touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
install-peers: $(VENV)/.installed-peers

quickstart: install  ## images -> trained backbones -> sweep -> report/index.html
	$(BIN)/python -m diffscale.quickstart $(ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## ruff, mypy and the fast tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=60 $(ARGS)

test-gate: install-dev  ## the slow tests that decide: kills, a lost node, overfitting, a whole sweep, a job
	$(BIN)/python -m pytest -m gate --durations=0 $(ARGS)

test-slow: install-dev  ## the tests that take minutes: kill tests, overfit tests, whole sweeps
	$(BIN)/python -m pytest -m slow --durations=15 $(ARGS)

benchmark: install-peers  ## every suite, one run after the other; interrupt it and call it again
	$(BIN)/python -m benchmarks.run $(ARGS)

clean:
	rm -rf $(VENV) report quickstart
