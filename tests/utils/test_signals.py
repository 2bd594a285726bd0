"""Signals are reacted to at once, and handlers are as before afterwards."""

import os
import signal
import subprocess
import sys
import time

import pytest

from wallx_jax.utils.signals import EXIT_CODE, SIGNALS, Watch

BUSY = """
import hashlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from wallx_jax.utils import signals
with signals.Watch(signals.end_at_once):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)  # Python sees no signal before this returns
"""


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_that_is_busy_outside_python_ends_at_once(number):
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(0.2)
            child.send_signal(number)
            assert child.wait(10) == EXIT_CODE == 75
            assert child.stderr.read() == f"interrupted by {number.name}\n".encode()
        finally:
            child.kill()


def test_the_innermost_watch_reacts():
    seen = []
    with Watch(lambda number: seen.append(("outer", number))):
        with Watch(lambda number: seen.append(("inner", number))):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)
    assert seen == [("inner", signal.SIGTERM), ("outer", signal.SIGINT)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen = []
    with Watch(seen.append):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        time.sleep(0.2)
    assert seen == [signal.SIGTERM]


def test_other_signals_reach_who_waited_for_them():
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with Watch(pytest.fail):
            signal.raise_signal(signal.SIGUSR1)
            assert os.read(read, 1) == bytes([signal.SIGUSR1])
        assert signal.set_wakeup_fd(write) == write, "put back"
    finally:
        signal.signal(signal.SIGUSR1, handler)
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
