"""Handle SIGTERM and SIGINT immediately, whatever the main thread is doing.

Python runs signal handlers in the main thread, between two bytecode instructions: not while XLA compiles or a
collective blocks, but possibly inside a library that mistakes the KeyboardInterrupt for an error of its own. `Watch`
reacts in a separate thread instead, which the signal wakes through a pipe. This module imports only the standard
library, so that a command can handle signals while it imports everything else.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

EXIT_CODE = os.EX_TEMPFAIL  # 75: temporary failure, try again later
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watch:
    """Context manager that calls `react` for each SIGTERM and SIGINT; on exit the previous handlers are restored.

    Signals that were ignored before (nohup) stay ignored. Only the main thread can set signal handlers, so entering in
    another thread has no effect. If several are nested, the innermost reacts.

    Args:
        react: called with each signal, one at a time, in a separate thread.
    """

    def __init__(self, react: Callable[[signal.Signals], None]):
        self._react = react
        self._previous: dict[signal.Signals, Any] = {}
        self._earlier_pipe = -1
        self._pipe: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._earlier_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, _do_nothing)
        threading.Thread(target=self._listen, args=(read, set(self._previous)), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: the handler was not installed from Python
        signal.set_wakeup_fd(self._earlier_pipe)
        os.close(self._pipe)
        self._previous, self._pipe = {}, None

    def _listen(self, read: int, watched: set[signal.Signals]) -> None:
        with open(read, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] in watched:
                    self._react(signal.Signals(byte[0]))
                elif self._earlier_pipe >= 0:
                    os.write(self._earlier_pipe, byte)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Ignore the signal: it was already written to the pipe before Python calls this."""


def end_at_once(number: signal.Signals) -> None:
    """Exit immediately with one line and EXIT_CODE; for use while there is nothing to lose."""
    say(f"interrupted by {number.name}")
    os._exit(EXIT_CODE)


def say(line: str) -> None:
    """Write a line to standard error without `print`, which the signal may have interrupted."""
    os.write(2, f"{line}\n".encode())
