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

from wallx_jax.utils.signals import say

_KEY = "wallx_jax/end"
_WAIT_S = 24 * 3600
_GRACE_S = 0.3
_PATIENCE_S = 10.0  # for the others to learn of it: XLA may keep their threads waiting for seconds while it lowers
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
    client, me = global_state.client, global_state.process_id
    if client is None:
        yield
        return
    done = threading.Event()

    def follow() -> None:
        while not done.is_set():
            # One call that waits, instead of many that ask: where gRPC has just sent something to a process that is
            # then stopped for a minute, it takes the connection for dead.
            try:
                note = json.loads(client.blocking_key_value_get(_note_for(me), 1000 * _WAIT_S))
            except Exception:  # nobody leaves; or the store is gone, and JAX ends the process
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
        if _leaving.locked():  # what a collective raises when a process is gone: the reason has been told
            time.sleep(2 * _PATIENCE_S)
        raise
    finally:
        done.set()
        with contextlib.suppress(Exception):  # another one leaves just now
            client.key_value_set(_note_for(me), json.dumps(None))
        follower.join(_PATIENCE_S)


def _note_for(process: int) -> str:
    """Key of the note that ends a process, or, where it is null, that it need not look for one any more."""
    return f"{_KEY}/{process}"


def _end(code: int, note: dict[str, Any] | None = None) -> NoReturn:
    """Leaves a note for the others, and ends the process; process 0, which holds the store, ends last."""
    if global_state.client is not None:
        # In a thread: a store that does not answer must not keep the process.
        telling = threading.Thread(target=_tell, args=(note,), daemon=True)
        telling.start()
        telling.join(_PATIENCE_S)
    os._exit(code)


def _tell(note: dict[str, Any] | None) -> None:
    client, me = global_state.client, global_state.process_id
    if note is not None:
        for process in range(global_state.num_processes):
            with contextlib.suppress(Exception):  # another one was first
                client.key_value_set(_note_for(process), json.dumps(note))
    client.key_value_set(f"{_KEY}/known/{me}", "")
    if me == 0:
        while len(client.key_value_dir_get(f"{_KEY}/known")) < global_state.num_processes:
            time.sleep(0.05)
        time.sleep(_GRACE_S)  # without the store, what ends meanwhile would end by a signal
