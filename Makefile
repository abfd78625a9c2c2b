# `make demo` and `make test` need Python 3.11, gcc and pip, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
DEMO := output/demo

.PHONY: demo test test-slow test-gpu test-all lint format clean

demo: .venv/installed
	$(BIN)/python datasets/prepare_digit_scenes.py
	$(BIN)/python tools/train_net.py --config-file configs/DigitScenes/ia_gcn_plus.yaml OUTPUT_DIR $(DEMO)
	$(BIN)/python tools/visualize_results.py $(DEMO)
	$(BIN)/python tools/visualize_regions.py $(DEMO)

# A worker a core, at most 8. What a worker is ahead of another, it takes from it.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: .venv/installed
	$(PYTEST) -m "not slow and not gpu"

test-slow: .venv/installed
	$(PYTEST) -m "slow and not gpu"

# One process: the tests share the GPU.
test-gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu

test-all: test test-slow test-gpu

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv output

# Made once, and again when what it is made from changes.
.venv/installed: requirements.txt setup.py tools/install_detectron2.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	$(BIN)/python tools/install_detectron2.py
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@
