"""Exact normalisation statistics from a dataset's table files; no video is touched."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wallx_jax.data.lerobot import DatasetInfo, LeRobotSource, read_columns, read_info
from wallx_jax.data.normalize import NormStats, Stats


def compute_stats(
    dataset: str | Path | DatasetInfo | LeRobotSource,
    state_key: str = "observation.state",
    action_key: str = "action",
    episodes: Sequence[int] | None = None,
) -> NormStats:
    """Mean, standard deviation, exact 1% and 99% quantiles (linear interpolation), min and max of every dimension.

    Over the frames of the dataset, or of the chosen episodes, each counted once; upstream estimates the same from
    histograms over action chunks, which counts a frame up to `horizon` times.

    Args:
        dataset: a local folder, a repo id, what `read_info` returned, or a source, whose own keys are then used.
        state_key, action_key: vector features.
        episodes: episodes to use; None for all.

    Raises:
        ValueError: for a key the dataset does not have, an unknown episode, or an infinite value.
    """
    if isinstance(dataset, LeRobotSource):
        dataset, state_key, action_key = dataset.info, dataset.state_key, dataset.action_key
    info = dataset if isinstance(dataset, DatasetInfo) else read_info(dataset, download_videos=False)
    info.dims(state_key), info.dims(action_key)
    states, actions, episode = read_columns(info, [state_key, action_key, "episode_index"])
    if episodes is not None:
        if unknown := sorted(set(map(int, episodes)) - set(range(info.num_episodes))):
            raise ValueError(f"{info.repo_id} has episodes 0..{info.num_episodes - 1}, not {unknown}")
        chosen = np.isin(episode, list(episodes))
        states, actions = states[chosen], actions[chosen]
    if not len(states):
        raise ValueError(f"{info.repo_id}: no frames to compute statistics from")
    try:
        return NormStats(_stats(states), _stats(actions), state_key, action_key)
    except ValueError as error:
        raise ValueError(f"{info.repo_id}: {error}") from error


def _stats(values: np.ndarray) -> Stats:
    """[N, D] -> statistics over N. NaN marks a missing value and is left out; a dim with nothing else gets zeros."""
    rows = []
    for dim, column in enumerate(values.T):
        x = column[~np.isnan(column)].astype(np.float64)
        if np.isinf(x).any():
            raise ValueError(f"dim {dim} has infinite values")
        x = x if len(x) else np.zeros(1)
        rows.append([x.mean(), x.std(), *np.quantile(x, [0.01, 0.99]), x.min(), x.max()])
    return Stats(*np.array(rows).T)
