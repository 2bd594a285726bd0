import dataclasses
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import synthetic

from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.stats import compute_stats


def test_exact_over_all_frames(dataset_dir, dataset_info):
    episodes = [synthetic.episode_table(e) for e in range(len(synthetic.LENGTHS))]
    states, actions = (np.concatenate(column) for column in zip(*episodes, strict=True))
    got = compute_stats(str(dataset_dir))
    for part, values in ((got.state, states.astype(np.float64)), (got.action, actions.astype(np.float64))):
        np.testing.assert_allclose(part.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(part.std, values.std(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(part.q01, np.quantile(values, 0.01, axis=0))
        np.testing.assert_array_equal(part.q99, np.quantile(values, 0.99, axis=0))
        np.testing.assert_array_equal(part.min, values.min(0))
        np.testing.assert_array_equal(part.max, values.max(0))
    source = LeRobotSource(dataset_info, 4, list(synthetic.CAMERAS))
    for other in (compute_stats(dataset_info), compute_stats(source)):
        np.testing.assert_array_equal(other.action.q99, got.action.q99)


def test_chosen_episodes(dataset_info):
    states, _ = synthetic.episode_table(2)
    np.testing.assert_array_equal(compute_stats(dataset_info, episodes=[2]).state.max, states.max(0))
    with pytest.raises(ValueError, match="episodes 0..3, not \\[9\\]"):
        compute_stats(dataset_info, episodes=[9])


def test_unknown_key(dataset_info):
    with pytest.raises(ValueError, match="no feature 'actions' that is a vector; it has \\['observation.state', "):
        compute_stats(dataset_info, action_key="actions")


def table_only(root, values, actions=None, lengths=None, files=1):
    """A dataset of table files, without any meta files; the last file comes first by name, and holds whole episodes."""
    (root / "data" / "chunk-000").mkdir(parents=True)
    count, lengths = len(values), np.array([len(values)] if lengths is None else lengths)
    table = {"s": values, "a": values if actions is None else actions}
    columns = {key: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]) for key, x in table.items()}
    starts = np.cumsum(lengths) - lengths
    columns |= {
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "index": np.arange(count),
        "frame_index": np.arange(count) - np.repeat(starts, lengths),
        "task_index": np.zeros(count, np.int64),
    }
    for number, episodes in enumerate(np.array_split(np.arange(len(lengths)), files)[::-1]):
        part = pa.table(columns).slice(starts[episodes[0]], lengths[episodes].sum())
        pq.write_table(part, root / "data" / "chunk-000" / f"file-{number:03d}.parquet")
    return DatasetInfo(
        repo_id="t",
        root=root,
        fps=10,
        features={key: {"dtype": "float32", "shape": [x.shape[1]]} for key, x in table.items()},
        tasks={0: "do"},
        episode_numbers=np.arange(len(lengths)),
        episode_lengths=lengths,
        first_indices=starts,
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    )


def expected(values):
    """The statistics of one dim's values, in plain NumPy."""
    x = values[~np.isnan(values)].astype(np.float64)
    return [x.mean(), x.std(), np.quantile(x, 0.01), np.quantile(x, 0.99), x.min(), x.max()]


def assert_stats(stats, columns):
    for dim, values in enumerate(columns):
        got = [getattr(stats, name)[dim] for name in ("mean", "std", "q01", "q99", "min", "max")]
        np.testing.assert_allclose(got[:2], expected(values)[:2], rtol=1e-12, atol=1e-12)
        assert got[2:] == expected(values)[2:]


@pytest.fixture
def robot(tmp_path):
    """Three files, five episodes of which one is shorter than the horizon, NaNs, and a dim that never moves."""
    rng = np.random.default_rng(4)
    states, actions = (rng.normal(size=(60, 3)).astype(np.float32) for _ in range(2))
    states[:, 1] = actions[:, 2] = 0.25
    states[rng.random(60) < 0.1, 2] = np.nan
    actions[rng.random(60) < 0.1, 0] = np.nan
    lengths = [20, 3, 17, 8, 12]
    return table_only(tmp_path, states, actions, lengths, files=3), states, actions


def test_several_files_with_gaps_against_numpy(robot):
    info, states, actions = robot
    stats = compute_stats(info, "s", "a")
    assert_stats(stats.state, states.T)
    assert_stats(stats.action, actions.T)


@pytest.mark.parametrize("episodes", [None, [1, 3]])
@pytest.mark.parametrize("horizon", [1, 5])
def test_relative_actions_are_differences_over_all_steps_in_the_episode(robot, horizon, episodes):
    info, states, actions = robot
    relative_to = (2, -1, 1)
    stats = compute_stats(info, "s", "a", episodes, relative_to, horizon)
    differences = [[], [], []]
    used = []
    for episode in range(5) if episodes is None else episodes:
        first, length = info.episode_starts[episode], info.episode_lengths[episode]
        used += range(first, first + length)
        for t in range(first, first + length):
            for step in range(horizon):
                if t + step < first + length:
                    for action, state in ((0, 2), (2, 1)):
                        differences[action].append(float(actions[t + step, action]) - float(states[t, state]))
    differences[1] = actions[used, 1]
    assert_stats(stats.action, map(np.array, differences))
    assert_stats(stats.state, states[used].T)
    assert (stats.relative_to, stats.horizon) == (relative_to, horizon)
    with pytest.raises(ValueError, match="one of 3 state dims for each of 3 action dims"):
        compute_stats(info, "s", "a", relative_to=(3, -1, -1))


def test_bars_go_to_stderr(robot, capsys):
    compute_stats(robot[0], "s", "a", progress=True)
    out, err = capsys.readouterr()
    assert not out and "reading t" in err and "3/3" in err and "6/6" in err
    compute_stats(robot[0], "s", "a")
    assert capsys.readouterr() == ("", "")


@pytest.mark.medium
def test_a_million_frames_take_seconds(tmp_path):
    values = np.random.default_rng(0).normal(size=(1_000_000, 14)).astype(np.float32)
    info = table_only(tmp_path, values)
    start = time.process_time()  # of this process: the machine may be busy with others
    got = compute_stats(info, "s", "a")
    assert time.process_time() - start < 30
    np.testing.assert_array_equal(got.state.q01[3], np.quantile(values[:, 3].astype(np.float64), 0.01))


def test_missing_and_infinite_values(tmp_path):
    values = np.arange(20, dtype=np.float32).reshape(10, 2)
    values[3, 0], values[:, 1] = np.nan, np.nan
    got = compute_stats(table_only(tmp_path / "nan", values), "s", "a").state
    assert got.max.tolist() == [18, 0] and got.min.tolist() == [0, 0]
    values[0, 0] = np.inf
    with pytest.raises(
        ValueError, match="t: dim 0 of the state has infinite values; scripts/check_dataset.py lists the frames"
    ):
        compute_stats(table_only(tmp_path / "inf", values), "s", "a")


def test_frames_that_are_missing(tmp_path):
    info = table_only(tmp_path, np.zeros((10, 2), np.float32))
    with pytest.raises(ValueError, match="lacks 2 of the 12 frames that meta/episodes counts"):
        compute_stats(dataclasses.replace(info, episode_lengths=np.array([12])), "s", "a")
