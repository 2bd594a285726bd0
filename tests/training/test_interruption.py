"""What signals do while a run trains, and that nothing of it stays."""

import os
import signal
import subprocess
import sys
import threading

import jax
import pytest

from wallx_jax.run_config import MeshConfig
from wallx_jax.training.interruption import SIGNALS, StopRequest
from wallx_jax.training.sharding import make_mesh


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(autouse=True)
def handlers():
    """Those of an ordinary process, whatever the tests were started from."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_handlers_are_put_back(mesh, number, capfd):
    with StopRequest(mesh) as stop:
        assert not stop.reached() and not stop.stopped
        signal.raise_signal(number)
        assert stop.reached() and stop.stopped
        assert [signal.getsignal(known) for known in SIGNALS] == [signal.SIG_DFL] * 2, "the next one ends the process"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "another signal ends the process" in capfd.readouterr().err


def test_handlers_are_put_back_after_an_error(mesh):
    with pytest.raises(ZeroDivisionError), StopRequest(mesh):
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored(mesh):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest(mesh) as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.reached()
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_may_train(mesh):
    results = []

    def train():
        with StopRequest(mesh) as stop:
            results.append(stop.reached())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert results == [False]


CHILD = """
import signal, time
from wallx_jax.run_config import MeshConfig
from wallx_jax.training.interruption import StopRequest
from wallx_jax.training.sharding import make_mesh
signal.signal(signal.SIGINT, signal.default_int_handler)
with StopRequest(make_mesh(MeshConfig(-1, 1, 1))) as stop:
    print("ready", flush=True)
    while not stop.reached():
        time.sleep(0.01)
    print("first", flush=True)
    time.sleep(60)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("first, second", [SIGNALS, SIGNALS[::-1]])
def test_a_second_signal_ends_the_process(first, second):
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    with child:
        try:
            assert child.stdout.readline() == "ready\n"
            os.kill(child.pid, first)
            assert child.stdout.readline() == "first\n"
            os.kill(child.pid, second)
            assert child.wait(20) == -second
        finally:
            child.kill()
