"""Temporary folders go when their process ends, also when it is killed."""

import os
import signal
import subprocess
import sys

import pytest

from wallx_jax.utils.temporary import PREFIX, ScratchFolder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_owner(temporary):
    one, other = ScratchFolder(), ScratchFolder()
    (one.path / "data").write_bytes(b"x")
    assert one.path.parent == other.path.parent == temporary and one.path != other.path
    path = one.path
    del one
    assert not path.exists() and other.path.exists()


MAKE = "from wallx_jax.utils.temporary import ScratchFolder; folder = ScratchFolder(); print(folder.path, flush=True); "


def test_a_process_that_ends_leaves_nothing(temporary):
    for ending in ("", "raise SystemExit(3)", "raise RuntimeError"):
        subprocess.run([sys.executable, "-c", MAKE + ending], capture_output=True)
    assert not list(temporary.glob(f"{PREFIX}*"))


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(temporary):
    process = subprocess.Popen([sys.executable, "-c", MAKE + "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    left = temporary / os.path.basename(process.stdout.readline().decode().strip())
    ScratchFolder()
    assert left.exists(), "its process lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close(), process.stdout.close()
    assert left.exists()
    ScratchFolder()
    assert not left.exists()
