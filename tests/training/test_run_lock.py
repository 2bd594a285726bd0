"""One run per folder, whoever was killed before."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from wallx_jax.checkpoints.layout import CheckpointError
from wallx_jax.training import run_lock

HOLD = """
import sys, time
from pathlib import Path
from wallx_jax.training import run_lock
with run_lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


@pytest.mark.multiprocess
def test_a_second_run_is_refused_and_a_killed_one_leaves_nothing(holder, tmp_path):
    message = rf"another run \(process {holder.pid} on .*{tmp_path}.*end it"
    with pytest.raises(CheckpointError, match=message), run_lock.hold(tmp_path):
        pytest.fail("held twice")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    start = time.monotonic()
    with run_lock.hold(tmp_path):
        assert time.monotonic() - start < 2
        assert json.loads((tmp_path / run_lock.FILE).read_bytes())["host"] == socket.gethostname()
    assert (tmp_path / run_lock.FILE).read_bytes() == b""


def entry(folder, **changes):
    content = {"host": "elsewhere", "pid": 1, "time": 0.0} | changes
    (folder / run_lock.FILE).write_text(json.dumps(content))


def test_a_run_of_another_machine_that_was_killed_is_waited_for(tmp_path, monkeypatch):
    """A network file system may keep locks among the processes of one machine."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
    entry(tmp_path)
    start = time.monotonic()
    with run_lock.hold(tmp_path):
        assert 0.4 <= time.monotonic() - start < 5


def test_a_run_of_another_machine_that_lives_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
    entry(tmp_path)
    beat = threading.Timer(0.1, entry, (tmp_path,), {"time": 1.0})
    beat.start()
    with pytest.raises(CheckpointError, match="another run .process 1 on elsewhere"), run_lock.hold(tmp_path):
        pytest.fail("held twice")
    beat.join()


@pytest.mark.parametrize("alive", [False, True])
def test_without_locks_the_entries_decide(tmp_path, monkeypatch, alive):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    entry(tmp_path, host=socket.gethostname(), pid=1 if alive else 2**22 + 1)
    if alive:
        with pytest.raises(CheckpointError, match="another run"), run_lock.hold(tmp_path):
            pytest.fail("held twice")
    else:
        with run_lock.hold(tmp_path):
            pass


def test_a_file_that_is_no_entry_is_overwritten(tmp_path):
    (tmp_path / run_lock.FILE).write_bytes(b"{")
    with run_lock.hold(tmp_path):
        pass
