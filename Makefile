# Each target makes .venv by itself when it is missing; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test check docs bench gpu mps chaos interop install clean

install: $(VENV)/.installed

# About three minutes: prepare, train, measure and sample on this machine, without a download.
demo: $(VENV)/.installed
	$(BIN)/gpt prepare stdlib -c examples/quickstart.yaml
	$(BIN)/gpt train -c examples/quickstart.yaml --resume
	$(BIN)/gpt eval quickstart --baselines
	$(BIN)/gpt generate --checkpoint quickstart "class "

test: check
	$(BIN)/pytest -n 2

# Lint, format, types and layers.
check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is generated in docs/ and examples/. The pictures show speeds: run it where nothing else runs.
docs: $(VENV)/.installed-dev
	$(BIN)/gpt config schema --markdown -o docs/config.md
	$(BIN)/gpt config schema -o examples/gptcli.schema.json
	$(BIN)/python docs/pictures.py

# The crash suite in its long form, with a line of figures for each row.
chaos: $(VENV)/.installed-dev
	GPTCLI_CHAOS=long $(BIN)/pytest tests/chaos tests/commands/test_gpus.py

# NANOGPT=DIR names the folder of nanoGPT's train.py, and LLAMA=PYTHON an interpreter that has
# llama-cpp-python, to be measured beside us.
bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/throughput.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python benchmarks/time_to_loss.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python benchmarks/generate.py $(if $(NANOGPT),--nanogpt $(NANOGPT)) \
		$(if $(LLAMA),--llama $(LLAMA))
	$(BIN)/python benchmarks/parallel.py
	$(BIN)/python benchmarks/ablations.py
	$(BIN)/python benchmarks/products.py

# Whether all is right and fast on this machine's GPU, in a quarter of an hour. GPUS=8 adds the checks for
# several, NANOGPT=DIR measures nanoGPT beside us; exit code 2 where there is no such device.
gpu mps: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu.py --device $(if $(filter mps,$@),mps,cuda) \
		$(if $(GPUS),--gpus $(GPUS)) $(if $(NANOGPT),--nanogpt $(NANOGPT))

# Exports in the programs they are for. llama-cpp-python is compiled, which takes some minutes.
interop: $(VENV)/.installed-dev
	$(PIP) llama-cpp-python -e ".[bench]"
	$(BIN)/pytest tests/interop/with_programs.py

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[baselines]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
