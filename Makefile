# `make demo` writes demo.mp4 and demo.png, `make test` runs the tests. The virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint cards test-lowest clean

demo: $(STAMP)
	$(BIN)/fvg generate "A red circle moves to the right" --seed 0 --output demo.mp4 --strip demo.png

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Writes the model cards again from facts and results.
cards: $(STAMP)
	$(BIN)/python -m diffusers_fvg.cards model_cards

# The same tests on the oldest supported versions, in an environment of their own.
test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

clean:
	rm -rf .venv .venv-lowest demo.mp4 demo.png

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@
