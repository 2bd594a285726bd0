"""Compiled programs are kept for the next process."""

import os
import subprocess
import sys

import jax
import pytest

from wallx_jax.utils import compile_cache

PROGRAM = """
import sys, jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from wallx_jax.utils import compile_cache
jnp.ones(3).sum()  # a process that has compiled before
print(compile_cache.enable(*sys.argv[1:]))
hits.clear()
jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8)))
print(hits.count("/jax/compilation_cache/cache_hits"), hits.count("/jax/compilation_cache/cache_misses"))
"""


def run(*where, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *where],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr
    folder, counts = done.stdout.splitlines()
    return folder, *map(int, counts.split())


@pytest.mark.medium
def test_the_second_process_does_not_compile(tmp_path):
    folder, hits, misses = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder == str(tmp_path / "wallx_jax" / "xla") and hits == 0 and misses > 0
    kept = sorted(path.name for path in (tmp_path / "wallx_jax" / "xla").iterdir())
    assert kept
    assert run(XDG_CACHE_HOME=str(tmp_path)) == (folder, misses, 0)

    # What a killed process left half written is compiled anew.
    for file in (tmp_path / "wallx_jax" / "xla").glob("*-cache"):
        file.write_bytes(file.read_bytes()[:10])
    assert run(XDG_CACHE_HOME=str(tmp_path))[1] == 0


@pytest.mark.medium
def test_where_it_is(tmp_path):
    assert run("auto", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "env"))[0] == str(tmp_path / "env")
    assert run(str(tmp_path / "own"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "env2"))[0] == str(tmp_path / "own")
    assert run("off", XDG_CACHE_HOME=str(tmp_path / "off")) == ("None", 0, 0)
    assert not (tmp_path / "off").exists() and list((tmp_path / "own").iterdir())


@pytest.fixture
def enabled():
    """The cache is off in tests."""
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_compilation_cache_dir", None)


def test_a_folder_that_cannot_be_written_is_a_warning(enabled, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert compile_cache.enable(str(tmp_path / "file" / "inside")) is None
    assert "cannot be written" in caplog.text and str(tmp_path / "file" / "inside") in caplog.text
    assert jax.config.jax_compilation_cache_dir is None
    assert compile_cache.enable(str(tmp_path / "new")) == tmp_path / "new"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "new")
