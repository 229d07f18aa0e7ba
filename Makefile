# `make demo` writes demo.mp4 and demo.png, `make test` runs the tests. The virtual environment is made on first use. Its files
# are compiled on two cores, which pip does on one; otherwise each process of the tests compiles again what it imports.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DIFFUSERS := 0.40.0 0.41.0 0.42.0 0.42.1
DIFFUSERS_TESTS := $(addprefix tests/,$(addsuffix .py,$(addprefix loading/,test_stock_pipelines test_loading test_safety) \
	$(addprefix pipelines/,test_placement test_wan_families test_pipeline_factorized_video \
	test_pipeline_factorized_cogvideox test_modular test_profiles test_compile) \
	$(addprefix animate/,test_transformer_anchor test_transformer_anchor_cogvideox test_decoding) \
	publishing/test_hub test_hub_server test_embedded dreamer/test_dreamer_loading))

.PHONY: demo test lint docs cards audit hashes test-lowest test-versions clean

demo: $(STAMP)
	$(BIN)/fvg generate "A red circle moves to the right" --seed 0 --output demo.mp4 --strip demo.png --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A page of the public names, from their docstrings: build/docs/index.html.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,docs]'
	$(BIN)/python -m pdoc --docformat google --no-show-source --no-search --template-directory examples/api_reference \
		--output-directory build/docs diffusers_fvg

# Writes the model cards again from facts and results.
cards: $(STAMP)
	$(BIN)/python model_cards/render.py

# Known vulnerabilities of the tested set, where the service that knows them can be asked (what cannot be told is an error), and
# the licences of what is installed.
audit: $(STAMP)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit pip-licenses
	.venv-audit/bin/pip-licenses --python $(BIN)/python --order license
	.venv-audit/bin/pip-audit --requirement $(CONSTRAINTS) --no-deps --disable-pip --strict

# Writes constraints-hashes.txt again, of the machine that it runs on. pip compares no hash of a package that is being edited: the
# project itself is installed afterwards.
hashes: $(STAMP)
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report .venv-report.json --constraint $(CONSTRAINTS) '.[dev]'
	$(BIN)/python tests/hashes.py .venv-report.json constraints-hashes.txt

# The same tests on the oldest supported versions, in an environment of their own.
test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

# What rests on diffusers' loader and models, with each diffusers of the range; the rest of the set is that of constraints.txt,
# but for huggingface_hub, of which diffusers below 0.42 needs version 1. What a diffusers lacks is skipped and said.
test-versions: $(DIFFUSERS:%=test-diffusers-%)

test-diffusers-%: .venv-diffusers-%/.installed
	.venv-diffusers-$*/bin/python -m pytest -rs $(DIFFUSERS_TESTS)

.venv-diffusers-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-diffusers-$*
	grep -vE '^(diffusers|huggingface_hub)==' constraints.txt > .venv-diffusers-$*/constraints.txt
	.venv-diffusers-$*/bin/python -m pip install --quiet --constraint .venv-diffusers-$*/constraints.txt \
		--editable '.[dev]' diffusers==$*
	touch $@

.PRECIOUS: .venv-diffusers-%/.installed

clean:
	rm -rf .venv .venv-lowest .venv-audit .venv-diffusers-* build demo.mp4 demo.png

$(STAMP): pyproject.toml $(CONSTRAINTS) $(HASHES)
	$(PYTHON) -m venv $(VENV)
	$(if $(HASHES),$(BIN)/python -m pip install --quiet --no-compile --require-hashes --no-deps --requirement $(HASHES))
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[dev]'
	-$(BIN)/python -m compileall -q -j 2 -x '/tests?(ing)?/' $(VENV)/lib
	touch $@
