"""Evaluate a policy open loop: compare its predictions at recorded frames with the recorded actions.

Legend: N frames, A action horizon, D robot dims.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from wallx_jax.data.lerobot import LeRobotSource, RawSample
from wallx_jax.data.processor import Processor
from wallx_jax.inference.policy import ActionError, Observation, Policy

T = TypeVar("T")


@dataclass(frozen=True)
class Recorded:
    """Recorded frames as policy observations, with the actions that followed.

    Attributes:
        observations: one per frame.
        actions: [N, A, D] in robot units, starting with the frame's own action.
        valid: bool [N, A], False past the end of the episode.
        previous: [N, D], the preceding action; for the first frame of an episode, its own.
        episodes: int [N], episode index of each frame.
        frames: int [N], index of each frame within its episode.
    """

    observations: list[Observation]
    actions: np.ndarray
    valid: np.ndarray
    previous: np.ndarray
    episodes: np.ndarray
    frames: np.ndarray

    def __len__(self) -> int:
        return len(self.observations)

    def of_episode(self, episode: int) -> "Recorded":
        rows = np.flatnonzero(self.episodes == episode)
        arrays = (self.actions, self.valid, self.previous, self.episodes, self.frames)
        return Recorded([self.observations[row] for row in rows], *(array[rows] for array in arrays))


def read(source: LeRobotSource, stride: int, episodes: int | None = None, limit: int | None = None) -> Recorded:
    """Read frames of a source for open-loop evaluation.

    Args:
        source: where to read from.
        stride: take every `stride`-th frame of an episode.
        episodes: number of episodes, the first ones; None: all.
        limit: maximum number of frames, evenly spread over those selected; None: all.

    Raises:
        ValueError: the stride is below 1, or the source has no frames.
    """
    if stride < 1 or not len(source):
        raise ValueError(f"nothing to compare: {len(source)} frames, a stride of {stride}")
    _, episode, frame = source.locate(np.arange(len(source)))
    order = np.lexsort((frame, episode))
    parts = np.split(order, np.flatnonzero(np.diff(episode[order])) + 1)[:episodes]
    chosen = np.concatenate([part[::stride] for part in parts])
    if limit is not None and len(chosen) > limit:
        chosen = chosen[np.linspace(0, len(chosen) - 1, limit).round().astype(int)]
    return collect([source[int(place)] for place in chosen], source)


def collect(samples: Sequence[RawSample], source: LeRobotSource) -> Recorded:
    """Collect samples that were read from a source."""
    episodes, frames = (np.array([getattr(sample, name) for sample in samples]) for name in ("episode", "frame"))
    return Recorded(
        observations=[
            {
                "images": dict(zip(source.cameras, sample.images, strict=True)),
                "state": sample.state,
                "instruction": sample.instruction,
            }
            for sample in samples
        ],
        actions=np.stack([sample.actions for sample in samples]),
        valid=~np.stack([sample.action_is_pad for sample in samples]),
        previous=source.actions_at(source.info.start_of(episodes) + np.maximum(frames - 1, 0)),
        episodes=episodes,
        frames=frames,
    )


def predict(
    policy: Policy,
    observations: Sequence[Observation],
    batch_size: int = 8,
    *,
    steps: int = 10,
    seed: int = 0,
    max_tokens: int | None = None,
) -> np.ndarray:
    """Predict action chunks in batches of equal size, so that the policy compiles once.

    Args:
        policy: the policy to evaluate.
        observations: N observations.
        batch_size: observations per call.
        steps: number of Euler steps of the flow.
        seed: seed of the first observation; the i-th one uses `seed + i`.
        max_tokens: as in `Policy.predict`.

    Returns:
        [N, A, D] in robot units; NaN where the policy failed, and in dims that it does not return.
    """
    count, given = len(observations), policy.processor.given
    seeds = _batches(range(seed, seed + count), batch_size)
    chunks = []
    for batch, own in zip(_batches(observations, batch_size), seeds, strict=True):
        try:
            chunks.append(policy.predict(batch, steps=steps, seed=own, max_tokens=max_tokens).actions)
        except ActionError as error:
            chunks.append(error.actions)
    actions = np.concatenate(chunks)[:count]
    everywhere = np.full((*actions.shape[:2], len(given)), np.nan, actions.dtype)
    everywhere[..., given] = actions
    return everywhere


def _batches(rows: Sequence[T], size: int) -> Iterator[list[T]]:
    """Split rows into batches of equal size; the last one is filled up with rows from the start."""
    size = min(size, len(rows))
    for first in range(0, len(rows), size):
        yield [rows[i % len(rows)] for i in range(first, first + size)]


def baselines(recorded: Recorded, processor: Processor) -> dict[str, np.ndarray]:
    """Compute the chunks of baseline policies that need no model.

    Returns:
        {name: chunks [N, A, D] in robot units}:
        "hold_still": holds the state where state and action have the same dims or the action is relative to the state,
            otherwise the previous action.
        "mean_action": the mean of the training actions; for relative actions, the state plus their mean.
    """
    states = np.stack([o["state"] for o in recorded.observations])
    reference = processor.reference(states)
    still = states if states.shape == recorded.previous.shape else recorded.previous
    still = np.where(processor.relative, reference, still)
    mean = reference + processor.stats.action.mean
    shape = recorded.actions.shape
    return {
        "hold_still": np.broadcast_to(still[:, None], shape),
        "mean_action": np.broadcast_to(mean[:, None], shape),
    }


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors in robot units, over steps inside the episode.

    Attributes:
        mean: mean over the dims that the policy predicts.
        per_dim: [D]; NaN in dims that the policy does not return.
        per_step: [A], over predicted dims.
        failed: number of frames without a prediction; they are excluded from all errors.
    """

    mean: float
    per_dim: np.ndarray
    per_step: np.ndarray
    failed: int

    def as_json(self) -> dict[str, Any]:
        return {
            "mae": _number(self.mean),
            "mae_per_dim": [_number(x) for x in self.per_dim],
            "mae_per_step": [_number(x) for x in self.per_step],
            "failed_frames": self.failed,
        }


def errors(chunks: np.ndarray, recorded: Recorded, predicted: np.ndarray) -> Errors:
    """Compare chunks with the recorded actions.

    Args:
        chunks: [N, A, D] in robot units.
        recorded: the recorded frames.
        predicted: bool [D], dims to include in means over dims.
    """
    failed = np.isnan(chunks[..., predicted]).any(axis=(1, 2))
    valid = recorded.valid & ~failed[:, None] & np.isfinite(recorded.actions).all(axis=2)
    error = np.where(valid[..., None], np.abs(chunks - recorded.actions), 0.0)
    steps = valid.sum(axis=0)
    with np.errstate(invalid="ignore"):
        per_dim = error.sum(axis=(0, 1)) / valid.sum()
        per_step = error[..., predicted].mean(axis=2).sum(axis=0) / steps
    return Errors(float(per_dim[predicted].mean()), per_dim, per_step, int(failed.sum()))


def report(chunks: np.ndarray, recorded: Recorded, processor: Processor, names: Sequence[str]) -> dict[str, Any]:
    """Return the errors of the policy and of the baselines as a JSON-serialisable dict."""
    predicted = processor.predicted
    compared: Mapping[str, np.ndarray] = {"policy": chunks, **baselines(recorded, processor)}
    scores = {name: errors(each, recorded, predicted).as_json() for name, each in compared.items()}
    return {
        "frames": len(recorded),
        "episodes": sorted(set(recorded.episodes.tolist())),
        "dims": list(names),
        "predicted": predicted.tolist(),
        **scores,
    }


def _number(x: float) -> float | None:
    """Map non-finite numbers to None, since JSON has no NaN."""
    return float(x) if np.isfinite(x) else None
