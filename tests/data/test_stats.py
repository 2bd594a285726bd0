import dataclasses
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic

from wallx_jax.data.lerobot import DatasetInfo, LeRobotSource
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
    with pytest.raises(ValueError, match="no feature 'actions'; it has \\['observation.state', 'action'"):
        compute_stats(dataset_info, action_key="actions")


def table_only(root, values):
    """A dataset of one table file, without any meta files."""
    (root / "data" / "chunk-000").mkdir(parents=True)
    count, dims = values.shape
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dims)
    columns = {"s": vectors, "a": vectors, "episode_index": np.zeros(count, int), "index": np.arange(count)}
    pq.write_table(pa.table(columns), root / "data" / "chunk-000" / "file-000.parquet")
    features = {key: {"dtype": "float32", "shape": [dims]} for key in ("s", "a")}
    return DatasetInfo("t", root, 10, 1, count, None, features, (), ["do"], np.array([count]))


def test_a_million_frames_take_seconds(tmp_path):
    values = np.random.default_rng(0).normal(size=(1_000_000, 14)).astype(np.float32)
    info = table_only(tmp_path, values)
    start = time.monotonic()
    got = compute_stats(info, "s", "a")
    assert time.monotonic() - start < 30
    np.testing.assert_array_equal(got.state.q01[3], np.quantile(values[:, 3].astype(np.float64), 0.01))


def test_missing_and_infinite_values(tmp_path):
    values = np.arange(20, dtype=np.float32).reshape(10, 2)
    values[3, 0], values[:, 1] = np.nan, np.nan
    got = compute_stats(table_only(tmp_path / "nan", values), "s", "a").state
    assert got.max.tolist() == [18, 0] and got.min.tolist() == [0, 0]
    values[0, 0] = np.inf
    with pytest.raises(ValueError, match="t: dim 0 has infinite values"):
        compute_stats(table_only(tmp_path / "inf", values), "s", "a")


def test_frames_that_are_missing(tmp_path):
    info = table_only(tmp_path, np.zeros((10, 2), np.float32))
    with pytest.raises(ValueError, match="holds 10 frames, meta/ counts 12"):
        compute_stats(dataclasses.replace(info, num_frames=12), "s", "a")
