"""What `wallx_jax.train.main` tells, and its exit codes."""

import signal
import time

import jax
import pytest
from helpers import tiny_run

import wallx_jax.train
from wallx_jax.checkpoints.layout import latest_step
from wallx_jax.training.interruption import StopRequest

pytestmark = pytest.mark.usefixtures("restored_state")


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("2 wrong settings:\n  - a\n  - b"), "2 wrong settings:\n  - a\n  - b\n"),
        (jax.errors.JaxRuntimeError("INTERNAL: a\n  b"), "INTERNAL: a b\n"),
        (RuntimeError(), "RuntimeError\n"),
        (MemoryError(), "no memory left; lower batch_size_per_gpu, or "),
        (MemoryError("Unable to allocate 3 GiB"), "Unable to allocate 3 GiB; lower batch_size_per_gpu, or "),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.\n  pages"),
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.; lower batch_size_per_gpu",
        ),
    ],
)
def test_an_error_is_told_without_a_traceback(error, line, monkeypatch, capsys, dataset_dir, tmp_path):
    def run(config, dry_run):
        raise error

    monkeypatch.setattr(wallx_jax.train, "run", run)
    with pytest.raises(SystemExit) as exit:
        wallx_jax.train.main(tiny_run.run_config(tmp_path, dataset_dir, tmp_path))
    assert exit.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_a_fault_of_the_program_shows_where(monkeypatch, dataset_dir, tmp_path):
    def run(config, dry_run):
        raise KeyError("x")

    monkeypatch.setattr(wallx_jax.train, "run", run)
    with pytest.raises(KeyError):
        wallx_jax.train.main(tiny_run.run_config(tmp_path, dataset_dir, tmp_path))


class Left(BaseException):
    pass


@pytest.mark.parametrize(
    "save_interval, lost", [(100, "all that was trained is lost"), (2, "what was trained after step 2 is lost")]
)
def test_a_second_signal_says_what_is_lost(save_interval, lost, monkeypatch, dataset_dir, tmp_path):
    told, updates = [], []

    def leave(line, code):
        told.append((line, code))
        raise Left

    def reached(self):
        updates.append(None)
        if len(updates) == 3:
            while save_interval == 2 and latest_step(tmp_path / "run") is None:
                time.sleep(0.01)  # saved in the background
            self._on_second_signal(signal.SIGTERM)

    tiny_run.use_devices(monkeypatch, 1)
    monkeypatch.setattr(wallx_jax.train.shutdown, "leave", leave)
    monkeypatch.setattr(StopRequest, "reached", reached)
    model = tiny_run.write_model(tmp_path / "model")
    config = tiny_run.run_config(
        model, dataset_dir, tmp_path / "run", num_training_steps=6, eval_interval=0, save_interval=save_interval
    )
    with pytest.raises(Left):
        wallx_jax.train.run(config)
    assert told == [(f"ended by a second signal (SIGTERM): {lost}", 128 + signal.SIGTERM)]
