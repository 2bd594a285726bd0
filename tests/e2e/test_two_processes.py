"""One run of two processes: started by settings, killed, interrupted in one of them, resumed, also by a single one."""

import json
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import tiny_jobs
import tiny_run

from wallx_jax import tree
from wallx_jax.training import checkpoint_dir
from wallx_jax.training.checkpoint import restore_params
from wallx_jax.training.interruption import EXIT_CODE

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
STEPS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = tiny_jobs.Server(tmp_path_factory.mktemp("jobs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def start(server, dataset_dir, tmp_path_factory):
    model = tiny_run.write_model(tmp_path_factory.mktemp("model") / "tiny")

    def start(save_path: Path, processes: int = 2) -> list[tiny_jobs.Job]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        return [
            server.start(
                model, dataset_dir, save_path, num_training_steps=STEPS, eval_interval=8, resume__ckpt="latest",
                mesh__fsdp=processes, batch_size_per_gpu=2 // processes, eval_batch_size_per_gpu=2 // processes,
                distributed__coordinator=address, distributed__num_processes=processes, distributed__process_id=index,
            )
            for index in range(processes)
        ]  # fmt: skip

    return start


def lines(folder: Path) -> list[dict]:
    """What was logged, without what the clock says."""
    logged = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("time", "step_time_s", "samples_per_s", "data_wait_share", "tflops_per_device")
    return [{key: value for key, value in line.items() if key not in timed} for line in logged]


def steps_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def finish(jobs: list[tiny_jobs.Job]) -> None:
    for job in jobs:
        assert job.wait() == 0, job.log


def test_two_processes(start, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    jobs = start(whole)
    finish(jobs)
    assert [line["step"] for line in lines(whole) if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(whole) if "val_loss" in line] == [8, 16]
    assert f"step {STEPS}/{STEPS}" in jobs[0].log and "step" not in jobs[1].log, "the first process alone reports"
    assert len(list((whole / "tensorboard").iterdir())) == 1
    last = whole / "checkpoints" / str(STEPS)
    assert json.loads((last / "data" / "position.json").read_text()) == {"batches_drawn": STEPS}
    assert json.loads((last / "metadata" / "metadata.json").read_text())["processes"] == 2

    # Killed, both.
    jobs = start(run)
    jobs[0].until(lambda: steps_logged(run) >= 3)
    for job in jobs:
        job.signal(signal.SIGKILL)
    assert [job.wait() for job in jobs] == [-signal.SIGKILL] * 2
    # Interrupted: the signal reaches one of them, both stop after the same update.
    jobs = start(run)
    before = steps_logged(run)
    jobs[0].until(lambda: steps_logged(run) > max(before, 4))
    jobs[1].signal(signal.SIGTERM)
    assert [job.wait() for job in jobs] == [EXIT_CODE] * 2, jobs[0].log + jobs[1].log
    assert 4 < checkpoint_dir.latest_step(run) < STEPS
    finish(start(run))
    assert lines(run) == lines(whole)
    a, b = (tree.flatten(restore_params(path)) for path in (run, whole))
    for path in b:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)

    # One process instead of two meets the same samples.
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    finish(start(run, processes=1))
    alone, together = ([line["loss"] for line in lines(folder) if "loss" in line] for folder in (run, whole))
    assert len(alone) == STEPS
    np.testing.assert_allclose(alone, together, rtol=1e-4)
