"""What signals do while a run trains, and that nothing of it stays."""

import signal
import threading
import time

import jax
import pytest

from wallx_jax.config.schema import MeshConfig
from wallx_jax.training import interruption
from wallx_jax.training.interruption import StopRequest
from wallx_jax.training.sharding import make_mesh
from wallx_jax.utils.signals import SIGNALS


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


def becomes_true(condition) -> bool:
    """A thread reacts to the signal."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_handlers_are_put_back(mesh, number, capfd):
    with StopRequest(mesh, on_second_signal=pytest.fail) as stop:
        assert not stop.reached() and not stop.stopped
        signal.raise_signal(number)
        assert becomes_true(stop.reached) and stop.stopped
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "another signal ends the run at once" in capfd.readouterr().err


def test_handlers_are_put_back_after_an_error(mesh):
    with pytest.raises(ZeroDivisionError), StopRequest(mesh, on_second_signal=pytest.fail):
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("first, second", [SIGNALS, SIGNALS[::-1], SIGNALS[:1] * 2])
def test_a_second_signal_gives_up_unless_it_is_the_same_request(mesh, monkeypatch, first, second):
    given_up = []
    with StopRequest(mesh, on_second_signal=given_up.append) as stop:
        signal.raise_signal(first)
        assert becomes_true(stop.reached)
        signal.raise_signal(second)  # the same Ctrl-C, which came by another way
        time.sleep(0.2)
        assert not given_up
        monkeypatch.setattr(interruption, "SAME_S", 0.0)
        signal.raise_signal(second)
        assert becomes_true(lambda: given_up == [second])


def test_other_threads_may_train(mesh):
    results = []

    def train():
        with StopRequest(mesh, on_second_signal=pytest.fail) as stop:
            results.append(stop.reached())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert results == [False]
