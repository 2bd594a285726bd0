# Two commands do everything on a fresh machine: `make demo` and `make test`. They need python3 (3.11 or 3.12).
PYTHON ?= python3
PYTHON_3_12 ?= python3.12
BIN := .venv/bin

.PHONY: demo test lint torch-reference test-loaders clean

demo: .venv/.installed
	JAX_PLATFORMS=cpu $(BIN)/python scripts/demo.py

# Two processes take the files of tests in their order, in which the long ones come early.
test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# lerobot's PyTorch wall_x, which scripts/benchmark.py --compare-torch measures beside ours. It needs python 3.12 and has
# pins of its own, so it lives apart.
torch-reference: .venv/.installed
	test -x .venv-torch/bin/python || $(BIN)/uv venv --python $(PYTHON_3_12) .venv-torch
	$(call install,.venv-torch/bin/python,"lerobot[wallx]==0.6.1" "transformers>=5.4$(,)<5.6")

# lerobot's loader on what we export.
test-loaders: torch-reference
	$(BIN)/python -m pytest tests/conversion/test_loaders.py

clean:
	rm -rf .venv .venv-torch *.egg-info .pytest_cache .ruff_cache .hypothesis

# One resolution by uv: pip backtracks for more than ten minutes between the pins of lerobot and of transformers.
# uv does not read pip's settings, so an index that was set for pip is handed over.
, := ,
define install
	index="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}}"; \
	  $(BIN)/uv pip install --python $(1) $${index:+--default-index "$$index"} $(2)
endef

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
	  "$(PYTHON) is %d.%d; wallx_jax is tested on 3.11 and 3.12: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(call install,$(BIN)/python,-e ".[test$(,)dev]")
	touch $@
