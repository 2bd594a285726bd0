"""A run that is interrupted, killed, damaged or out of disk goes on as if nothing had happened."""

import functools
import itertools
import json
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import tiny_jobs, tiny_run

import wallx_jax.train
from wallx_jax.checkpoints.checkpointer import restore_params
from wallx_jax.checkpoints.layout import latest_step
from wallx_jax.training import sharding
from wallx_jax.training.interruption import EXIT_CODE
from wallx_jax.utils import tree

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
STEPS = 20


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


EXACT = ("step", "loss", "flow_loss", "grad_norm", "learning_rate")


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
    step = latest_step(tmp_path / "run")
    assert 3 <= step < STEPS and len(lines(tmp_path / "run")) == step
    assert f"interrupted after step {step} of {STEPS}" in job.log and "resume.ckpt=latest" in job.log
    again = start(tmp_path / "run", save_interval=1000, num_workers=0)  # their number may change
    assert again.wait() == 0, again.log
    assert_same_run(tmp_path / "run", whole)


STAGES = ("one sample:", "compiling the train step", "compiled the train step")


@pytest.mark.parametrize(
    "stage, delay, number",
    [*itertools.product(STAGES, (0.0, 0.1), [signal.SIGINT]), (STAGES[0], 0.2, signal.SIGTERM)],
)
def test_a_signal_before_training_ends_the_run_and_harms_nothing(start, whole, tmp_path, stage, delay, number):
    """In a run that is resumed: restoring, which libraries do in threads of their own, compiling, the first update."""
    run = without_the_last(whole, tmp_path / "run", keep=False)
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    job = start(run, save_interval=1000)
    job.until(lambda: stage in job.log)
    time.sleep(delay)
    job.signal(number)
    begin = time.monotonic()
    assert job.wait() in (EXIT_CODE, 0), job.log  # 0: it had two updates to do
    assert time.monotonic() - begin < 15
    assert "Traceback" not in job.log and "damaged" not in job.log and "abandoned" not in job.log
    assert {path.name for path in (run / "checkpoints").iterdir()} >= set(checkpoints)
    assert start(run).wait() == 0
    assert_same_run(run, whole)


def test_a_second_signal_says_what_is_lost(start, tmp_path):
    run = tmp_path / "run"
    job = start(run, num_training_steps=100_000, save_interval=5)
    job.until(lambda: latest_step(run) is not None)
    for _ in range(2):  # one request, told twice
        job.signal(signal.SIGINT)
        time.sleep(0.05)
    assert job.wait() == EXIT_CODE, job.log
    assert "interrupted after step" in job.log


def test_a_second_run_in_the_folder_is_refused(start, tmp_path):
    run = tmp_path / "run"
    first = start(run, num_training_steps=100_000, save_interval=5)
    first.until(lambda: latest_step(run) is not None)
    second = start(run)
    assert second.wait() == 1, second.log
    (line,) = [line for line in second.log.splitlines() if line.startswith("error")]
    assert f"another run (process {first.pid} on" in line and "Traceback" not in second.log
    before = latest_step(run)
    first.until(lambda: latest_step(run) > before)
    assert first.running
    first.signal(signal.SIGTERM)
    assert first.wait() == EXIT_CODE, first.log


def test_nothing_left_to_train_is_told(start, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    job = start(run, num_training_steps=STEPS - 4)
    assert job.wait() == 0, job.log
    assert f"nothing is left to train: the checkpoint has done {STEPS} updates" in job.log


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


def without_the_last(whole: Path, folder: Path, keep: bool) -> Path:
    """A copy of the finished run and the checkpoint before its last; `keep`: the last one too."""
    shutil.copytree(whole, folder)
    if not keep:
        shutil.rmtree(folder / "checkpoints" / str(STEPS))
    return folder


@pytest.mark.parametrize("part", ["params", "state", "data", "metadata", "assets"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(start, whole, tmp_path, part):
    run = without_the_last(whole, tmp_path / "run", keep=True)
    for file in (run / "checkpoints" / str(STEPS) / part).rglob("*"):
        if file.is_file() and (part not in ("params", "state") or file.parent.name == "d"):
            file.write_bytes(file.read_bytes()[:7])
    job = start(run)
    assert job.wait() == 0, job.log
    assert f"checkpoints/{STEPS} is damaged and passed over" in job.log
    assert_same_run(run, whole)
    if part != "assets":  # which the run knows anyway: it loses no step
        assert f"step {STEPS}/{STEPS} | loss" in job.log and f"step {STEPS - 2}/{STEPS} | loss" not in job.log
        assert (run / "checkpoints" / f"{STEPS}.abandoned-1").is_dir()


@pytest.mark.parametrize("interrupt", [False, True], ids=["at the end", "at an interruption"])
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(start, whole, tmp_path, interrupt):
    run = without_the_last(whole, tmp_path / "run", keep=False)
    changes = {"num_training_steps": 100_000, "save_interval": 100_000} if interrupt else {}
    job = start(run, file_limit=1 << 17, **changes)  # bytes a file may have: beyond fails a write, as on a full disk
    if interrupt:
        job.until(lambda: f"step {STEPS}/" in job.log)
        job.signal(signal.SIGTERM)
    assert job.wait() == 1, job.log
    *_, line = job.log.splitlines()  # the last one, without anything behind it
    assert line.startswith("error: saving step ") and "File too large" in line and f"step {STEPS - 2} is intact" in line
    assert line.endswith("then go on with resume.ckpt=latest")
    assert "Traceback" not in job.log and "orbax" not in job.log
    assert [path.name for path in (run / "checkpoints").glob("*tmp*")] == []
    assert start(run).wait() == 0
    assert_same_run(run, whole)


def test_another_mesh_goes_on(model_dir, dataset_dir, tmp_path, monkeypatch):
    """Saved on fsdp=4; resumed on one device, and on data=2 x tensor=2."""
    make_mesh = sharding.make_mesh

    def train(save_path, devices, per_device, **changes):
        monkeypatch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
        changes |= {"num_training_steps": 4, "eval_interval": 0, "batch_size_per_gpu": per_device}
        return wallx_jax.train.run(tiny_run.run_config(model_dir, dataset_dir, save_path, **changes))

    four = tmp_path / "four"
    train(four, 4, 1, mesh__fsdp=4)
    shutil.rmtree(four / "checkpoints" / "4")
    for name, devices, per_device, mesh in (
        ("one", 1, 4, {}),
        ("two", 4, 2, {"mesh__data": 2, "mesh__tensor": 2}),
    ):
        shutil.copytree(four, tmp_path / name)
        train(tmp_path / name, devices, per_device, resume__ckpt="latest", **mesh)
        assert (tmp_path / name / "checkpoints" / "4").is_dir()
    one, two = np.array(curve(tmp_path / "one")), np.array(curve(tmp_path / "two"))
    whole = np.array(curve(four))
    assert [len(lines) for lines in (one, two, whole)] == [4, 4, 4]
    np.testing.assert_allclose(one, whole, rtol=1e-4)
    np.testing.assert_allclose(two, whole, rtol=1e-4)
