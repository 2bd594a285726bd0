"""Each replacement touches one input, and the verdict follows from what a policy does with it."""

import numpy as np
import pytest

from wallx_jax.data.normalize import NormStats, Stats
from wallx_jax.evaluation import ablation
from wallx_jax.evaluation.openloop import Recorded

TASKS = ["red", "green", "blue"]
FRAMES, STEPS, DIMS = 8, 3, 2


@pytest.fixture
def recorded():
    rng = np.random.default_rng(11)
    observations = [
        {
            "images": {"cam": rng.integers(0, 256, (6, 6, 3), np.uint8)},
            "state": rng.uniform(1, 3, DIMS),
            "instruction": TASKS[i % 3],
        }
        for i in range(FRAMES)
    ]
    actions = np.stack([_act(o, images=True, words=True, state=True) for o in observations])
    episodes = np.arange(FRAMES) // 4
    return Recorded(observations, actions, np.ones((FRAMES, STEPS), bool), actions[:, 0], episodes, np.arange(FRAMES))


def _act(o, images: bool, words: bool, state: bool) -> np.ndarray:
    """A policy that looks at some of its inputs; with all of them it does what was recorded."""
    value = 0.01 * float(o["images"]["cam"].mean()) if images else 1.3
    value += TASKS.index(o["instruction"]) if words and o["instruction"] in TASKS else 0.5
    return np.full((STEPS, DIMS), value) + (o["state"] if state else 0)


class Processor:
    """What `changes` asks of one: states from 1 to 3."""

    class state:
        width = DIMS

        @staticmethod
        def unnormalize(x):
            return x + 2.0


def replaced(recorded, tasks=TASKS):
    return {
        name: change(recorded.observations) for name, change in ablation.changes(recorded, Processor, tasks).items()
    }


def test_each_replacement_touches_one_input(recorded):
    touched = {
        "nothing": None,
        "images noise": "images",
        "images of another episode": "images",
        "instruction swapped": "instruction",
        "state zeroed": "state",
    }
    found = replaced(recorded)
    assert list(found) == list(touched)
    for name, observations in found.items():
        for before, after in zip(recorded.observations, observations, strict=True):
            for field in before:
                old, new = (o[field]["cam"] if field == "images" else o[field] for o in (before, after))
                same = np.array_equal(old, new)
                assert same == (field != touched[name]), (name, field)
    np.testing.assert_array_equal(found["state zeroed"][3]["state"], [2.0, 2.0])
    for row, after in enumerate(found["images of another episode"]):
        source = next(i for i, o in enumerate(recorded.observations) if o["images"] is after["images"])
        assert recorded.episodes[source] != recorded.episodes[row]


def test_one_instruction_is_swapped_for_a_foreign_one_and_one_episode_has_no_other(recorded):
    rows = recorded.of_episode(0)
    found = replaced(rows, tasks=["red"])
    assert "images of another episode" not in found
    assert found["instruction swapped"][0]["instruction"] == ablation.FOREIGN


@pytest.mark.parametrize("ignored", ["images", "words", "state", None])
def test_verdict_names_the_input_that_is_ignored(recorded, ignored):
    used = {name: name != ignored for name in ("images", "words", "state")}
    chunks = {name: np.stack([_act(o, **used) for o in each]) for name, each in replaced(recorded).items()}
    if ignored is None:
        noisy = np.random.default_rng(1).normal(scale=0.01, size=recorded.actions.shape)
        chunks = {name: chunk + noisy for name, chunk in chunks.items()}  # an error to be a multiple of
    found = ablation.effects(recorded, chunks, np.ones(DIMS, bool))
    inputs = {"images noise": "images", "images of another episode": "images", "instruction swapped": "words",
              "state zeroed": "state"}  # fmt: skip
    for name, field in inputs.items():
        words = ablation.verdict(found[name])
        assert (words == "no effect") == (field == ignored), (name, words)
        if ignored is None:
            assert words == "used"
    text = ablation.table(found)
    assert text.count("\n") == len(found) and ("no effect" in text) == (ignored is not None)


def test_a_small_effect_is_hardly_any():
    stats = Stats(*np.zeros((2, DIMS)), *np.zeros((2, DIMS)), *np.zeros((2, DIMS)))
    assert NormStats(stats, stats, "s", "a")
    assert ablation.verdict(ablation.Effect(None, action_change=0.1, ratio=1.01)) == "hardly used"
    assert ablation.verdict(ablation.Effect(None, action_change=0.1, ratio=1.2)) == "used"
