"""Clean up after a failed save: remove the partial checkpoint and report the cause and remedy in one line.

A full disk appears as an OSError where Python writes, and as text that contains the errno where TensorStore writes.
Orbax both raises the failure and logs it with a traceback from each of its threads, about a thousand lines in total.
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

from wallx_jax.checkpoints.layout import CheckpointError, complete_steps, partial_saves
from wallx_jax.models.param_summary import gib
from wallx_jax.utils.errors import causes, root_cause
from wallx_jax.utils.files import DISK_REMEDIES

_PATIENCE_S = 60.0  # for writes in progress
_REMOVAL_S = 10.0


def failure(folder: Path, step: int, size: int, error: BaseException) -> CheckpointError:
    """Return the error to raise for a failed save of `size` bytes in the checkpoints/ folder `folder`."""
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
    """Return why writing a checkpoint failed, and the remedy."""
    code = _code(error)
    if code in DISK_REMEDIES:
        return os.strerror(code), DISK_REMEDIES[code]
    return root_cause(error), "find out what is wrong there"


def clean_up(folder: Path, step: int) -> None:
    """Remove the leftovers of a failed save once Orbax's threads have stopped writing.

    Process 0 removes them. The other processes wait until it has, because process 0 ends as soon as one of them does.
    """
    wait_for_writers()
    with contextlib.suppress(OSError):  # files that cannot be removed now are removed when the run is resumed
        if jax.process_index() == 0:
            for partial in _partial(folder, step):
                shutil.rmtree(partial)
        deadline = time.monotonic() + _REMOVAL_S
        while _partial(folder, step) and time.monotonic() < deadline:
            time.sleep(0.1)


def wait_for_writers() -> None:
    """Wait until Orbax's threads have stopped writing: a late write would recreate a removed folder."""
    deadline = time.monotonic() + _PATIENCE_S
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            # Call the base class's method: Orbax's override raises the thread's exception.
            threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))


def _partial(folder: Path, step: int) -> list[Path]:
    return [path for path in partial_saves(folder) if path.name.split(".")[0] == str(step)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress duplicate error output while a save may fail.

    This drops the tracebacks that Orbax logs for failures that it also raises, and the "Event loop is closed" errors of
    TensorStore writes that finish after the first one failed, when nothing awaits them any more.
    """
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
    """Return the operating system's errno of an error; None if it has none."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if found := re.search(r"os_error_code='(\d+)'", str(cause)):
            return int(found[1])
    return None
