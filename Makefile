# Everything is installed into .venv, from nothing but Python and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/examples
	$(RUN) examples/lynx_hare.py

# Without the tests that are marked slow, which test-all runs too.
test: $(VENV)/test
	$(RUN) -m pytest --numprocesses auto -m 'not slow'

test-all: $(VENV)/test
	$(RUN) -m pytest --numprocesses auto

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(RUN)

bench: $(VENV)/bench
	$(RUN) benchmarks/run.py

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras.
$(VENV)/examples $(VENV)/test $(VENV)/bench $(VENV)/dev: $(VENV)/%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[$*]'
	touch $@
