"""One run of two processes: started by settings, killed, interrupted in one of them, resumed, also by a single one."""

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_jobs, tiny_run

from wallx_jax.checkpoints.checkpointer import restore_params
from wallx_jax.checkpoints.layout import latest_step
from wallx_jax.training import run_lock
from wallx_jax.training.interruption import EXIT_CODE
from wallx_jax.utils import tree

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

    def start(save_path: Path, processes: int = 2, **changes) -> list[tiny_jobs.Job]:
        settings = {"num_training_steps": STEPS, "eval_interval": 8, "resume__ckpt": "latest"} | changes
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        return [
            server.start(
                model, dataset_dir, save_path, **settings,
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


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("stage", ["one sample:", "compiling the train step"])
def test_a_signal_to_one_process_before_training_ends_both(start, tmp_path, stage, process):
    jobs = start(tmp_path / "run")
    jobs[0].until(lambda: stage in jobs[0].log)
    jobs[process].signal(signal.SIGINT)
    begin = time.monotonic()
    assert [job.wait() for job in jobs] == [EXIT_CODE] * 2, jobs[0].log + jobs[1].log
    assert time.monotonic() - begin < 20
    assert "interrupted by SIGINT" in jobs[process].log
    assert f"process {process} ended the run: interrupted by SIGINT" in jobs[1 - process].log
    for job in jobs:
        assert not {"Traceback", "Gloo", "Check failure"} & set(job.log.split())


def test_an_error_in_one_process_ends_both(start, tmp_path):
    """And only one of them can find it."""
    run = tmp_path / "run"
    with run_lock.hold(run_folder(run)):
        jobs = start(run)
        assert [job.wait() for job in jobs] == [1, 1], jobs[0].log + jobs[1].log
    assert "error: another run" in jobs[0].log and "process 0 ended the run: error: another run" in jobs[1].log


def run_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_full_disk_ends_both_and_leaves_no_partial_checkpoint(start, tmp_path):
    jobs = start(tmp_path / "run", file_limit=1 << 16)
    assert [job.wait() for job in jobs] == [1, 1], "\n".join(job.log for job in jobs)
    for job in jobs:
        assert "saving step" in job.log and "File too large; there is no earlier checkpoint. Remedy" in job.log
        assert "Traceback" not in job.log and "orbax" not in job.log
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_process_that_is_late_and_one_that_is_stopped_for_a_while(start, tmp_path):
    """For longer than Gloo waits for a process (30 s) and gRPC for the answer to a ping (60 s)."""
    steps = 200
    jobs = start(tmp_path / "run", num_training_steps=steps, eval_interval=0, save_interval=steps)
    jobs[1].until(lambda: "statistics" in jobs[0].log)
    jobs[1].signal(signal.SIGSTOP)
    time.sleep(35)
    jobs[1].signal(signal.SIGCONT)
    jobs[0].until(lambda: steps_logged(tmp_path / "run") >= steps // 2)  # seconds after the last word between the two
    jobs[1].signal(signal.SIGSTOP)
    time.sleep(75)
    jobs[1].signal(signal.SIGCONT)
    finish(jobs)
    assert "waiting for the other processes of the run" in jobs[0].log


@pytest.mark.parametrize("process", [0, 1])
def test_damage_that_one_process_meets_is_passed_over_by_both(start, tmp_path, process, monkeypatch):
    run = tmp_path / "run"
    finish(start(run))
    newest = run / "checkpoints" / str(STEPS)
    own = sorted((newest / "state").glob(f"ocdbt.process_{process}/d/*"), key=lambda file: file.stat().st_size)[-1]
    own.write_bytes(own.read_bytes()[:7])
    jobs = start(run)
    finish(jobs)
    assert f"checkpoints/{STEPS} is damaged and passed over" in jobs[0].log
    assert (run / "checkpoints" / f"{STEPS}.abandoned-1").is_dir() and newest.is_dir()


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
    assert 4 < latest_step(run) < STEPS
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
