# make demo: the main job on the embedded teacher.   make test: the tests.   make check: style.
# make check-newest: the tests of models with the newest versions that setup.py allows (torch alone as pinned).   make fuzz: bad inputs, for long.
PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
BIN = $(VENV)/bin
PYTEST = -m pytest -n auto --dist loadfile
MODELS = $(addprefix tests/test_,model.py mixers.py mla.py gate_swa.py projections.py export.py native.py selection.py stages.py readings.py prompts.py teachers.py)

demo: $(VENV)/installed
	$(BIN)/python -m convert.run neox-nano --to mamba

test: $(VENV)/installed-test
	$(BIN)/python $(PYTEST)

fuzz: $(VENV)/installed-test
	FUZZ=$(or $(FUZZ),20) $(BIN)/python -m pytest -n auto --dist loadfile tests/fuzz

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-newest: $(NEWEST)/installed-newest
	$(NEWEST)/bin/python $(PYTEST) $(MODELS)

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(NEWEST)/installed-newest: setup.py constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/pip install --quiet --constraint $(NEWEST)/torch.txt --upgrade --upgrade-strategy eager --editable '.[test]'
	touch $@

.PHONY: demo test fuzz check check-newest
