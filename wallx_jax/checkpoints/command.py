"""Run the conversion commands in convert/ with shared setup and error handling."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator

import jax

from wallx_jax.checkpoints import failed_save
from wallx_jax.utils.errors import run_main


def run(main: Callable[[], None]) -> None:
    """Run a command on the CPU; exit with a one-line message on errors that the user can fix."""
    try:
        with _setup(), failed_save.quiet():
            run_main(main)
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")


@contextlib.contextmanager
def _setup() -> Iterator[None]:
    """Select the CPU and print warnings in one line within the `with` block."""
    absl = logging.getLogger("absl")
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # JAX adds its options when it is imported
    level = absl.level
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        jax.config.update("jax_platforms", "cpu")  # only copies bytes: leave the accelerator to other programs
        absl.setLevel(logging.ERROR)  # Orbax's warnings do not apply to a single process
        try:
            yield
        finally:
            jax.config.update("jax_platforms", platforms)
            absl.setLevel(level)
