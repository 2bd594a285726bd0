"""Data worker processes: how they start, and what they do first."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # through which Python's shared memory goes, on Linux
BUFFERED = 2  # batches that a worker reads ahead
_PATIENCE_S = 60.0


def start_worker(worker: int, workers: int) -> None:
    """Worker `worker` of `workers`.

    Signals are for the training process, which ends its workers itself: Ctrl-C and job schedulers send them to all
    processes, and an interrupted run still needs its batches. A training process that was killed ends nobody, so a
    worker watches it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


@contextlib.contextmanager
def starting(workers: int) -> Iterator[None]:
    """While entered, processes that are started do not run the main module first; leaves when `workers` have started.

    Python has a spawned process import the main module, to find in it what it is sent. That runs a script that lacks
    the `if __name__ == "__main__"` once more. Grain sends what the main module defines by value, so nothing is missed.
    """
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name, None) for name in ("__spec__", "__file__")}
    before = len(multiprocessing.active_children())
    main.__spec__ = main.__file__ = None
    try:
        yield
        deadline = time.monotonic() + _PATIENCE_S
        while len(multiprocessing.active_children()) < before + workers and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


def check_shared_memory(workers: int, batch_bytes: int, folder: Path = SHARED_MEMORY) -> None:
    """Checks that the batches of the workers fit into shared memory: beyond its end writing kills a process.

    Args:
        workers: worker processes.
        batch_bytes: size of a batch.

    Raises:
        OSError: they do not.
    """
    if not workers or not folder.is_dir():
        return
    needed = workers * (BUFFERED + 2) * batch_bytes  # one being written, one being read
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:.0f} MiB free, and the batches of {workers} data workers may take "
            f"{needed / 2**20:.0f}: free some, give the container more (--shm-size), or lower num_workers"
        )


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
