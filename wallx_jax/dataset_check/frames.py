"""A look at the frames of a dataset: do they decode, and is there something to see?

Frames are read as in training, one after the other; what is kept of each is a few numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from wallx_jax.data.errors import FrameError
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo

PER_EPISODE = 5  # frames of an episode in a sample, the first and the last among them
BLACK = 5.0  # mean brightness, of 255
STILL = 0.05  # mean difference, of 255, up to which two frames are the same picture


@dataclass(frozen=True)
class Undecodable:
    """A frame of a camera that cannot be read."""

    episode: int
    frame: int
    camera: str
    reason: str


@dataclass
class CameraStats:
    """What was seen of a camera.

    Attributes:
        brightness: mean over frames and pixels, of 255.
        dark: how many frames were black.
        frozen: the episodes whose frames were all the same.
    """

    frames: int = 0
    brightness: float = 0.0
    dark: int = 0
    frozen: list[int] = field(default_factory=list)


@dataclass
class FrameScan:
    """frames: how many were looked at. cameras: by key. shown: the frames that were to be kept, {(episode, frame,
    camera): image}."""

    frames: int
    cameras: dict[str, CameraStats]
    undecodable: list[Undecodable]
    shown: dict[tuple[int, int, str], np.ndarray]


def sample(info: DatasetInfo, count: int | None) -> list[np.ndarray]:
    """About `count` frames, spread over episodes and over each episode from its first to its last frame; None: all.

    Returns:
        for each episode that is looked at the indices of its frames in the dataset, ascending.
    """
    if count is None:
        return np.split(np.arange(info.num_frames), info.episode_starts[1:])
    episodes = _spread(info.num_episodes, max(count // PER_EPISODE, min(count, 1)))
    each = -(-count // max(len(episodes), 1))
    return [info.episode_starts[e] + _spread(info.episode_lengths[e], each) for e in episodes]


def first_middle_last(chosen: Sequence[np.ndarray], episodes: int) -> list[np.ndarray]:
    """Three frames each of a few of the episodes that `sample` gave."""
    return [chosen[e][_spread(len(chosen[e]), 3)] for e in _spread(len(chosen), episodes)]


def look(source: LeRobotSource, chosen: Sequence[np.ndarray], show: Sequence[np.ndarray] = ()) -> FrameScan:
    """Decodes the frames that `sample` chose, of all cameras of the source (which has the whole dataset), with a
    progress bar. One that cannot be read is noted, and the others are read all the same.

    Args:
        show: the frames to keep, see `first_middle_last`.
    """
    cameras = {camera: CameraStats() for camera in source.cameras}
    result = FrameScan(sum(map(len, chosen)), cameras, [], {})
    keep = set(np.concatenate([*show, []]).astype(int).tolist())
    with tqdm(total=result.frames, desc=f"decoding {source.info.repo_id}", unit="frame", disable=None) as bar:
        for frames in chosen:
            before: dict[str, np.ndarray] = {}
            alike = dict.fromkeys(cameras, 0)
            for number in frames.tolist():
                _, episode, frame = map(int, source.locate(number))
                for camera, seen in cameras.items():
                    try:
                        image = source.images.read(camera, number)
                    except FrameError as error:
                        result.undecodable.append(Undecodable(episode, frame, camera, str(error.__cause__ or error)))
                        continue
                    _note(seen, image)
                    alike[camera] += _same(before.get(camera), image)
                    before[camera] = image
                    if number in keep:
                        result.shown[episode, frame, camera] = image
                bar.update()
            for camera, seen in cameras.items():
                if len(frames) > 1 and alike[camera] == len(frames) - 1:
                    seen.frozen.append(episode)
    return result


def _note(seen: CameraStats, image: np.ndarray) -> None:
    brightness = float(image.mean())
    seen.brightness += (brightness - seen.brightness) / (seen.frames + 1)
    seen.frames += 1
    seen.dark += brightness < BLACK


def _same(before: np.ndarray | None, image: np.ndarray) -> bool:
    if before is None or before.shape != image.shape:
        return False
    return bool(np.abs(image.astype(np.int16) - before).mean() <= STILL)


def _spread(length: int, count: int) -> np.ndarray:
    """At most `count` of range(length), evenly from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(int))
