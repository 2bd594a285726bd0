"""The training loop around a step that computes next to nothing: what it logs and saves, and where it ends."""

import dataclasses
import io
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_run
from helpers.tiny_step import random_batch

from wallx_jax.config import resolve
from wallx_jax.config.schema import MeshConfig
from wallx_jax.models.wallx import LossTotals
from wallx_jax.training import sharding
from wallx_jax.training.loop import (
    NonFiniteError,
    RunData,
    RunOutputs,
    SkippedUpdates,
    StepCounts,
    Steps,
    UnreadableData,
    run_loop,
)
from wallx_jax.training.progress import Progress
from wallx_jax.training.state import TrainState

BATCH = 2


def settings(tmp_path, **changes):
    return resolve(tiny_run.run_config("model", "dataset", tmp_path / "run", **changes)).loop


def train(state, batch):
    """A step whose loss is its number; an update whose batch has NaN as its first action is not finite."""
    finite = jnp.isfinite(batch.actions.ravel()[0])
    state = dataclasses.replace(state, step=state.step + 1, skipped=state.skipped + ~finite)
    return state, {"loss": state.step.astype(float), "finite": finite, "learning_rate": jnp.float32(0.1)}


class Run:
    """A run in memory: `log` and `saved` are what it has written."""

    def __init__(self, tmp_path, batches=None, total_steps=5, start=0, held_out=(), evaluate=None, **changes):
        self.log, self.saved, self.waited = {}, [], False
        self.stream = io.StringIO()
        mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        self.state = TrainState(jnp.int32(start), jnp.int32(0), {"x": jnp.ones(1)}, ())
        self.steps = Steps(train, evaluate, mesh, 0)
        batches = itertools.repeat(random_batch((BATCH,))) if batches is None else iter(batches)
        skipped = SimpleNamespace(new=lambda: [], count=0)
        self.data = RunData(batches, lambda: held_out, skipped)
        writer = SimpleNamespace(write=lambda step, scalars: self.log.setdefault(step, {}).update(scalars))
        save = lambda step, state, loss: self.saved.append((step, int(state.step), loss))  # noqa: E731
        progress = Progress(total_steps, start, self.stream)
        self.outputs = RunOutputs(progress, writer, save, lambda: setattr(self, "waited", True))
        self.config = settings(tmp_path, **changes)
        self.length = StepCounts(BATCH, 26, total_steps, total_steps)

    def __call__(self, stop=lambda: False):
        return run_loop(self.state, self.steps, self.data, self.outputs, self.config, self.length, stop)


def test_logs_and_saves_at_intervals_and_at_the_end(tmp_path):
    run = Run(tmp_path, log_interval=2, save_interval=3)
    assert int(run().step) == 5 and run.waited
    assert {step: line["loss"] for step, line in run.log.items()} == {2: 1.5, 4: 3.5, 5: 5.0}
    assert run.saved == [(3, 3, 1.5), (5, 5, 5.0)]
    assert run.log[5]["learning_rate"] == pytest.approx(0.1) and run.log[5]["skipped"] == 0


def test_a_resumed_run_goes_from_its_step_to_the_end(tmp_path):
    run = Run(tmp_path, start=3)
    run()
    assert list(run.log) == [4, 5]
    run = Run(tmp_path, start=5)
    assert int(run().step) == 5 and not run.log and not run.saved


def test_a_stop_logs_and_saves_the_update_it_stops_after(tmp_path):
    run, answers = Run(tmp_path, log_interval=100, save_interval=100), iter([False, False, True])
    assert int(run(lambda: next(answers)).step) == 3
    assert run.log[3]["loss"] == 2.0 and run.saved == [(3, 3, 2.0)]


def test_validation_at_intervals_and_at_the_end(tmp_path):
    def evaluate(params, batch):
        return LossTotals(np.float32(0), np.float32(6), None), LossTotals(np.float32(0), np.float32(4), None)

    run = Run(tmp_path, held_out=[random_batch((BATCH,))] * 3, evaluate=evaluate, eval_interval=2, flow_loss_weight=2.0)
    run()
    lines = {step: line["val_loss"] for step, line in run.log.items() if "val_loss" in line}
    assert lines == {2: 3.0, 4: 3.0, 5: 3.0} and run.log[5]["val_flow_loss"] == 1.5
    assert "val_cross_entropy_loss" not in run.log[5]


def broken_after(count):
    yield from itertools.repeat(random_batch((BATCH,)), count)
    raise ValueError("episode 0, frame 3: NaN")


def test_what_was_trained_before_an_unreadable_batch_is_saved(tmp_path):
    run = Run(tmp_path, broken_after(3), save_interval=100)
    with pytest.raises(UnreadableData, match="^update 4: episode 0, .*; the 3 updates before it are saved as step 3"):
        run()
    assert run.saved == [(3, 3, 3.0)]
    run = Run(tmp_path, broken_after(0))
    with pytest.raises(UnreadableData, match="^update 1: .*; nothing was trained"):
        run()
    assert not run.saved


def nonfinite():
    batch = random_batch((BATCH,))
    return dataclasses.replace(batch, actions=np.full_like(batch.actions, np.nan))


def test_skipped_updates_are_reported_and_not_averaged(tmp_path):
    run = Run(tmp_path, [random_batch((BATCH,)), nonfinite(), *[random_batch((BATCH,))] * 3], log_interval=5)
    run()
    assert run.log[5]["skipped"] == 1 and run.log[5]["loss"] == pytest.approx((1 + 3 + 4 + 5) / 4)
    assert "step 2: loss or gradients are not finite; update skipped (1 so far)" in run.stream.getvalue()


@pytest.mark.parametrize("save_interval", [100, 1])
def test_too_many_skipped_updates_end_the_run(tmp_path, monkeypatch, save_interval):
    """With the batch in the run directory, also one below ~; and never with a checkpoint of the last of them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    run = Run(tmp_path, [random_batch((BATCH,)), nonfinite(), nonfinite(), nonfinite()], max_nonfinite_steps=2,
              save_interval=save_interval)  # fmt: skip
    run.config = dataclasses.replace(run.config, save_path="~/run")
    with pytest.raises(NonFiniteError, match="stopped at step 3: 2 updates .*max_nonfinite_steps = 2"):
        run()
    assert [step for step, *_ in run.saved] == ([1, 2] if save_interval == 1 else [])
    (file,) = (tmp_path / "run").iterdir()
    assert re.fullmatch("nonfinite_step_3.npz", file.name)


def test_an_update_is_checked_when_the_next_one_has_been_started(tmp_path):
    skipped = SkippedUpdates(0, settings(tmp_path, max_nonfinite_steps=2), Progress(5, 0, stream := io.StringIO()))
    skipped.add(1, nonfinite(), {"finite": np.False_})
    assert not stream.getvalue()
    skipped.add(2, random_batch((BATCH,)), {"finite": np.True_})
    assert "step 1: " in stream.getvalue()
    skipped.check_last()
    skipped.check_last()
    assert stream.getvalue().count("\n") == 1
