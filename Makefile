# make demo       the whole way on synthetic people, from nothing to a picture of predictions
#                 (DEMO=data/other draws them there, if data/synthetic holds others)
# make test       lint, types, and the default test suite
# make test-slow  the tests that take longer
# make test-gpu PYTHON=python3    the tests that need a GPU, with a Python that is already there
# make docs-check runs every command of the documentation that no other test runs, on tiny made data
# make fuzz       10,000 damaged files for every reader (FUZZ=1000 for fewer)
# make soak       half an hour of training with a fault every minute (SOAK='--minutes 5' for less)
# make bench      loaders and training steps on this machine
# make bench-gpu PYTHON=python3 OUT=runs/gpu
#                 the same on a GPU in nine minutes, with a Python that is already there; its JSON goes to OUT
#
# Without an NVIDIA driver the tested CPU build of torch is installed, with one the newest build. Say what you want with
#   make install TORCH='torch==2.13.0' PIP_ARGS='--index-url URL'    another build of torch
#   make install CUDA=13                                             DALI for CUDA 13

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= .venv/bin/python
BOOTSTRAP ?= python3
# The choice is kept with the environment, so that it need be made but once.
CUDA ?= $(or $(shell cat .venv/cuda 2>/dev/null),12)
STAMP := .venv/installed-cuda$(CUDA)
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH ?= $(if $(HAS_GPU),torch>=2.11,torch==2.13.0)
PIP_ARGS ?=
DEMO ?= data/synthetic
FUZZ ?=
SOAK ?=
OUT ?= runs/gpu

.PHONY: demo install lint test test-slow test-gpu docs-check fuzz soak bench bench-gpu
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'error: $(BOOTSTRAP) is older than Python 3.11; name a newer one: make BOOTSTRAP=python3.12'; exit 2; }
	@echo 'making .venv with $(BOOTSTRAP) ...'
	$(BOOTSTRAP) -m venv .venv
	@echo 'fetching and installing $(TORCH): minutes, the most of it to download ...'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) '$(TORCH)'
	@# Both DALIs are the same module: neither may be there when the other comes or goes.
	@if [ "$$(cat .venv/cuda 2>/dev/null || echo $(CUDA))" != "$(CUDA)" ]; then \
	  .venv/bin/python -m pip uninstall --quiet --yes nvidia-dali-cuda120 nvidia-dali-cuda130; fi
	@echo 'fetching and installing DALI, OpenCV and the rest (pyproject.toml): minutes again ...'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
ifeq ($(CUDA),13)
	@echo 'putting DALI for CUDA 13 in the place of the one for CUDA 12 ...'
	.venv/bin/python -m pip uninstall --quiet --yes nvidia-dali-cuda120 nvidia-dali-cuda130
	.venv/bin/python -m pip install --quiet --disable-pip-version-check nvidia-dali-cuda130
	@echo 'DALI for CUDA 13 stands in for nvidia-dali-cuda120; a conflict that pip reports about it is meant.'
endif
	@rm -f .venv/installed-cuda*
	@echo $(CUDA) > .venv/cuda
	@touch $@

demo: install
	$(PYTHON) tools/make_synthetic.py --output $(DEMO) --train 1500 --valid 300 --max-width 640
	$(PYTHON) tools/make_shards.py --annotations $(DEMO)/annot --images $(DEMO)/images --output data/shards/synthetic
	@# The demo's own run alone; a packed data set is kept, and packed again only if it changed.
	@rm -rf runs/demo
	$(PYTHON) train.py --config configs/demo.yaml
	$(PYTHON) evaluate.py --checkpoint runs/demo/best.pt --json runs/demo/pckh.json --report runs/demo/report --picture runs/demo/predictions.png

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: lint
	$(PYTHON) -m pytest -m 'not slow and not gpu'

test-slow: install
	$(PYTHON) -m pytest -m 'slow and not gpu'

test-gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -m gpu --continue-on-collection-errors

docs-check: install
	$(PYTHON) -m pytest tests/test_docs.py

fuzz: install
	FUZZ_INPUTS=$(or $(FUZZ),10000) $(PYTHON) -m pytest -q -m slow tests/test_fuzz.py

soak: install
	$(PYTHON) tests/soak.py $(SOAK)

bench: install
	$(PYTHON) benchmarks/throughput.py

# A plain checkout will do: nothing is installed, and a PYTHONPATH that is set stays.
bench-gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/throughput.py --device cuda --budget 9 \
	  --suites step training loader --rounds 2 --json $(OUT)/throughput.json
