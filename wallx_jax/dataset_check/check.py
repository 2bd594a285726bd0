"""Check whether a dataset is fit for training, from its tables, its video headers and a sample of its frames.

Legend: N frames, D robot dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wallx_jax.config.schema.robot import sizes
from wallx_jax.data.build import load_stats
from wallx_jax.data.datasets import DatasetSpec
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.normalize import Stats
from wallx_jax.dataset_check import findings, frames, signals
from wallx_jax.dataset_check.findings import Finding, Vector
from wallx_jax.dataset_check.frames import FrameScan
from wallx_jax.dataset_check.signals import LagStats

LONGEST = 250  # maximum lag between action and state to search for, in frames; never more than a second


@dataclass(frozen=True, eq=False)
class Tables:
    """Statistics of a dataset's tables.

    Attributes:
        state: the recorded states.
        action: the recorded actions.
        pairs: (state dim, action dim) of each entry of `following`.
        following: how the state follows the action.
        task_counts: (frames, episodes) of each instruction.
        findings: consequences for training.
    """

    state: Vector
    action: Vector
    pairs: list[tuple[int, int]]
    following: LagStats
    task_counts: list[tuple[int, int]]
    findings: list[Finding]


@dataclass(frozen=True, eq=False)
class Report:
    """Result of checking a dataset.

    Attributes:
        source: the dataset.
        horizon: action_horizon of the settings.
        tables: statistics of the tables.
        look: scan of a sample of the frames.
        findings: findings about tables, videos and frames, errors first.
    """

    source: LeRobotSource
    horizon: int
    tables: Tables
    look: FrameScan
    findings: list[Finding]

    @property
    def info(self) -> DatasetInfo:
        return self.source.info

    @property
    def failed(self) -> bool:
        """Whether there is an error among the findings."""
        return any(finding.severity == findings.ERROR for finding in self.findings)

    def instruction(self, episode: int) -> str:
        """Return the instruction at the first frame of the episode with this `episode_index`."""
        return self.info.tasks[int(self.source.table.task[self.info.start_of(episode)])]


def check(part: DatasetSpec, decode: int | None) -> Report:
    """Check the tables, video headers and frames of a dataset.

    Args:
        part: the dataset with its settings.
        decode: approximate number of frames to decode; None: all of them.

    Raises:
        ValueError, FileNotFoundError: the tables cannot be read, or norm_stats_path does not fit.
    """
    info, tables = part.info, check_tables(part)
    chosen = frames.sample(info, decode)
    look = frames.look(part.source, chosen, frames.first_middle_last(chosen, episodes=3))
    found = [*tables.findings, *findings.of_videos(part.source), *findings.of_frames(info, look)]
    found.sort(key=lambda finding: findings.SEVERITIES.index(finding.severity))
    return Report(part.source, part.settings.data.action_horizon, tables, look, found)


def check_tables(part: DatasetSpec) -> Tables:
    """Check the tables only, without decoding any frame; raises as `check`."""
    source, info, run, data = part.source, part.info, part.settings, part.settings.data
    source.table.load()
    states, actions = source.table.state, source.table.action
    episodes = np.repeat(info.episode_numbers, info.episode_lengths)

    stats = load_stats(run, source) if data.norm_stats_path else None
    robot, vectors = run.robot, []
    for what, key, groups, used, values in (
        ("state", data.state_key, sizes(robot.agent_pos), robot.observed(), states),
        ("action", data.action_key, sizes(robot.dof), robot.predicted(), actions),
    ):
        relative_to = robot.relative_to() if what == "action" else ()
        bounds = None if stats is None else _bounds(getattr(stats, what), relative_to)
        spread = signals.spread(values, bounds)
        names, jumps = _names(info, key, groups), signals.jumps(values, episodes)
        needed = np.array(used)
        if what == "state":
            needed[[dim for dim in robot.relative_to() if dim >= 0]] = True
        vectors.append(Vector(what, key, names, np.array(used), needed, values, spread, jumps, stats is not None))
    state, action = vectors
    pairs = signals.pairs(state.names, action.names)
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    following = signals.following(states[:, left], actions[:, right], episodes, min(max(round(info.fps), 1), LONGEST))
    counts = _count_tasks(info, source.table.task, episodes)
    cameras = [camera.key for camera in data.cameras]
    found = [
        *findings.of_lengths(info, data.action_horizon),
        *findings.of_vector(state, info),
        *findings.of_vector(action, info),
        *findings.of_following(info, state, action, pairs, following),
        *findings.of_times(info, cameras, source.table.read("timestamp")),
        *findings.of_tasks(info, [frames for frames, _ in counts]),
    ]
    return Tables(state, action, pairs, following, counts, found)


def _bounds(stats: Stats, relative_to: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return q01 and q99 [D] of given statistics; NaN for relative actions, whose recorded values are absolute."""
    relative = np.array(relative_to or [-1] * len(stats)) >= 0
    return np.where(relative, np.nan, stats.q01), np.where(relative, np.nan, stats.q99)


def _names(info: DatasetInfo, key: str, groups: Sequence[tuple[str, int]]) -> list[str]:
    """Return the configuration's names of the dims, or the dataset's if the configuration has one name for all dims."""
    if len(groups) == 1:
        return info.dim_names(key)
    return [name if dims == 1 else f"{name}.{i}" for name, dims in groups for i in range(dims)]


def _count_tasks(info: DatasetInfo, task: np.ndarray, episodes: np.ndarray) -> list[tuple[int, int]]:
    """Count the (frames, episodes) of each task, from the task and episode index of each frame (both int [N])."""
    numbers = np.array(list(info.tasks))
    position = np.searchsorted(numbers, task)
    frames_of = np.bincount(position, minlength=len(numbers))
    spans = np.unique(episodes * len(numbers) + position) % len(numbers)
    return list(zip(frames_of.tolist(), np.bincount(spans, minlength=len(numbers)).tolist(), strict=True))
