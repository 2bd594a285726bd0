"""Shut down all processes of a run together: when one has to end, each logs one line and exits within seconds.

Otherwise, the other processes would wait for it in a collective until that times out.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from jax._src.distributed import global_state  # no public API for the key-value store that the processes share

from wallx_jax.utils.signals import say

_KEY = "wallx_jax/end"
_WAIT_S = 24 * 3600
_GRACE_S = 0.3
_PATIENCE_S = 10.0  # for the others to be notified: XLA may block their threads for seconds during lowering
_leaving = threading.Lock()  # taken by the thread that ends the process, and never released


def leave(line: str, code: int) -> NoReturn:
    """End this process immediately, along with all other processes of the run, if any.

    Args:
        line: message printed by this process and, with the id of this process, by the others.
        code: exit code of all processes.
    """
    _leaving.acquire()
    say(line)
    _end(code, {"process": global_state.process_id, "line": line, "code": code})


def fail(line: str, code: int) -> NoReturn:
    """End this process with an error: by a normal exit in a single-process run, otherwise through `leave`."""
    if global_state.client is not None:
        sys.stdout.flush()
        leave(line, code)
    print(line, file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """While the block is active, end this process when another process of the run calls `leave`."""
    client, me = global_state.client, global_state.process_id
    if client is None:
        yield
        return
    done = threading.Event()

    def follow() -> None:
        while not done.is_set():
            # One blocking call instead of polling: if gRPC has just sent something to a process that is then paused
            # for a minute, it considers the connection dead.
            try:
                note = json.loads(client.blocking_key_value_get(_note_for(me), 1000 * _WAIT_S))
            except Exception:  # no process has left; or the store is gone, and JAX ends this process
                done.wait(_GRACE_S)
                continue
            if note is not None:
                _leaving.acquire()
                say(f"process {note['process']} ended the run: {note['line']}")
                _end(note["code"])

    follower = threading.Thread(target=follow, daemon=True, name="ending")
    follower.start()
    try:
        yield
    except BaseException:
        if _leaving.locked():  # raised by a collective because a process is gone: already reported
            time.sleep(2 * _PATIENCE_S)
        raise
    finally:
        done.set()
        with contextlib.suppress(Exception):  # another process is leaving at this moment
            client.key_value_set(_note_for(me), json.dumps(None))
        follower.join(_PATIENCE_S)


def _note_for(process: int) -> str:
    """Return the key of the note that ends a process; a null note stops it from waiting for one."""
    return f"{_KEY}/{process}"


def _end(code: int, note: dict[str, Any] | None = None) -> NoReturn:
    """Notify the other processes and end this one; process 0, which hosts the store, ends last."""
    if global_state.client is not None:
        # In a thread: a store that does not respond must not keep the process from ending.
        telling = threading.Thread(target=_tell, args=(global_state.client, note), daemon=True)
        telling.start()
        telling.join(_PATIENCE_S)
    os._exit(code)


def _tell(client: Any, note: dict[str, Any] | None) -> None:
    me = global_state.process_id
    if note is not None:
        for process in range(global_state.num_processes):
            with contextlib.suppress(Exception):  # another process was first
                client.key_value_set(_note_for(process), json.dumps(note))
    client.key_value_set(f"{_KEY}/known/{me}", "")
    if me == 0:
        while len(client.key_value_dir_get(f"{_KEY}/known")) < global_state.num_processes:
            time.sleep(0.05)
        time.sleep(_GRACE_S)  # without the store, processes that are still ending would be killed by a signal
