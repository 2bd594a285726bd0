"""Starts data worker processes and checks the shared memory that they need."""

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

SHARED_MEMORY = Path("/dev/shm")  # where Python's shared memory is mounted on Linux
BUFFERED = 2  # batches prefetched per worker
_PATIENCE_S = 60.0


def start_worker(worker: int, workers: int) -> None:
    """Initialize a data worker process: ignore signals and exit when the training process does.

    The training process stops its workers itself. Ctrl-C and job schedulers signal all processes, and an interrupted
    run still needs its batches, so workers ignore these signals. A killed training process cannot stop its workers, so
    each worker watches for its exit.

    Args:
        worker: index of this worker.
        workers: number of workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


@contextlib.contextmanager
def starting(workers: int) -> Iterator[None]:
    """Keep processes that are started in this context from running the main module first.

    The context exits when `workers` processes have started, or after _PATIENCE_S seconds.

    Python makes a spawned process import the main module, to resolve what is sent to it. That would run a script that
    lacks `if __name__ == "__main__"` again. Grain pickles definitions of the main module by value, so the import is not
    needed.
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
    """Check that the workers' batches fit into shared memory: writing past its end kills a process.

    Args:
        workers: number of worker processes.
        batch_bytes: size of a batch in bytes.
        folder: mount point of the shared memory.

    Raises:
        OSError: if they do not fit.
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
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
