# `make demo` and `make test` need Python 3.11, gcc and pip, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
# On a CPU, two processes train the demo's small network in less time than one with two threads.
DEMO_PROCESSES := $(shell command -v nvidia-smi >/dev/null && echo 1 || echo 2)

.PHONY: demo test test-slow test-gpu test-all lint format clean

demo: .venv/installed
	$(BIN)/python datasets/prepare_digit_scenes.py
	$(BIN)/python tools/train_net.py --config-file configs/DigitScenes/demo.yaml --num-gpus $(DEMO_PROCESSES)
	$(BIN)/python tools/visualize_results.py output/demo & \
		$(BIN)/python tools/visualize_regions.py output/demo && wait $$!

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

# Made once, and again when what it is made from changes. uv unpacks on all cores, and does not know
# pip's settings: pip goes on where these name the only index that can be reached. What is imported
# is compiled then: to compile all of it takes as long as the rest of the installation.
unexport PYTHONDONTWRITEBYTECODE
.venv/installed: requirements.txt setup.py tools/install_detectron2.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet uv==0.13.9
	$(BIN)/uv pip install --python $(BIN)/python -r requirements.txt \
		|| $(BIN)/pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	$(BIN)/python tools/install_detectron2.py
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@
