"""What remains of a save that failed: no partial checkpoint, and one line with the cause and the remedy.

A full disk shows as an OSError where Python writes, and as text with the error's number where TensorStore does. Orbax
raises the failure and logs it as well, with a traceback from each of its threads, a thousand lines in all.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from wallx_jax.checkpoints.layout import CheckpointError, causes, complete_steps, partial_saves, reason
from wallx_jax.models.param_summary import gib
from wallx_jax.utils.files import DISK_REMEDIES

_PATIENCE_S = 60.0  # for the writes that were under way
_REMOVAL_S = 10.0


def failure(folder: Path, step: int, size: int, error: BaseException) -> CheckpointError:
    """What to raise for a save of `size` bytes in a checkpoints/ folder that failed."""
    why, remedy = cause(error)
    if _code(error) == errno.ENOSPC:
        why += f" (the checkpoint takes {gib(size)}, {gib(shutil.disk_usage(folder).free)} is free)"
    elif _code(error) == errno.EDQUOT:
        why += f" (the checkpoint takes {gib(size)})"
    intact = complete_steps(folder)
    kept = f"step {intact[-1]} is intact" if intact else "there is no earlier checkpoint"
    again = "go on with resume.ckpt=latest" if intact else "start the run again"
    return CheckpointError(f"saving step {step} in {folder} failed: {why}; {kept}. Remedy: {remedy}, then {again}")


def cause(error: BaseException) -> tuple[str, str]:
    """Why writing a checkpoint failed, and what helps."""
    code = _code(error)
    if code in DISK_REMEDIES:
        return os.strerror(code), DISK_REMEDIES[code]
    return reason(error), "find out what is wrong there"


def clean_up(folder: Path, step: int) -> None:
    """Removes what a failed save has left, once no thread of Orbax writes any more.

    Process 0 does; others, whose ending would end it, give it the time to.
    """
    wait_for_writers()
    with contextlib.suppress(OSError):  # what cannot be removed now goes when the run is resumed
        if jax.process_index() == 0:
            for partial in _partial(folder, step):
                shutil.rmtree(partial)
        deadline = time.monotonic() + _REMOVAL_S
        while _partial(folder, step) and time.monotonic() < deadline:
            time.sleep(0.1)


def wait_for_writers() -> None:
    """Waits until no thread of Orbax writes any more: a late file would bring its folder back."""
    deadline = time.monotonic() + _PATIENCE_S
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            # The base class's method: Orbax's raises what the thread has failed with.
            threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))


def _partial(folder: Path, step: int) -> list[Path]:
    return [path for path in partial_saves(folder) if path.name.split(".")[0] == str(step)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back the tracebacks that Orbax logs of a failure which it raises as well, and what TensorStore makes of
    writes that end after the first one failed: nobody waits for them any more, their event loop is closed."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    others = sys.unraisablehook

    def without_traceback(record: logging.LogRecord) -> bool:
        return not record.exc_info

    def unraisable(error: Any) -> None:
        if str(error.exc_value) != "Event loop is closed":
            others(error)

    for logger in loggers:
        logger.addFilter(without_traceback)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(without_traceback)
        sys.unraisablehook = others


def _code(error: BaseException) -> int | None:
    """The operating system's number for what went wrong."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if found := re.search(r"os_error_code='(\d+)'", str(cause)):
            return int(found[1])
    return None
