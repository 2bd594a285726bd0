"""What the commands in convert/ share."""

import logging
import sys
import warnings
from collections.abc import Callable

import jax

from wallx_jax.checkpoints import failed_save
from wallx_jax.checkpoints.layout import CheckpointError


def run(main: Callable[[], None]) -> None:
    """Runs a command on the CPU; what the user can mend ends it with one message."""
    jax.config.update("jax_platforms", "cpu")  # moves bytes only: an accelerator stays free for others
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what does not concern a single process
    try:
        with failed_save.quiet():
            main()
    except (CheckpointError, OSError, ValueError) as error:  # WeightsError is a ValueError
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
