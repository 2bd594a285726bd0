# These targets work on a fresh machine with python3 (3.11 or 3.12):
#
#   make demo       record a dataset, train and evaluate a tiny model on the CPU; installs about 1.1 GB, without PyTorch
#   make test       run all tests, with lerobot and PyTorch as references
#   make test-fast  run the tests that take less than two seconds each: three minutes on two cores
#   make lint       run ruff and mypy
#
# Further targets for development: test-most, test-random, extras, test-install, test-lowest, torch-reference, test-loaders, clean.
PYTHON ?= python3
PYTHON_3_12 ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers process the test files in order; the order puts long files first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What each lane leaves out; pyproject.toml describes the marks.
MOST := -m "not slow and not multiprocess"
FAST := -m "not medium and not slow and not multiprocess"
SEED ?= $(shell date +%s)

.PHONY: demo test test-most test-fast test-random lint extras test-install test-lowest torch-reference test-loaders clean

demo: $(VENV)/.train
	JAX_PLATFORMS=cpu $(BIN)/python scripts/demo.py

test: $(VENV)/.test
	$(PYTEST)

test-most: $(VENV)/.test
	$(PYTEST) $(MOST)

test-fast: $(VENV)/.test
	$(PYTEST) $(FAST)

# Run the fast tests in random order across files. `make test-random SEED=N` repeats an order.
test-random: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 $(FAST) --random-order-bucket=global --random-order-seed=$(SEED)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Resolve every combination of extras for both Python versions, and check that none brings in PyTorch or a second CUDA
# unintentionally.
extras: $(VENV)/.uv
	PATH="$(abspath $(BIN)):$$PATH" UV_DEFAULT_INDEX="$(INDEX)" $(BIN)/python scripts/check_extras.py

# Install the package with the `train` extra by pip, as a user would, and run a short demo: record, train, evaluate, plot.
# None of this may need PyTorch or lerobot.
test-install:
	rm -rf .venv-install && $(PYTHON) -m venv .venv-install
	.venv-install/bin/python -m pip install --quiet ".[train]"
	! .venv-install/bin/python -m pip show --quiet torch lerobot
	dir=$$(mktemp -d) && JAX_PLATFORMS=cpu .venv-install/bin/python scripts/demo.py --workdir $$dir --episodes 20 --steps 3 \
	  && test -s $$dir/demo.png && rm -r $$dir
	du -sh .venv-install && rm -rf .venv-install

# Test with the lowest versions that pyproject.toml allows, without PyTorch and lerobot.
test-lowest:
	$(MAKE) VENV=.venv-lowest PYTHON=$(PYTHON) .venv-lowest/.lowest
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile $(MOST)

# Install lerobot's PyTorch wall_x, which scripts/benchmark.py --compare-torch compares with wallx_jax. It needs
# Python 3.12 and pins other versions, so it has its own environment.
torch-reference: $(VENV)/.uv
	test -x .venv-torch/bin/python || $(BIN)/uv venv --python $(PYTHON_3_12) .venv-torch
	$(call install,.venv-torch/bin/python,"lerobot[wallx]==0.6.1" "transformers>=5.4$(,)<5.6")

# Test that lerobot can load exported models.
test-loaders: torch-reference $(VENV)/.test
	$(BIN)/python -m pytest tests/checkpoints/test_loaders.py

clean:
	rm -rf .venv .venv-torch .venv-install .venv-lowest *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Resolve all requirements at once with uv: pip backtracks for more than ten minutes because of the pins of lerobot and
# transformers. uv ignores pip's settings, so pass it the index that is configured for pip.
, := ,
INDEX = $${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || \
  echo https://pypi.org/simple)}}
define install
	UV_DEFAULT_INDEX="$(INDEX)" $(BIN)/uv pip install --python $(1) $(2)
endef

$(VENV)/.uv:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
	  "$(PYTHON) is %d.%d; wallx_jax is tested on 3.11 and 3.12: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	touch $@

$(VENV)/.train: pyproject.toml $(VENV)/.uv
	$(call install,$(BIN)/python,-e ".[train]")
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.uv
	$(call install,$(BIN)/python,-e ".[test$(,)dev]")
	touch $@

$(VENV)/.lowest: pyproject.toml $(VENV)/.uv
	$(call install,$(BIN)/python,--resolution lowest-direct -e ".[test-core]")
	touch $@
