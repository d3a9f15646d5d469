# make demo: see it train and verify. make quick, test, test-all: about 2, 10 and 60 minutes on two
# cores. All set themselves up.
PYTHON ?= python3
BIN := .venv/bin
# Whatever the shell says, modules are compiled once: the suite starts hundreds of processes.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 3
BESIDE := --numprocesses=$(WORKERS) --dist=loadgroup
QUICK := tests/test_layering.py tests/test_keyed.py tests/config tests/definitions tests/margins \
	tests/losses tests/protocols tests/model tests/data/test_records.py tests/data/test_order.py \
	tests/head/test_head.py tests/head/test_margins_on_head.py tests/head/test_sharding.py
GPU_TESTS := tests/gpu tests/head/test_kernels.py tests/head/test_fused_kernels.py -k "cuda or gpu"
SIMULATED := PYTHONPATH=$(CURDIR)/tests/simulated_gpu/site $(PYTEST) $(BESIDE) -m "not cluster"

.PHONY: demo faces quick test test-all coverage test-scale test-gpu test-simulated-gpu test-interpreted test-cluster monitor omniglot taught lint clean

demo: .venv/installed
	$(BIN)/python tools/demo.py

# Real faces, with copies of LFW and CFP that you have: make faces LFW=folder CFP=folder.
faces: .venv/installed
	@test -n "$(LFW)" || { echo "make faces LFW=folder, with LFW's lists and photos (and CFP=folder)"; exit 2; }
	$(BIN)/python tools/faces.py "$(LFW)" $(if $(CFP),--cfp "$(CFP)")

# The core, while one works on it.
quick: lint
	$(PYTEST) $(BESIDE) $(QUICK)

# All that needs no cluster and is not slow.
test: lint
	$(PYTEST) $(BESIDE) $(TESTS)

# What needs a CUDA device, on one made of host memory, without Triton's kernels.
test-simulated-gpu: .venv/installed
	$(SIMULATED) tests/gpu tests/simulated_gpu

# The same with Triton's kernels in their interpreter, on few rows, and a step's launches: six minutes of one core.
test-interpreted: .venv/installed
	TRITON_INTERPRET=1 $(SIMULATED) tests/gpu tests/simulated_gpu/test_launches.py

# The rest: what is slow, and as root on Debian what needs Slurm, Prometheus, a browser and network
# namespaces.
test-all: .venv/installed
	bash tests/cluster/install.sh
	$(PYTEST) $(BESIDE) -m "slow and not cluster"
	$(MAKE) test-simulated-gpu test-interpreted
	$(PYTEST) tests/cluster -m cluster

# What the tests that need no cluster run of the package, but for what they start as processes.
coverage: .venv/installed
	$(PYTEST) $(BESIDE) -m "not cluster" --cov=partialfc --cov-report=
	@echo "coverage of partialfc: $$($(BIN)/coverage report --format=total) %"

# Thousands of ranks, simulated here: what grows with their number is counted. Part of test-all.
test-scale: .venv/installed
	$(PYTEST) $(BESIDE) -m slow tests/scale

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

# A small network alone, and taught by the one of `make omniglot`: three seeds of each.
taught: omniglot
	$(BIN)/python tools/compare.py configs/omniglot.toml --seeds 1,2,3 --ranks 2 --out runs/taught \
		'--vary=losses.teacher={}, {from = "runs/omniglot", weight = 20.0}' \
		backbone.name=convnet_s run.epochs=5

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
	rm -rf .venv runs packs build dist .coverage
