"""A run that is interrupted, killed, damaged or out of disk goes on as if nothing had happened."""

import functools
import json
import signal
import time
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
STEPS = 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = tiny_jobs.Server(tmp_path_factory.mktemp("jobs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def start(server, model_dir, dataset_dir):
    def start(save_path, **changes):
        settings = {"num_training_steps": STEPS, "eval_interval": 0, "resume__ckpt": "latest"} | changes
        return server.start(model_dir, dataset_dir, save_path, **settings)

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    job = start(folder)
    assert job.wait() == 0, job.log
    assert "no checkpoint in" in job.log, "latest starts a new run, and says so"
    return folder


def lines(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def steps_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


EXACT = ("step", "loss", "flow_loss", "cross_entropy_loss", "grad_norm", "learning_rate")


def curve(folder: Path) -> list[list[float]]:
    return [[line[key] for key in EXACT] for line in lines(folder) if "loss" in line]


def assert_same_run(folder: Path, whole: Path) -> None:
    assert curve(folder) == curve(whole)
    a, b = (tree.flatten(restore_params(path)) for path in (folder, whole))
    for path in b:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(start, whole, tmp_path, number):
    job = start(tmp_path / "run", save_interval=1000, num_workers=1)
    job.until(lambda: steps_logged(tmp_path / "run") >= 3)
    job.signal(number)
    assert job.wait() == EXIT_CODE == 75, job.log
    assert "Traceback" not in job.log and "finishing the update" in job.log
    step = checkpoint_dir.latest_step(tmp_path / "run")
    assert 3 <= step < STEPS and len(lines(tmp_path / "run")) == step
    assert f"interrupted after step {step} of {STEPS}" in job.log and "resume.ckpt=latest" in job.log
    again = start(tmp_path / "run", save_interval=1000, num_workers=1)
    assert again.wait() == 0, again.log
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("workers, kills", [(0, 6), (2, 3)])
def test_kill_at_random_points(start, whole, tmp_path, workers, kills):
    """Every other kill hits a save that is under way."""
    run, rng, hits = tmp_path / "run", np.random.default_rng(workers), 0

    def leftovers() -> set[str]:
        return {path.name for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")}

    def saving(before: set[str]) -> bool:
        return bool(leftovers() - before)

    def arrived(steps: int) -> bool:
        return steps_logged(run) >= steps

    for attempt in range(kills):
        moment = (
            functools.partial(saving, leftovers())
            if attempt % 2
            else functools.partial(arrived, steps_logged(run) + int(rng.integers(3)))
        )
        job = start(run, num_workers=workers)
        job.until(moment)
        time.sleep(rng.uniform(0, 0.05))
        helpers = job.children()
        job.signal(signal.SIGKILL)
        job.wait()
        hits += bool(leftovers())
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in helpers):
            assert time.monotonic() < deadline, "data workers outlive the run"
            time.sleep(0.05)
    assert hits, "no kill hit a save"
    last = start(run, num_workers=workers)
    assert last.wait() == 0, last.log
    assert_same_run(run, whole)
    assert not leftovers()
