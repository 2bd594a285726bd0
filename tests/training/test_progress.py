"""The progress display on a terminal and in a log."""

import io
import time

import pytest

from wallx_jax.training.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_plain_lines():
    stream = io.StringIO()
    progress = Progress(100, start=10, stream=stream)
    with progress.compiling():
        pass
    for _ in range(10):
        progress.advance()
    progress.report(20, loss=0.123456, samples_per_s=12.345, eta_s=3725)
    progress.report(30, loss=0.1, samples_per_s=12.345, eta_s=5, mfu=0.417)
    progress.note("saved")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "compiling the train step ..."
    assert lines[1].startswith("compiled the train step in 0.") and lines[1].endswith(" s")
    assert lines[2:] == [
        "step 20/100 | loss 0.1235 | 12.3 samples/s | 1:02:05 left",
        "step 30/100 | loss 0.1 | 12.3 samples/s | 42% MFU | 0:05 left",
        "saved",
    ]
    assert stream.getvalue().replace("\n", "").isprintable()


def test_a_terminal_gets_a_bar_and_counting_seconds():
    stream = Terminal()
    progress = Progress(100, start=10, stream=stream)
    with progress.compiling("the eval step"):
        time.sleep(0.05)
    for _ in range(10):
        progress.advance()
    progress.report(20, loss=0.5, samples_per_s=3, eta_s=None)
    progress.close()
    text = stream.getvalue()
    assert "compiling the eval step ... 0 s" in text and "compiled the eval step in" in text
    last = text.split("\r")[-1]
    assert "20/100" in last and "loss 0.5 | 3 samples/s | ? left" in last and "compiling" not in last


def test_a_failed_compilation_is_not_announced_as_done():
    for stream in (io.StringIO(), Terminal()):
        with pytest.raises(ValueError), Progress(1, stream=stream).compiling():
            raise ValueError
        assert "compiled" not in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (125, "2:05"), (3725.4, "1:02:05"), (None, "?")])
def test_duration(seconds, text):
    assert duration(seconds) == text
