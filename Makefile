# make demo: the main job on the embedded teacher.   make test: the tests.   make check: style and types.   make fuzz: odd inputs for long (FUZZ=20 times the suite's).
# make check-newest: the tests of models with the newest versions that setup.py allows (torch alone as pinned).
# make check-oldest: what we export, read by the oldest transformers that serving engines still use.
# make check-triton: the Triton kernels, compiled for every GPU by the oldest Triton that setup.py allows (no GPU needed; some minutes).
PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
OLDEST ?= .venv-oldest
OLDEST_TRITON ?= .venv-triton
FUZZ ?= 20
BIN = $(VENV)/bin
PYTEST = -m pytest -n auto --dist loadfile --no-loadscope-reorder
MODELS = $(addprefix tests/,mixers models training exporting steps/test_selection.py evaluation/test_scoring.py data/test_prompts.py)

demo: $(VENV)/installed
	$(BIN)/python -m convert.run neox-nano --to mamba

test: $(VENV)/installed-test
	$(BIN)/python $(PYTEST)

fuzz: $(VENV)/installed-test
	FUZZ=$(FUZZ) $(BIN)/python $(PYTEST) tests/fuzz

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-newest: $(NEWEST)/installed-newest
	$(NEWEST)/bin/python $(PYTEST) $(MODELS)

check-oldest: $(VENV)/installed-test $(OLDEST)/installed-oldest
	$(BIN)/python -m tests.exporting.oldest_native write $(OLDEST)/exports
	$(OLDEST)/bin/python tests/exporting/oldest_native.py read $(OLDEST)/exports

check-triton: $(VENV)/installed-test $(OLDEST_TRITON)/installed
	PYTHONPATH=$(OLDEST_TRITON) TRITON_CACHE_DIR=$(OLDEST_TRITON)/cache $(BIN)/python -W ignore -m kernels.audit

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

$(OLDEST)/installed-oldest: constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)" 'transformers==4.57.*'
	touch $@

$(OLDEST_TRITON)/installed: setup.py
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(OLDEST_TRITON) "$$(grep -o 'triton>=[0-9.]*' setup.py | head -n 1 | sed s/'>'/=/)"
	touch $@

.PHONY: demo test fuzz check check-newest check-oldest check-triton
