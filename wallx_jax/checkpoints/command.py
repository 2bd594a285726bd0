"""Run the conversion commands in convert/ with shared setup and error handling."""

import logging
import sys
import warnings
from collections.abc import Callable

import jax

from wallx_jax.checkpoints import failed_save
from wallx_jax.checkpoints.layout import CheckpointError


def run(main: Callable[[], None]) -> None:
    """Run a command on the CPU; exit with a one-line message on errors that the user can fix."""
    jax.config.update("jax_platforms", "cpu")  # only copies bytes: leave the accelerator to other programs
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's warnings do not apply to a single process
    try:
        with failed_save.quiet():
            main()
    except (CheckpointError, OSError, ValueError) as error:  # WeightsError is a ValueError
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
