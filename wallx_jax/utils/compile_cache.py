"""Configure JAX's persistent compilation cache, so that restarting a run does not recompile it."""

import logging
import os
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return the default cache directory: wallx_jax/xla in the user's cache directory (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wallx_jax" / "xla"


def enable(where: str = "auto") -> Path | None:
    """Enable JAX's persistent cache for programs that take longer than a second to compile.

    Never called on import. If the directory is not writable, log a warning and compile without a cache.

    Args:
        where: a directory; "auto" for JAX_COMPILATION_CACHE_DIR if it is set and `default_folder` otherwise; or "off".
            JAX_ENABLE_COMPILATION_CACHE=0 also disables the cache.

    Returns:
        The local cache directory; None if the cache is off, not writable, or a bucket that JAX writes to itself.
    """
    compilation_cache.reset_cache()  # JAX reads these settings only at its first compilation, which may have happened
    if where == "off" or not jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    environment = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    given = (jax.config.values["jax_compilation_cache_dir"] or environment) if where == "auto" else where
    if given and "://" in given:  # a bucket, which JAX writes to itself
        jax.config.update("jax_compilation_cache_dir", given)
        return None
    folder = Path(given).expanduser().absolute() if given else default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        logger.warning("compiled programs are not kept: %s cannot be written (%s)", folder, error.strerror or error)
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
