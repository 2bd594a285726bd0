"""The progress display: a bar on a terminal, plain lines in a log file."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import jax
from tqdm import tqdm


class Progress:
    """Shows how far a run is.

    On a terminal: one bar that moves with every `advance` and carries the figures of the last `report`. Elsewhere
    (a pipe, a log file): one plain line per `report`, no control characters. Processes but the first show nothing.
    """

    def __init__(self, total: int, start: int = 0, stream: TextIO | None = None):
        """`total` and `start` in steps; writes to standard error unless another stream is given."""
        self._total = total
        self._stream = stream if stream is not None else sys.stderr
        self._silent = jax.process_index() != 0
        on_terminal = self._stream.isatty() and not self._silent
        self._bar = (
            tqdm(total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True, bar_format=_BAR)
            if on_terminal
            else None
        )

    def advance(self, steps: int = 1) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(steps)

    def report(
        self, step: int, loss: float, samples_per_s: float, eta_s: float | None, mfu: float | None = None
    ) -> None:
        """Shows figures; call it once per log interval. `mfu`: share of the accelerator's peak, where it is known."""
        used = "" if mfu is None else f" | {mfu:.0%} MFU"
        figures = f"loss {loss:.4g} | {samples_per_s:.3g} samples/s{used} | {duration(eta_s)} left"
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
        else:
            self.note(f"step {step}/{self._total} | {figures}")

    def note(self, text: str) -> None:
        """Prints a line of its own, above the bar if there is one."""
        if self._silent:
            return
        if self._bar is not None:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def compiling(self, what: str = "the train step") -> Iterator[None]:
        """Says that the code inside compiles, and afterwards how long it took; on a terminal the seconds count up."""
        start, done = time.perf_counter(), threading.Event()
        ticker = threading.Thread(target=self._count_seconds, args=(f"compiling {what}", done), daemon=True)
        if self._bar is not None:
            ticker.start()
        else:
            self.note(f"compiling {what} ...")
        try:
            yield
        finally:
            done.set()
            if self._bar is not None:
                ticker.join()
                self._bar.set_description_str("")
                self._bar.unpause()  # the pace starts here
        self.note(f"compiled {what} in {time.perf_counter() - start:.1f} s")

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def _count_seconds(self, text: str, done: threading.Event) -> None:
        start = time.perf_counter()
        while not done.is_set():
            self._bar.set_description_str(f"{text} ... {time.perf_counter() - start:.0f} s")
            done.wait(1.0)


_BAR = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}] {postfix}"


def duration(seconds: float | None) -> str:
    """3725 -> "1:02:05"; 125 -> "2:05"; None -> "?"."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
