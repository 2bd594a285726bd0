"""States and actions that are put together from parts of a dataset's features."""

import dataclasses

import numpy as np
import pytest

from wallx_jax.config import feature_slices
from wallx_jax.data.lerobot import LeRobotSource, read_info
from wallx_jax.data.stats import compute_stats
from wallx_jax.data.writer import DatasetWriter

LENGTHS, HORIZON = (4, 6), 3
FEATURES = {"action.arm": 3, "action.grip": 1, "observation.pose": 4, "observation.grip": 1}
STATE = "observation.grip,observation.pose[2:4],observation.pose[0:1]"
ACTION = "action.grip,action.arm[1:3],observation.grip"  # a recorded state can be what is to be done, too


def tables(episode: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(episode)
    return {key: rng.normal(size=(LENGTHS[episode], dims)).astype(np.float32) for key, dims in FEATURES.items()}


def joined(episode: int) -> tuple[np.ndarray, np.ndarray]:
    """The states and actions of STATE and ACTION."""
    t = tables(episode)
    state = [t["observation.grip"], t["observation.pose"][:, 2:4], t["observation.pose"][:, :1]]
    action = [t["action.grip"], t["action.arm"][:, 1:3], t["observation.grip"]]
    return np.concatenate(state, axis=1), np.concatenate(action, axis=1)


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts") / "parts"
    features = {key: {"dtype": "float32", "shape": (dims,), "names": None} for key, dims in FEATURES.items()}
    features["action.arm"]["names"] = ["x", "y", "z"]
    with DatasetWriter(root, 10, features) as writer:
        for episode in range(len(LENGTHS)):
            writer.add_episode(tables(episode), task="go")
    return read_info(root)


def test_both_ways_of_reading_give_the_parts_in_order(info):
    source = LeRobotSource(info, HORIZON, [], STATE, ACTION)
    for episode, frame in ((0, 0), (0, 3), (1, 2), (1, 4)):
        place = info.episode_starts[episode] + frame
        states, actions = joined(episode)
        ahead = np.minimum(frame + np.arange(HORIZON), LENGTHS[episode] - 1)
        for sample in (source[place], source.low_dim(place)):
            np.testing.assert_array_equal(sample.state, states[frame])
            np.testing.assert_array_equal(sample.actions, actions[ahead])
            assert sample.action_is_pad.tolist() == [frame + k >= LENGTHS[episode] for k in range(HORIZON)]
            assert sample.state.dtype == sample.actions.dtype == np.float32


def test_columns_and_statistics_are_of_the_joined_vector(info):
    states, actions = (np.concatenate(rows) for rows in zip(*map(joined, range(len(LENGTHS))), strict=True))
    source = LeRobotSource(info, 1, [], STATE, ACTION)
    source.table.load()
    np.testing.assert_array_equal(source.table.action, actions)
    np.testing.assert_array_equal(source.table.state, states)
    stats = compute_stats(info, STATE, ACTION)
    np.testing.assert_array_equal(stats.state.max, states.max(axis=0))
    np.testing.assert_array_equal(stats.action.min, actions.min(axis=0))
    assert (stats.state_key, stats.action_key) == (STATE, ACTION)


def test_dims_and_names(info):
    assert (info.dims(STATE), info.dims(ACTION), info.dims("action.arm")) == (4, 4, 3)
    assert info.dim_names(ACTION) == ["action.grip[0]", "y", "z", "observation.grip[0]"]
    assert info.dim_names("observation.pose") == ["0", "1", "2", "3"]
    assert info.dim_names("observation.pose[2:4]") == ["2", "3"]


@pytest.mark.parametrize(
    ("names", "first"),
    [({"motors": list("abc")}, "a"), ({"a": 0, "b": 1, "c": 2}, "a"), (["too", "few"], "0"), (None, "0")],
)
def test_names_as_datasets_write_them(info, names, first):
    features = info.features | {"action.arm": {**info.features["action.arm"], "names": names}}
    assert dataclasses.replace(info, features=features).dim_names("action.arm")[0] == first


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ("action.arm[1:4]", "goes beyond the 3 dims of 'action.arm'; it has \\['action.arm', 'action.grip'"),
        ("action.arm,timestamp", "no feature 'timestamp' that is a vector"),
        ("action.arm[2:2]", "has no dims"),
        ("action.arm[2]", "is not FEATURE or FEATURE"),
        ("", "is not FEATURE or FEATURE"),
    ],
)
def test_what_is_not_there(info, vector, message):
    with pytest.raises(ValueError, match=f"parts: .*{message}"):
        LeRobotSource(info, HORIZON, [], action_key=vector, state_key=STATE)


def test_the_shortest_form():
    features = {"a": {"dtype": "float32", "shape": [4]}, "b": {"dtype": "int64", "shape": [1]}}
    for written, short in (
        ("a[0:2],a[2:4]", "a"),
        ("a[2:4],a[0:2]", "a[2:4],a[0:2]"),
        ("a[0:1],a[1:3],b", "a[0:3],b"),
        ("b[0:1]", "b"),
    ):
        assert feature_slices.join(feature_slices.locate(written, features), features) == short
