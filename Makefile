# On a fresh machine with python3 (3.11 or 3.12) each of these works at once:
#
#   make demo       records, trains and evaluates a tiny model on the CPU; about 1.1 GB of packages, no PyTorch
#   make test       all tests, with lerobot and PyTorch as references
#   make test-fast  those that take seconds
#   make lint       ruff and mypy
#
# Others that a change may need: extras, test-install, test-lowest, torch-reference, test-loaders, clean.
PYTHON ?= python3
PYTHON_3_12 ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes take the files of tests in their order, in which the long ones come early.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint extras test-install test-lowest torch-reference test-loaders clean

demo: $(VENV)/.train
	JAX_PLATFORMS=cpu $(BIN)/python scripts/demo.py

test: $(VENV)/.test
	$(PYTEST)

test-fast: $(VENV)/.test
	$(PYTEST) -m "not slow and not multiprocess"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every combination of extras, resolved for both pythons: no PyTorch and no second CUDA where it does not belong.
extras: $(VENV)/.uv
	PATH="$(abspath $(BIN)):$$PATH" UV_DEFAULT_INDEX="$(INDEX)" $(BIN)/python scripts/check_extras.py

# As a user installs it: the package itself and what `train` brings, by pip; then the demo in short, which records,
# trains, evaluates and plots. It must get by without PyTorch and lerobot.
test-install:
	rm -rf .venv-install && $(PYTHON) -m venv .venv-install
	.venv-install/bin/python -m pip install --quiet ".[train]"
	! .venv-install/bin/python -m pip show --quiet torch lerobot
	dir=$$(mktemp -d) && JAX_PLATFORMS=cpu .venv-install/bin/python scripts/demo.py --workdir $$dir --episodes 20 --steps 3 \
	  && test -s $$dir/demo.png && rm -r $$dir
	du -sh .venv-install && rm -rf .venv-install

# The lowest versions that pyproject.toml allows, without PyTorch and lerobot.
test-lowest:
	$(MAKE) VENV=.venv-lowest PYTHON=$(PYTHON) .venv-lowest/.lowest
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not multiprocess"

# lerobot's PyTorch wall_x, which scripts/benchmark.py --compare-torch measures beside ours. It needs python 3.12 and has
# pins of its own, so it lives apart.
torch-reference: $(VENV)/.uv
	test -x .venv-torch/bin/python || $(BIN)/uv venv --python $(PYTHON_3_12) .venv-torch
	$(call install,.venv-torch/bin/python,"lerobot[wallx]==0.6.1" "transformers>=5.4$(,)<5.6")

# lerobot's loader on what we export.
test-loaders: torch-reference $(VENV)/.test
	$(BIN)/python -m pytest tests/checkpoints/test_loaders.py

clean:
	rm -rf .venv .venv-torch .venv-install .venv-lowest *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# One resolution by uv: pip backtracks for more than ten minutes between the pins of lerobot and of transformers.
# uv does not read pip's settings, so an index that was set for pip is handed over.
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
