"""The processes of a run end together: when one has to, each says so in one line and ends within seconds.

Without that, the others would wait for it in a collective until that times out.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from jax._src.distributed import global_state  # the key-value store that the processes share has no public name

from wallx_jax.signals import say

_KEY = "wallx_jax/end"
_POLL_S = 0.3
_PATIENCE_S = 3.0  # for the others to learn of it
_leaving = threading.Lock()  # taken by the thread that ends the process, and never released


def leave(line: str, code: int) -> NoReturn:
    """Ends this process at once and, where it is one of several, the others of the run with it.

    Args:
        line: printed here and, with the number of this process, by the others.
        code: exit code of all of them.
    """
    _leaving.acquire()
    say(line)
    _end(code, {"process": global_state.process_id, "line": line, "code": code})


def fail(line: str, code: int) -> NoReturn:
    """Ends this process with an error, in the usual way where it is alone and as `leave` where it is not."""
    if global_state.client is not None:
        sys.stdout.flush()
        leave(line, code)
    print(line, file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process when another one of its run calls `leave`, as long as the block is entered."""
    client = global_state.client
    if client is None:
        yield
        return
    done = threading.Event()

    def follow() -> None:
        while not done.wait(_POLL_S):
            with contextlib.suppress(Exception):  # nobody leaves; or the store is gone, and JAX ends the process
                note = json.loads(client.key_value_try_get(_KEY))
                _leaving.acquire()
                say(f"process {note['process']} ended the run: {note['line']}")
                _end(note["code"])

    threading.Thread(target=follow, daemon=True, name="ending").start()
    try:
        yield
    except BaseException:
        if _leaving.locked():  # what a collective raises when a process is gone: the reason has been told
            time.sleep(2 * _PATIENCE_S)
        raise
    finally:
        done.set()


def _end(code: int, note: dict[str, Any] | None = None) -> NoReturn:
    """Leaves a note for the others, waits until all of them know of the end, and ends the process."""
    if global_state.client is not None:
        # In a thread: a store that does not answer must not keep the process.
        telling = threading.Thread(target=_tell, args=(note,), daemon=True)
        telling.start()
        telling.join(_PATIENCE_S)
    os._exit(code)


def _tell(note: dict[str, Any] | None) -> None:
    client, me = global_state.client, global_state.process_id
    if note is not None:
        with contextlib.suppress(Exception):  # another one was first
            client.key_value_set(_KEY, json.dumps(note))
    client.key_value_set(f"{_KEY}/known/{me}", "")
    while len(client.key_value_dir_get(f"{_KEY}/known")) < global_state.num_processes:
        time.sleep(0.05)
    if me == 0:  # it holds the store
        time.sleep(_POLL_S)
