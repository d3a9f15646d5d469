# make demo: see it train and verify. make test: lint, types, tests. Both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
GPU_TESTS := tests/gpu tests/test_kernels.py tests/test_fused_kernels.py -k "cuda or gpu"

.PHONY: demo test test-gpu test-cluster monitor omniglot lint clean

demo: .venv/installed
	$(BIN)/python tools/demo.py

test: .venv/installed lint
	$(BIN)/python -m pytest $(TESTS)

test-gpu: .venv/installed
	$(BIN)/python -m pytest $(GPU_TESTS)

# What needs real Slurm, Prometheus, a browser and network namespaces: as root on Debian.
test-cluster: .venv/installed
	bash tests/cluster/install.sh
	$(BIN)/python -m pytest tests/cluster -m cluster

# A demo run with Prometheus and the status page beside it.
monitor: .venv/installed
	$(BIN)/python tools/monitor.py

omniglot: .venv/installed
	$(BIN)/python tools/omniglot.py tests/fixtures/omniglot/omniglot_background.npz packs/omniglot
	$(BIN)/torchrun --standalone --nproc-per-node=2 launch/train.py configs/omniglot.toml

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "partialfc needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs packs
