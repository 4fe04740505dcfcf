# Every target sets itself up in .venv; a fresh machine needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run the tests: JOBS=0 keeps them in one, for a debugger.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --durations 30
CHECK_TYPES := --jaxtyping-packages=dpoptax,typechecker.check

.PHONY: demo test test-all test-types test-optimized test-trainers test-nightly faults lint format bench bench-quick reproduce-d3p leaderboard docs tutorials release-check clean

demo: $(VENV)/.demo  ## train a VAE privately on scikit-learn's digits, and draw what it learnt
	$(BIN)/python examples/05_vae.py --out out

test: $(VENV)/.dev  ## the tests to run while you work: ARGS="tests/vi -k elbo" chooses
	$(PYTEST) --quick-compile -m "not seconds and not slow and not e2e and not nightly and not trainer" $(or $(ARGS),tests)

test-all: $(VENV)/.dev  ## what must pass before a merge: longer tests, and docstrings
	$(PYTEST) --quick-compile --hypothesis-profile=all -m "not nightly and not trainer" $(ARGS)

test-types: $(VENV)/.dev  ## all but the slow tests, every call checked, and programs optimized as for users
	$(PYTEST) $(CHECK_TYPES) -m "not slow and not e2e and not nightly and not trainer" $(or $(ARGS),tests)

test-optimized: $(VENV)/.dev  ## slow tests of gradients and guarantees, with programs optimized as for users
	$(PYTEST) -m "slow and not e2e and not nightly and not trainer" $(or $(ARGS),tests/laws tests/misuse tests/per_example)

test-trainers: $(VENV)/.dev  ## other libraries with dpoptax inside, each in an environment of its own
	$(BIN)/python -m pytest -m trainer $(or $(ARGS),tests/trainers)

test-nightly: $(VENV)/.dev  ## everything there is, but the trainers
	$(PYTEST) $(CHECK_TYPES) --hypothesis-profile=nightly -m "not trainer" $(ARGS)

faults: $(VENV)/.dev  ## plant bugs in a copy of the library, and see tests fail: ARGS="keys", --list
	$(BIN)/python tests/faults/run_faults.py --jobs $(JOBS) $(ARGS)

lint: $(VENV)/.dev  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev  ## every benchmark, and docs/benchmarks.md of it: ARGS="--only side_by_side"
	$(BIN)/python -m benchmarks $(ARGS)

bench-quick: $(VENV)/.dev  ## one table of ratios in twelve minutes, and what got slower: ARGS="--models vae"
	$(BIN)/python -m benchmarks.quick --out out/quick.json $(ARGS)
	$(BIN)/python -m benchmarks.compare docs/benchmarks/cpu/quick.json out/quick.json

reproduce-d3p: $(VENV)/.dev  ## published experiments again: ARGS="--only vae --seeds 1", --list
	$(BIN)/python -m reproduce $(ARGS)

leaderboard: $(VENV)/.dev  ## accuracy at a given epsilon: ARGS="--only digits --seeds 1", --list
	$(BIN)/python -m leaderboard $(ARGS)

docs: $(VENV)/.dev  ## the documentation site, in out/site/html, with every link checked
	$(BIN)/python -m tools.site

tutorials: $(VENV)/.dev  ## run the tutorials, and write their pages: ARGS="vae --out DIR"
	$(BIN)/python -m tools.tutorials $(ARGS)

release-check: $(VENV)/.dev  ## everything of a release but the upload: ARGS="--tag v0.1.0"
	$(BIN)/python tools/release.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-trainers out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "dpoptax needs Python 3.11 or newer; set PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(VENV)/bin/python
	@echo 'Installing dpoptax and what it needs into $(VENV). This takes some minutes the first time.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[examples]'
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/bin/python
	@echo 'Installing dpoptax and what it needs into $(VENV). This takes some minutes the first time.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.demo
