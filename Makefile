# make demo: the main job on the embedded teacher.   make test: the tests.   make fuzz: more of the suite's odd inputs, and others.   make check: style.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

demo: $(VENV)/installed
	$(BIN)/python -m convert.run neox-nano --to mamba

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile

fuzz: $(VENV)/installed-test
	FUZZ=$(or $(FUZZ),20) $(BIN)/python -m pytest -n auto --dist loadfile tests/fuzz

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.PHONY: demo test fuzz check
