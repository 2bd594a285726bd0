"""What a data worker process does when it starts."""

import multiprocessing
import os
import signal
import threading


def start_worker(worker: int, workers: int) -> None:
    """Worker `worker` of `workers`.

    Signals are for the training process, which ends its workers itself: Ctrl-C and job schedulers send them to all
    processes, and an interrupted run still needs its batches. A training process that was killed ends nobody, so a
    worker watches it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
