"""Lock a run directory: a second run would delete the first one's unfinished saves and rename its checkpoints."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from wallx_jax.checkpoints.layout import CheckpointError

logger = logging.getLogger(__name__)

FILE = "run.lock"
BEAT_S = 5.0  # interval of the heartbeat


@contextlib.contextmanager
def hold(save_path: Path) -> Iterator[None]:
    """Keep other runs out of a run directory until the block or the process ends, in whatever way.

    The operating system releases the lock when the process ends. On a network file system, locks may only be visible on
    one machine. The owner therefore also writes a heartbeat to the file every BEAT_S seconds, and a run that finds an
    entry of another machine waits to see whether it is updated.

    Raises:
        CheckpointError: another run is training in the directory; the message names it.
    """
    file = save_path / FILE
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        owner = _read(file)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks: only the entries decide
            free = not (owner and owner["host"] == socket.gethostname() and _lives(owner["pid"]))
        if free and owner and owner["host"] != socket.gethostname():
            logger.warning(
                "was the run of %s in %s killed? Waiting to see whether it continues", owner["host"], save_path
            )
            time.sleep(2 * BEAT_S)
            free = _read(file) == owner
        if not free:
            raise CheckpointError(_refusal(save_path, _read(file)))
        done = threading.Event()
        beating = threading.Thread(target=_beat, args=(handle, done), daemon=True, name="run lock")
        beating.start()
        try:
            yield
        finally:
            done.set()
            beating.join()
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _beat(handle: int, done: threading.Event) -> None:
    entry = {"host": socket.gethostname(), "pid": os.getpid()}
    while True:
        with contextlib.suppress(OSError):  # a full disk is reported by the next save
            os.pwrite(handle, json.dumps(entry | {"time": time.time()}).encode().ljust(256), 0)
            os.fsync(handle)
        if done.wait(BEAT_S):
            return


def _read(file: Path) -> dict | None:
    """Return the entry of a run that holds the lock or was killed; None if the last run has ended normally."""
    try:
        return json.loads(file.read_bytes())  # reopen the file: a network file system then shows new content
    except ValueError:
        return None


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _refusal(save_path: Path, owner: dict | None) -> str:
    who = f" (process {owner['pid']} on {owner['host']})" if owner else ""
    return (
        f"another run{who} is training in save_path {save_path}: wait until it has ended, or end it, or choose another "
        "save_path"
    )
