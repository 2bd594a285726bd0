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
import threading
import time
from pathlib import Path

import jax

from wallx_jax.training import checkpoint_dir
from wallx_jax.training.checkpoint_dir import CheckpointError
from wallx_jax.training.parts import gib

# By the operating system's number; others are told as they come.
REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or use another file system",
    errno.EROFS: "make it writable again",
    errno.EACCES: "make it writable again",
    errno.EPERM: "make it writable again",
}
_LOGGERS = ("absl", "asyncio")
_PATIENCE_S = 60.0  # for the writes that were under way
_REMOVAL_S = 10.0


def failure(folder: Path, step: int, size: int, error: BaseException) -> CheckpointError:
    """What to raise for a save of `size` bytes in a checkpoints/ folder that failed."""
    code = _code(error)
    why = os.strerror(code) if code in REMEDIES else checkpoint_dir.reason(error)
    if code in (errno.ENOSPC, errno.EDQUOT):
        why += f" (the checkpoint takes {gib(size)}"
        if code == errno.ENOSPC:  # of a quota the disk knows nothing
            why += f", {gib(shutil.disk_usage(folder).free)} is free"
        why += ")"
    intact = checkpoint_dir.complete_steps(folder)
    kept = f"step {intact[-1]} is intact" if intact else "there is no earlier checkpoint"
    remedy = REMEDIES.get(code, "find out what is wrong there")
    again = "go on with resume.ckpt=latest" if intact else "start the run again"
    return CheckpointError(f"saving step {step} in {folder} failed: {why}; {kept}. Remedy: {remedy}, then {again}")


def clean_up(folder: Path, step: int) -> None:
    """Removes what a failed save has left, once no thread of Orbax writes any more.

    Process 0 does; others, whose ending would end it, give it the time to.
    """
    deadline = time.monotonic() + _PATIENCE_S
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            # The base class's method: Orbax's raises what the thread has failed with.
            threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))
    with contextlib.suppress(OSError):  # what cannot be removed now goes when the run is resumed
        if jax.process_index() == 0:
            for partial in _partial(folder, step):
                shutil.rmtree(partial)
        deadline = time.monotonic() + _REMOVAL_S
        while _partial(folder, step) and time.monotonic() < deadline:
            time.sleep(0.1)


def _partial(folder: Path, step: int) -> list[Path]:
    return [path for path in checkpoint_dir.partial_saves(folder) if path.name.split(".")[0] == str(step)]


def silence() -> None:
    """Keeps back log records with a traceback from Orbax and asyncio, until `unsilence`."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_without_traceback)


def unsilence() -> None:
    """Ends `silence`."""
    for name in _LOGGERS:
        logging.getLogger(name).removeFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _code(error: BaseException) -> int | None:
    """The operating system's number for what went wrong."""
    for cause in checkpoint_dir.causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if found := re.search(r"os_error_code='(\d+)'", str(cause)):
            return int(found[1])
    return None
