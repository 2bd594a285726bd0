"""Computes exact normalisation statistics from a dataset's table files, without reading any video."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from wallx_jax.data.fetch import fetch
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo, read_info
from wallx_jax.data.normalize import NormStats, Stats


def compute_stats(
    dataset: str | Path | DatasetInfo | LeRobotSource,
    state_key: str = "observation.state",
    action_key: str = "action",
    episodes: Sequence[int] | None = None,
    relative_to: Sequence[int] = (),
    horizon: int = 1,
    progress: bool = False,
) -> NormStats:
    """Compute mean, standard deviation, exact 1% and 99% quantiles, min and max of every dimension.

    The quantiles are linearly interpolated. Each frame of the dataset, or of the chosen episodes, is counted once;
    upstream estimates the same statistics from histograms over action chunks, which count a frame up to `horizon`
    times.

    For an action dim that is relative to the state, the statistics are those of the differences action[t + k] -
    state[t] over all frames t and steps k < horizon that are within the episode. Memory: the state and action columns,
    plus twice the differences of one dim, at 8 bytes per value.

    Args:
        dataset: a local folder, a repo id, a `read_info` result, or a source of the whole dataset, whose own keys are
            then used.
        state_key: feature slices of the state, see wallx_jax.config.feature_slices.
        action_key: feature slices of the action.
        episodes: `episode_index` of the episodes to use; None for all.
        relative_to: state dim per action dim that it is relative to, or -1; empty for none.
        horizon: steps of an action chunk; unused where no action is relative.
        progress: show progress bars over the table files and the dims.

    Raises:
        ValueError: for a key that the dataset lacks, an unknown episode, or an infinite value.
    """
    if isinstance(dataset, LeRobotSource):
        source = dataset
    else:
        info = dataset if isinstance(dataset, DatasetInfo) else read_info(dataset)
        fetch(info)
        source = LeRobotSource(info, 1, (), state_key, action_key)
    info, state_key, action_key = source.info, source.state_key, source.action_key
    source.table.load(progress=progress)
    states, actions = source.table.state, source.table.action
    left = np.repeat(info.episode_starts + info.episode_lengths, info.episode_lengths) - np.arange(info.num_frames)
    if episodes is not None:
        numbers = info.episode_numbers
        if unknown := sorted(set(map(int, episodes)) - set(numbers.tolist())):
            raise ValueError(f"{info.repo_id} has episodes {numbers[0]}..{numbers[-1]}, not {unknown}")
        chosen = np.repeat(np.isin(numbers, list(episodes)), info.episode_lengths)
        states, actions, left = states[chosen], actions[chosen], left[chosen]
    if not len(states):
        raise ValueError(f"{info.repo_id}: no frames to compute statistics from")
    relative_to = tuple(relative_to)
    if relative_to and (len(relative_to) != actions.shape[1] or max(relative_to) >= states.shape[1]):
        raise ValueError(
            f"relative_to is {relative_to}; expected -1 or one of {states.shape[1]} state dims for each of "
            f"{actions.shape[1]} action dims"
        )
    targets = (
        column if state < 0 else _differences(column, states[:, state], left, horizon)
        for column, state in zip(actions.T, relative_to or (-1,) * actions.shape[1], strict=True)
    )
    try:
        with tqdm(total=states.shape[1] + actions.shape[1], desc="statistics", unit="dim", disable=not progress) as bar:
            parts = _stats("state", states.T, bar), _stats("action", targets, bar)
        return NormStats(*parts, state_key, action_key, relative_to, horizon if relative_to else None)
    except ValueError as error:
        raise ValueError(f"{info.repo_id}: {error}") from error


def table(stats: NormStats, info: DatasetInfo) -> str:
    """Format the statistics of a dataset as a readable table, one line per dim."""
    fields = ("mean", "std", "min", "q01", "q99", "max")
    states, actions = info.dim_names(stats.state_key), info.dim_names(stats.action_key)
    relative = [
        "" if state < 0 else f"minus the state's {states[state]}" for state in stats.relative_to or (-1,) * len(actions)
    ]
    width = max(map(len, (*states, *actions)))
    lines = []
    for title, part, names, notes in (
        (f"state: {stats.state_key}", stats.state, states, [""] * len(states)),
        (f"action: {stats.action_key}", stats.action, actions, relative),
    ):
        lines += [title, f"  {'':{width}}" + "".join(f"{field:>12}" for field in fields)]
        for dim, name in enumerate(names):
            values = "".join(f"{getattr(part, field)[dim]:12.5g}" for field in fields)
            still = "never moves" if part.min[dim] == part.max[dim] else ""
            lines.append(f"  {name:{width}}{values}  {'; '.join(filter(None, (notes[dim], still)))}".rstrip())
    return "\n".join(lines)


def _differences(actions: np.ndarray, states: np.ndarray, left: np.ndarray, horizon: int) -> np.ndarray:
    """Return actions[t + k] - states[t] of one dim for all t and k < horizon within the episode, as one array.

    Args:
        actions: [N].
        states: [N].
        left: int [N], frames until the end of the episode, including the current one.
        horizon: steps of an action chunk.
    """
    actions, states = actions.astype(np.float64), states.astype(np.float64)
    found = np.empty(np.minimum(left, horizon).sum())
    end = 0
    for step in range(min(horizon, len(states))):
        inside = left[: len(states) - step] > step
        differences = (actions[step:] - states[: len(states) - step])[inside]
        found[end : end + len(differences)] = differences
        end += len(differences)
    return found


def _stats(what: str, columns: Iterable[np.ndarray], bar: tqdm) -> Stats:
    """Compute statistics from one array [N] per dim.

    NaN marks a missing value and is ignored; a dim without any other value gets zeros.
    """
    rows: list[list[float]] = []
    for column in columns:
        x = column[~np.isnan(column)].astype(np.float64, copy=False)
        del column  # the differences of a dim are large: keep at most two such arrays at a time
        if np.isinf(x).any():
            raise ValueError(
                f"dim {len(rows)} of the {what} has infinite values; scripts/check_dataset.py says in which frames: "
                "repair them, or leave their episodes out with the setting `episodes`"
            )
        x = x if len(x) else np.zeros(1)
        row = [x.mean(), x.std(), x.min(), x.max()]
        rows.append([*row[:2], *np.quantile(x, [0.01, 0.99], overwrite_input=True), *row[2:]])
        del x
        bar.update()
    return Stats(*np.array(rows).T)
