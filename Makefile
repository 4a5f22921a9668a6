# Everything from a bare clone: `make train` is the main job, `make test` the tests.
VENV := .venv
PYTHON ?= python3
# CuPy only where there is an NVIDIA driver.
comma := ,
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(comma)cuda13)

.PHONY: train test test-kernels test-docs test-engines docs-figures stress test-wheel test-notebook notebook lint
.PHONY: types clean
train: $(VENV)/installed
	$(VENV)/bin/mbm train --config lenet-mbm

test: export GOMP_SPINCOUNT = 0
test: $(VENV)/installed
	$(VENV)/bin/mbm data fetch
	$(VENV)/bin/python -m pytest -n 2

# The CUDA kernels on the CPU, under sanitizers (x86-64, g++).
test-kernels: export GOMP_SPINCOUNT = 0
test-kernels: $(VENV)/installed
	$(VENV)/bin/python -m pytest -rs -n 2 tests/emulator

# The commands and Python examples of README.md and docs/, small, and their links.
test-docs: $(VENV)/installed
	$(VENV)/bin/mbm data fetch
	$(VENV)/bin/python -m pytest tests/docs

# Sweeps whose processes die, in worker processes and on a Slurm of one node (as root, where it is installed).
test-engines: $(VENV)/installed
	$(VENV)/bin/mbm data fetch
	$(VENV)/bin/python -m pytest -rs -n 2 tests/engines

# The pictures of the documents; those that show a GPU are drawn only where there is one.
docs-figures: $(VENV)/installed
	$(VENV)/bin/python docs/figures.py

# Builds the sdist and the wheel, installs the wheel beside this environment's PyTorch, trains with it.
test-wheel: $(VENV)/installed
	$(VENV)/bin/mbm data fetch
	$(VENV)/bin/python -m pytest tests/wheel

# The notebook from top to bottom on the CPU, small; `make notebook` stores the outputs of a whole run in it.
test-notebook: $(VENV)/installed
	$(VENV)/bin/mbm data fetch
	CUDA_VISIBLE_DEVICES= $(VENV)/bin/python -m pytest tests/notebook

notebook: $(VENV)/installed
	$(VENV)/bin/mbm data fetch
	$(VENV)/bin/python notebooks/execute.py

types: $(VENV)/installed
	$(VENV)/bin/mypy

# Kills, full disks, memory, random convolutions, mutated configs and command lines; docs/reliability.md has the results.
stress: export GOMP_SPINCOUNT = 0
stress: $(VENV)/installed
	$(VENV)/bin/mbm data fetch
	$(VENV)/bin/python tests/stress/kills.py
	$(VENV)/bin/python tests/stress/disk.py
	$(VENV)/bin/python tests/stress/memory.py
	$(VENV)/bin/python tests/stress/convolutions.py
	MBM_EXAMPLES=5000 $(VENV)/bin/python -m pytest --timeout=0 tests/test_inputs.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The extension is compiled here, so its sources count.
$(VENV)/installed: pyproject.toml $(wildcard kernels/*)
	@echo "installing into $(VENV): PyTorch is 5.5 GB, which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build
