"""Temporary folders that go when their process ends, however it ends."""

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
    """A folder in the system's temporary directory (TMPDIR), removed with this object or when the process ends.

    What a killed process left is removed when the next one makes a folder: the owner of a folder holds a lock in it,
    which the system releases.

    Attributes:
        path: the folder.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        handle = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._finalizer = weakref.finalize(self, _remove, self.path, handle, os.getpid())


def _remove(path: Path, handle: int, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of it
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _remove_abandoned() -> None:
    """Removes the folders of processes that are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, another user's, or gone meanwhile
            handle = os.open(folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)
