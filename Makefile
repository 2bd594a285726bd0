# Two commands do everything on a fresh machine: `make demo` and `make test`. They need python3 (3.11 or 3.12).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.installed
	JAX_PLATFORMS=cpu $(BIN)/python scripts/demo.py

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .hypothesis

# One resolution by uv: pip backtracks for more than ten minutes between the pins of lerobot and of transformers.
# uv does not read pip's settings, so an index that was set for pip is handed over.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
	  "$(PYTHON) is %d.%d; wallx_jax is tested on 3.11 and 3.12: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	index="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}}"; \
	  $(BIN)/uv pip install --python $(BIN)/python $${index:+--default-index "$$index"} -e ".[test,dev]"
	touch $@
