# Everything works on a machine with Python >= 3.11, pip and make: .venv is made when it is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Each test runs on one thread: two processes.
PYTEST := $(BIN)/python -m pytest -n 2
# Shape annotations are enforced at run time, save in the tests that compile: it breaks the graph.
COMPILED := tests/test_compile.py tests/test_composition.py tests/test_readme.py
SHAPES := --jaxtyping-packages=shiva_dit,beartype.beartype $(addprefix --ignore=,$(COMPILED))

# Tests start processes by the dozen: what these import is compiled once, whatever the user's shell says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test check matrix versions fix report results-estimators release install clean

quickstart: $(STAMP)  ## Train an adapter on real digits and look at it (about 3 minutes)
	$(BIN)/shiva-dit quickstart

test: $(STAMP)  ## The fast tests (4 minutes)
	$(PYTEST) $(SHAPES) -m "not slow and not matrix and not bits"
	$(PYTEST) -m "not slow and not matrix and not bits" $(COMPILED)

check: $(STAMP)  ## What CI runs: format, lint, imports, types, all tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(PYTEST) $(SHAPES) -m "not matrix and not bits"
	$(PYTEST) -m "not matrix and not bits" $(COMPILED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[beside]"
	$(PYTEST) -m "bits and not matrix" tests

matrix: $(STAMP)  ## Every property of every model class beside everything else, into results/ (half an hour)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[beside]"
	$(BIN)/python -m tests.matrix

versions: $(STAMP)  ## The fast tests at the lowest and the highest versions allowed, into results/ (20 minutes)
	$(BIN)/python -m tests.versions build/versions

fix: $(STAMP)  ## Format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

COMPARISONS := $(filter-out %-scenes64.toml,$(sort $(wildcard recipes/compare-*.toml)))  # those need a GPU

# A run takes about a minute of one core on the digits and three and a half on the scenes: 18 core-hours in all.
results-estimators: $(STAMP)  ## What docs/results/ says of tokens and ratios, into runs/ (9 hours on two cores; goes on where it stopped)
	$(foreach recipe,$(COMPARISONS),$(BIN)/shiva-dit compare $(recipe) &&) true
	$(BIN)/shiva-dit inspect synthetic
	for task in digits scenes; do \
		$(BIN)/shiva-dit inspect flips --task $$task --random 0.4 --out runs/flips-$$task-random && \
		$(BIN)/shiva-dit inspect flips --task $$task --out runs/flips-$$task-adapter || exit 1; \
	done
	$(BIN)/shiva-dit inspect captions --task scenes

report: $(STAMP)  ## Write the tables of the documents from the records
	$(BIN)/shiva-dit report README.md docs/*.md docs/results/*.md

# A release, in this order: (1) the version in pyproject.toml and src/shiva_dit/__init__.py, and the changelog's
# heading with the day; (2) `make check`, `make matrix` and `make versions` pass on a clean clone, and `make report` changes nothing;
# (3) `make release`; (4) a commit and a tag "v" and the version; (5) `twine upload dist/*`, with a token that may
# upload this project alone; (6) `pip install shiva-dit` in an empty folder, and the README's first example.
release: $(STAMP)  ## Build what goes to PyPI, check it, and serve with it in an environment without extras
	rm -rf dist build/release
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet build==1.6.1 twine==7.0.0
	build/release/bin/python -m build --outdir dist .
	build/release/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear build/release
	build/release/bin/python -m pip install --quiet torch==2.13.0
	build/release/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && release/bin/python -m pip list && release/bin/shiva-dit doctor && \
		release/bin/python ../tests/serving.py $(abspath $(BIN))/python

install: $(STAMP)  ## Make .venv

# torch first and pinned: left to the resolver, another build of several GB may be taken.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:  ## Remove .venv and caches
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
