"""Is a dataset fit to train on? Its tables and a sample of its frames, looked over.

Legend: N frames, D robot dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wallx_jax.data.lerobot import DatasetInfo, LeRobotSource, read_columns
from wallx_jax.data.mixture import Part
from wallx_jax.data.normalize import Stats
from wallx_jax.data.setup import load_stats
from wallx_jax.evaluation import findings, frames, signals
from wallx_jax.evaluation.findings import Finding, Vector
from wallx_jax.evaluation.frames import Look
from wallx_jax.evaluation.signals import Following


@dataclass(frozen=True, eq=False)
class Report:
    """What was found. `task_index`: int [N], the number of each frame's instruction. `task_counts`: (frames,
    episodes) of each instruction. `pairs`: (state dim, action dim) of each entry of `following`."""

    info: DatasetInfo
    horizon: int
    state: Vector
    action: Vector
    pairs: list[tuple[int, int]]
    following: Following
    task_index: np.ndarray
    task_counts: list[tuple[int, int]]
    look: Look
    findings: list[Finding]

    @property
    def failed(self) -> bool:
        """Is there an error among the findings?"""
        return any(finding.severity == findings.ERROR for finding in self.findings)

    def instruction(self, episode: int) -> str:
        """At the episode's first frame; empty where the dataset lacks it."""
        number = self.task_index[self.info.episode_starts[episode]]
        return (self.info.tasks[number] or "") if 0 <= number < len(self.info.tasks) else ""


def check(part: Part, decode: int | None) -> Report:
    """Looks a dataset over. `decode`: about how many frames to decode; None: all of them.

    Raises:
        ValueError, FileNotFoundError: the tables cannot be read, or norm_stats_path does not fit.
    """
    info, run, data = part.info, part.settings, part.settings.data
    cameras = [camera.key for camera in data.cameras]
    # One action: for the others lerobot reads the images of the frames that follow, where these are in the tables.
    source = LeRobotSource(info, 1, cameras, data.state_key, data.action_key)
    states, actions, times, task_index = read_columns(
        info, [data.state_key, data.action_key, "timestamp", "task_index"]
    )
    _, episodes, frame = source.locate(np.arange(info.num_frames))

    stats = load_stats(run, info) if data.norm_stats_path else None
    robot, vectors = run.robot, []
    for what, key, groups, used, values in (
        ("state", data.state_key, robot.agent_pos, robot.observed(), states),
        ("action", data.action_key, robot.dof, robot.predicted(), actions),
    ):
        bounds = (
            None if stats is None else _bounds(getattr(stats, what), robot.relative_to() if what == "action" else ())
        )
        spread = signals.spread(values, bounds)
        names, jumps = _names(info, key, groups), signals.jumps(values, episodes)
        vectors.append(Vector(what, key, names, np.array(used), values, spread, jumps, stats is not None))
    state, action = vectors
    pairs = signals.pairs(state.names, action.names)
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    following = signals.following(states[:, left], actions[:, right], episodes, longest=max(round(info.fps), 1))

    chosen = frames.sample(info, decode)
    look = frames.look(source, chosen, frames.first_middle_last(chosen, episodes=3))
    task_counts = _count_tasks(info, task_index, episodes)
    found = [
        *findings.of_lengths(info, data.action_horizon),
        *findings.of_vector(state, episodes, frame),
        *findings.of_vector(action, episodes, frame),
        *findings.of_following(info, state, action, pairs, following),
        *findings.of_times(info, cameras, times, episodes, frame),
        *findings.of_tasks(info, task_index, task_counts),
        *findings.of_frames(info, look),
    ]
    found.sort(key=lambda finding: findings.SEVERITIES.index(finding.severity))
    return Report(info, data.action_horizon, state, action, pairs, following, task_index, task_counts, look, found)


def _bounds(stats: Stats, relative_to: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """q01 and q99 [D] of given statistics; NaN for actions that are relative to the state, which those are not of."""
    relative = np.array(relative_to or [-1] * len(stats)) >= 0
    return np.where(relative, np.nan, stats.q01), np.where(relative, np.nan, stats.q99)


def _names(info: DatasetInfo, key: str, groups: Sequence[tuple[str, int]]) -> list[str]:
    """The configuration's names, unless it has but one for all dims; else the dataset's."""
    if len(groups) == 1:
        return info.dim_names(key)
    return [name if dims == 1 else f"{name}.{i}" for name, dims in groups for i in range(dims)]


def _count_tasks(info: DatasetInfo, task_index: np.ndarray, episodes: np.ndarray) -> list[tuple[int, int]]:
    number = len(info.tasks)
    known = (task_index >= 0) & (task_index < number)
    frames_of = np.bincount(task_index[known], minlength=number)
    spans = np.unique(episodes[known] * number + task_index[known]) % number
    return list(zip(frames_of.tolist(), np.bincount(spans, minlength=number).tolist(), strict=True))
