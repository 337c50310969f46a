# Everything is installed from nothing but Python and make: into .venv, or for another Python, as in
# `make test PYTHON=python3.13`, into .venv-3.13.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(shell $(PYTHON) -c 'import sys; print(*sys.version_info[:2], sep=".")'))
RUN := $(VENV)/bin/python

.PHONY: demo test test-all notebooks lint docs package bench clean

demo: $(VENV)/examples
	$(RUN) examples/lynx_hare.py

# Without the tests that are marked slow, which test-all runs too.
TESTS := not slow
# A file's tests in one process: they share the programs that are compiled.
PROCESSES := --numprocesses auto --dist loadfile

test: $(VENV)/test
	$(RUN) -m pytest $(PROCESSES) -m '$(TESTS)' $(OPTIONS)

test-all: $(VENV)/test
	$(RUN) -m pytest $(PROCESSES)

# Each notebook from top to bottom, in a few steps of training.
notebooks: $(VENV)/notebooks
	FLATLAYERS_FAST=1 $(RUN) -m pytest --nbmake --numprocesses auto notebooks

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(RUN)
	# All types of vectors and layers are known to who imports them.
	mkdir -p build
	PYTHONPATH=$(CURDIR) $(VENV)/bin/pyright --pythonpath $(RUN) --verifytypes flatlayers --ignoreexternal >build/types.txt || true
	grep -q '^Symbols exported by "flatlayers": [1-9]' build/types.txt
	! grep -A 2 '^flatlayers\.\(core\|types\|vectors\)' build/types.txt

# The site, into build/site.
docs: $(VENV)/docs
	$(RUN) -m docs.builder
	$(VENV)/bin/zensical build --strict --clean --config-file build/mkdocs.yml

# The wheel and the source distribution, in build/dist. The wheel goes into a bare environment, where a user's
# project runs, and a type checker finds nothing wrong with it.
package: $(VENV)/dev
	rm -rf build/dist build/bare
	$(RUN) -m build --outdir build/dist
	$(RUN) -m twine check --strict build/dist/*
	$(PYTHON) -m venv build/bare
	build/bare/bin/python -m pip install --quiet build/dist/*.whl
	cp tests/packaging/project.py build/bare
	echo '{"include": ["project.py"], "typeCheckingMode": "standard"}' >build/bare/pyrightconfig.json
	cd build/bare && bin/python -W error project.py
	$(VENV)/bin/pyright --project build/bare --pythonpath build/bare/bin/python

bench: $(VENV)/bench
	$(RUN) benchmarks/run.py

clean:
	rm -rf .venv .venv-*

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras.
$(VENV)/examples $(VENV)/test $(VENV)/notebooks $(VENV)/docs $(VENV)/bench $(VENV)/dev: $(VENV)/%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --no-compile --editable '.[$*]'
	touch $@
