"""Scan the frames of a dataset for images that cannot be decoded, are black, or are frozen.

Frames are read as in training, one at a time, and only a few numbers are kept of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from wallx_jax.data.errors import FrameError
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo

PER_EPISODE = 5  # frames sampled per episode, including the first and the last
BLACK = 5.0  # mean brightness (0 to 255) below which a frame counts as black
STILL = 0.05  # mean difference (0 to 255) up to which two frames count as the same image


@dataclass(frozen=True)
class Undecodable:
    """A frame of a camera that cannot be read.

    Attributes:
        episode: index of the episode.
        frame: index within the episode.
        camera: key of the camera.
        reason: message of the error.
    """

    episode: int
    frame: int
    camera: str
    reason: str


@dataclass
class CameraStats:
    """Statistics of a camera.

    Attributes:
        frames: number of decoded frames.
        brightness: mean over frames and pixels, 0 to 255.
        dark: number of black frames.
        frozen: episodes in which all scanned frames were the same.
    """

    frames: int = 0
    brightness: float = 0.0
    dark: int = 0
    frozen: list[int] = field(default_factory=list)


@dataclass
class FrameScan:
    """Result of scanning frames.

    Attributes:
        frames: number of scanned frames.
        cameras: {camera key: statistics}.
        undecodable: frames that could not be read.
        shown: images that were kept, {(episode, frame, camera): image}.
    """

    frames: int
    cameras: dict[str, CameraStats]
    undecodable: list[Undecodable]
    shown: dict[tuple[int, int, str], np.ndarray]


def sample(info: DatasetInfo, count: int | None) -> list[np.ndarray]:
    """Select about `count` frames, evenly over episodes and over each from first to last frame; None: all.

    Returns:
        for each selected episode, the ascending indices of its frames in the dataset.
    """
    if count is None:
        return np.split(np.arange(info.num_frames), info.episode_starts[1:])
    episodes = _spread(info.num_episodes, max(count // PER_EPISODE, min(count, 1)))
    each = -(-count // max(len(episodes), 1))
    return [info.episode_starts[e] + _spread(info.episode_lengths[e], each) for e in episodes]


def first_middle_last(chosen: Sequence[np.ndarray], episodes: int) -> list[np.ndarray]:
    """Select the first, middle and last frame of a few of the episodes returned by `sample`."""
    return [chosen[e][_spread(len(chosen[e]), 3)] for e in _spread(len(chosen), episodes)]


def look(source: LeRobotSource, chosen: Sequence[np.ndarray], show: Sequence[np.ndarray] = ()) -> FrameScan:
    """Decode frames of all cameras with a progress bar; unreadable ones are recorded and skipped.

    Args:
        source: the whole dataset.
        chosen: indices of the frames, see `sample`.
        show: indices of the frames whose images to keep, see `first_middle_last`.
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
    """Return at most `count` integers of range(length), evenly spaced from first to last."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(int))
