# `make test` and `make demo` need Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := build/lowest

# Where `make notebooks` writes: the notebooks with their figures, or copies that show whether they still run.
NOTEBOOKS_IN := notebooks

.PHONY: demo test test-all lint docs notebooks dist clean

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/glyphs.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Run each notebook's source, notebooks/NAME.py, and write what comes out.
notebooks: $(patsubst notebooks/%.py,run/%,$(wildcard notebooks/*.py))

run/%: notebooks/%.py $(INSTALLED)
	mkdir -p $(NOTEBOOKS_IN)
	$(BIN)/jupytext --to ipynb --set-kernel python3 --execute --output $(NOTEBOOKS_IN)/$*.ipynb $<

test: lint
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist worksteal

test-all: test docs
	$(BIN)/pytest -m slow --numprocesses 2 --dist worksteal
	$(MAKE) --jobs 2 notebooks demo NOTEBOOKS_IN=build/notebooks

# Build the sdist and the wheel and check their metadata. Install the wheel into a clean environment, with the lowest
# versions that setup.cfg allows. Run the fast tests there, from the unpacked sdist, so that nothing is read from src/.
# Takes about ten minutes. Use Python 3.11: some lowest versions have no wheels for a later Python.
dist: $(INSTALLED)
	rm -rf dist $(LOWEST)
	$(BIN)/pyproject-build
	$(BIN)/twine check --strict dist/*
	test -e dist/bs_lightning-$$(sed -n 's/^version: //p' CITATION.cff).tar.gz # CITATION.cff has this version
	$(PYTHON) -m venv $(LOWEST)
	$(BIN)/python tools/lowest_versions.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt "$$(echo dist/*.whl)[test]"
	diff -r --exclude __pycache__ src/bs_lightning $(LOWEST)/lib/python3*/site-packages/bs_lightning
	mkdir $(LOWEST)/sdist
	tar -xzf dist/*.tar.gz -C $(LOWEST)/sdist --strip-components 1
	cd $(LOWEST)/sdist && ../bin/pytest -m "not slow" --pyargs bs_lightning ./tests

clean:
	rm -rf $(VENV) build dist
