"""Create temporary directories that are cleaned up even if their process is killed."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PREFIX = "wallx_jax_"
LOCK = "lock"


class ScratchFolder:
    """A directory under the system's temporary directory (TMPDIR), removed with this object or at process exit.

    Directories left by killed processes are removed when the next one is created: each owner locks a file in its
    directory, and the operating system releases the lock of a process that is gone.

    Attributes:
        path: the directory.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        handle = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._finalizer = weakref.finalize(self, _remove, self.path, handle, os.getpid())


def _remove(path: Path, handle: int, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of the owner
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _remove_abandoned() -> None:
    """Remove the directories of processes that are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, owned by another user, or already removed
            handle = os.open(folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)
