"""Where compiled programs are kept, so that the next start of the same run does not compile again."""

import logging
import os
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """wallx_jax/xla in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wallx_jax" / "xla"


def enable(where: str = "auto") -> Path | None:
    """Makes JAX keep what takes longer than a second to compile; returns the folder, None where nothing is kept.

    Never called on import. A folder that cannot be written is a warning: the run compiles as without it.

    Args:
        where: a directory; "auto" for JAX_COMPILATION_CACHE_DIR where that is set and `default_folder` otherwise; or
            "off". JAX_ENABLE_COMPILATION_CACHE=0 switches it off, too.
    """
    compilation_cache.reset_cache()  # JAX looks at its settings at the first compilation alone, and there may have been
    if where == "off" or not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    environment = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    given = (jax.config.jax_compilation_cache_dir or environment) if where == "auto" else where
    if given and "://" in given:  # a bucket, which JAX writes to by itself
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
