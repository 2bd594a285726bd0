"""Open-loop errors against plain loops, baselines, and which frames are compared."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.evaluation import openloop
from wallx_jax.evaluation.openloop import Recorded
from wallx_jax.inference.policy import ActionNotFiniteError

HORIZON, DIMS = 4, 14


@pytest.fixture(scope="module")
def source(dataset_info):
    return LeRobotSource(dataset_info, HORIZON, dataset_info.camera_keys)


def recorded(frames: int, steps: int = 3, dims: int = 2, seed: int = 0) -> Recorded:
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(frames, dims))
    return Recorded(
        observations=[{"images": {}, "state": state, "instruction": "go"} for state in states],
        actions=rng.normal(size=(frames, steps, dims)),
        valid=rng.random((frames, steps)) < 0.8,
        previous=rng.normal(size=(frames, dims)),
        episodes=np.arange(frames) // 2,
        frames=np.arange(frames) % 2,
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), failing=st.booleans(), missing=st.sampled_from([np.nan, np.inf]))
def test_errors_are_means_over_valid_steps(seed, failing, missing):
    part, rng = recorded(6, 3, 4, seed), np.random.default_rng(seed + 1)
    part.valid[0] = True
    part.actions[5, 1, 2] = missing
    chunks = rng.normal(size=part.actions.shape)
    if failing:
        chunks[3] = np.nan
    predicted = np.array([True, False, True, True])
    found = openloop.errors(chunks, part, predicted)
    per_dim, per_step = [[] for _ in range(4)], [[] for _ in range(3)]
    for n in range(6):
        for a in range(3):
            if part.valid[n, a] and not (failing and n == 3) and (n, a) != (5, 1):
                error = abs(chunks[n, a] - part.actions[n, a])
                per_step[a].append(error[predicted].mean())
                for d in range(4):
                    per_dim[d].append(error[d])
    np.testing.assert_allclose(found.per_dim, [np.mean(x) for x in per_dim])
    np.testing.assert_allclose(found.per_step, [np.mean(x) for x in per_step])
    assert found.mean == pytest.approx(np.mean([np.mean(per_dim[d]) for d in (0, 2, 3)]))
    assert found.failed == int(failing)


def test_nothing_predicted_is_no_number_in_json():
    part = recorded(2)
    found = openloop.errors(np.full(part.actions.shape, np.nan), part, np.ones(2, bool)).as_json()
    assert found["mae"] is None and found["failed_frames"] == 2
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_frames_of_whole_episodes(source):
    found = openloop.read(source, stride=3)
    wanted = [(e, f) for e, length in enumerate(synthetic.LENGTHS) for f in range(0, length, 3)]
    assert list(zip(found.episodes.tolist(), found.frames.tolist(), strict=True)) == wanted
    for row, (episode, frame) in enumerate(wanted):
        states, actions = synthetic.episode_table(episode)
        end = len(states) - 1
        np.testing.assert_allclose(found.observations[row]["state"], states[frame], atol=1e-6)
        np.testing.assert_allclose(found.previous[row], actions[max(frame - 1, 0)], atol=1e-6)
        for step in range(HORIZON):
            np.testing.assert_allclose(found.actions[row, step], actions[min(frame + step, end)], atol=1e-6)
            assert found.valid[row, step] == (frame + step <= end)
        assert found.observations[row]["instruction"] == synthetic.TASKS[episode % 2]


def test_first_episodes_and_a_limit(source):
    two = openloop.read(source, stride=1, episodes=2)
    assert set(two.episodes.tolist()) == {0, 1} and len(two) == sum(synthetic.LENGTHS[:2])
    few = openloop.read(source, stride=1, limit=5)
    assert len(few) == 5 and few.episodes[0] == 0 and few.episodes[-1] == 3
    assert len(two.of_episode(1)) == synthetic.LENGTHS[1]
    shuffled = LeRobotSource(source.info, HORIZON, source.cameras, frames=np.array([9, 3, 8, 1]))
    assert openloop.read(shuffled, stride=1).frames.tolist() == [1, 3, 1, 2]
    with pytest.raises(ValueError, match="stride of 0"):
        openloop.read(source, stride=0)
    with pytest.raises(ValueError, match="0 frames"):
        openloop.read(LeRobotSource(source.info, HORIZON, source.cameras, frames=np.array([], int)), stride=1)


class Fake:
    """What `baselines` and `predict` ask of a processor and a policy."""

    class stats:
        class action:
            mean = np.array([1.0, 2.0])

    relative = np.array([False, False])

    @staticmethod
    def reference(states):
        return np.zeros((len(states), 2))

    def __init__(self, given=(True, True)):
        self.sizes, self.seeds = [], []
        self.processor = type("Processor", (), {"given": np.array(given)})

    def predict(self, observations, seed, **options):
        self.sizes.append(len(observations))
        self.seeds += seed
        actions = np.stack([np.full((3, self.processor.given.sum()), o["state"][0]) for o in observations])
        return type("Prediction", (), {"actions": actions})


def test_baselines_hold_the_state_or_the_last_action():
    part = recorded(5)
    found = openloop.baselines(part, Fake)
    np.testing.assert_array_equal(found["hold_still"][3, 2], part.observations[3]["state"])
    np.testing.assert_array_equal(found["mean_action"][4, 0], [1.0, 2.0])
    wide = [o | {"state": np.zeros(9)} for o in part.observations]  # a state that is no action
    other = Recorded(wide, part.actions, part.valid, part.previous, part.episodes, part.frames)
    np.testing.assert_array_equal(openloop.baselines(other, Fake)["hold_still"][3, 2], part.previous[3])


def test_all_batches_have_one_size():
    part, policy = recorded(7), Fake()
    chunks = openloop.predict(policy, part.observations, batch_size=3, seed=5)
    assert policy.sizes == [3, 3, 3] and policy.seeds == [5, 6, 7, 8, 9, 10, 11, 5, 6], "each frame has its own"
    np.testing.assert_array_equal(chunks[:, 0, 0], [o["state"][0] for o in part.observations])
    policy.sizes.clear()
    openloop.predict(policy, part.observations[:2], batch_size=3)
    assert policy.sizes == [2]


def test_dims_that_a_policy_does_not_give_are_no_failure():
    part = recorded(7)
    chunks = openloop.predict(Fake((False, True)), part.observations, batch_size=3)
    assert chunks.shape == part.actions.shape and np.isnan(chunks[..., 0]).all() and np.isfinite(chunks[..., 1]).all()
    found = openloop.errors(chunks, part, np.array([False, True]))
    assert found.failed == 0 and np.isnan(found.per_dim[0]) and found.mean == found.per_dim[1]
    assert found.as_json()["mae_per_dim"][0] is None


def test_chunks_that_a_policy_refuses_to_give_are_failures():
    class Bad(Fake):
        def predict(self, observations, **options):
            actions = super().predict(observations, **options).actions
            actions[1] = np.nan
            raise ActionNotFiniteError({1: "not finite"}, actions)

    part = recorded(4)
    chunks = openloop.predict(Bad(), part.observations, batch_size=2)
    assert openloop.errors(chunks, part, np.ones(2, bool)).failed == 2


def test_baselines_of_relative_actions_are_in_robot_units():
    """Holding still is the state that an action is relative to, the mean the state plus the mean change."""

    class Relative(Fake):
        relative = np.array([False, True])

        @staticmethod
        def reference(states):
            return np.stack([np.zeros(len(states)), states[:, 0]], axis=1)

    part = recorded(5)
    part = dataclasses.replace(part, observations=[o | {"state": np.arange(3) + 7.0} for o in part.observations])
    found = openloop.baselines(part, Relative)
    np.testing.assert_array_equal(found["hold_still"][3, 2], [part.previous[3, 0], 7])
    np.testing.assert_array_equal(found["mean_action"][3, 2], [1, 7 + 2])
