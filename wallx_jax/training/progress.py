"""Display training progress, as a bar on a terminal or as plain lines in a log file."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import jax
from tqdm import tqdm


class Progress:
    """Display the progress of a run.

    On a terminal: a bar that moves with every `advance` and shows the figures of the last `report`. Otherwise (pipe or
    log file): one plain line per `report`, without control characters. Only the first process displays anything.
    """

    def __init__(self, total: int, start: int = 0, stream: TextIO | None = None):
        """Create the display.

        Args:
            total: number of steps at the end of the run.
            start: number of steps already done.
            stream: output stream; None for standard error.
        """
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
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(steps)

    def report(
        self, step: int, loss: float, samples_per_s: float, eta_s: float | None, mfu: float | None = None
    ) -> None:
        """Show the figures of a log interval.

        Args:
            step: current step.
            loss: training loss.
            samples_per_s: training speed.
            eta_s: remaining time in seconds; None if unknown.
            mfu: fraction of the accelerator's peak FLOP/s; None if unknown.
        """
        used = "" if mfu is None else f" | {mfu:.0%} MFU"
        figures = f"loss {loss:.4g} | {samples_per_s:.3g} samples/s{used} | {duration(eta_s)} left"
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
        else:
            self.note(f"step {step}/{self._total} | {figures}")

    def note(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        if self._silent:
            return
        if self._bar is not None:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def compiling(self, what: str = "the train step") -> Iterator[None]:
        """Report that the code inside the block is compiling, and then how long it took.

        On a terminal, a timer runs meanwhile.
        """
        start, done = time.perf_counter(), threading.Event()
        ticker = threading.Thread(target=_count_seconds, args=(self._bar, f"compiling {what}", done), daemon=True)
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
                self._bar.unpause()  # measure the speed from here
        self.note(f"compiled {what} in {time.perf_counter() - start:.1f} s")

    def close(self) -> None:
        """Close the bar, leaving it on screen."""
        if self._bar is not None:
            self._bar.close()


def _count_seconds(bar: tqdm, text: str, done: threading.Event) -> None:
    start = time.perf_counter()
    while not done.is_set():
        bar.set_description_str(f"{text} ... {time.perf_counter() - start:.0f} s")
        done.wait(1.0)


_BAR = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}] {postfix}"


def duration(seconds: float | None) -> str:
    """Format seconds: 3725 -> "1:02:05", 125 -> "2:05", None -> "?"."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
