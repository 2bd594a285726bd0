"""SIGTERM and SIGINT, reacted to at once, whatever the main thread is doing.

Python runs a signal's handler in the main thread and between two of its instructions: not while XLA compiles or a
collective waits, and anywhere inside a library, which may take a KeyboardInterrupt for an error of its own. A `Watch`
reacts in a thread instead, which the signal wakes through a pipe. Imports the standard library alone, so that a command
can be watched while it imports the rest.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

EXIT_CODE = os.EX_TEMPFAIL  # 75: nothing is wrong, try again later
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watch:
    """Calls `react` with each SIGTERM and SIGINT while it is entered; afterwards handlers are as before.

    Signals that were ignored before (nohup) stay ignored. Handlers belong to the main thread: entered in another one
    this changes nothing. Of several that are entered the innermost reacts.

    Args:
        react: called in a thread of its own, for one signal after the other.
    """

    def __init__(self, react: Callable[[signal.Signals], None]):
        self._react = react
        self._previous: dict[signal.Signals, object] = {}
        self._earlier_pipe = -1
        self._pipe: int | None = None

    def __enter__(self) -> "Watch":
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
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python does not know
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
    """The signal has been written to the pipe when Python calls this."""


def end_at_once(number: signal.Signals) -> None:
    """Ends the process with one line and EXIT_CODE, when it has nothing that could be lost."""
    say(f"interrupted by {number.name}")
    os._exit(EXIT_CODE)


def say(line: str) -> None:
    """Writes a line to standard error; print may be what a signal has interrupted."""
    os.write(2, f"{line}\n".encode())
