"""Provide random access to the frames of a LeRobot v3.0 dataset with their action chunks."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wallx_jax.data.cameras import CameraReader
from wallx_jax.data.metadata import DatasetInfo, read_info
from wallx_jax.data.tables import FrameTable

__all__ = ["DatasetInfo", "LeRobotSource", "RawSample", "read_info"]


@dataclass(frozen=True, eq=False)
class RawSample:
    """One frame as recorded.

    Attributes:
        images: uint8 RGB [H, W, 3] per camera, in the configured order.
        state: float32 [D], dataset units. NaN values are kept, also in the actions.
        actions: float32 [A, D], dataset units, from this frame on; past the episode's end the last action repeats.
        action_is_pad: bool [A], True past the episode's end.
        instruction: the task's text.
        episode: `episode_index`.
        frame: position in the episode, `frame_index`.
        resized: whether the images already have the model's size (data.frame_cache).
    """

    images: tuple[np.ndarray, ...]
    state: np.ndarray
    actions: np.ndarray
    action_is_pad: np.ndarray
    instruction: str
    episode: int
    frame: int
    resized: bool = False


class LeRobotSource:
    """Random-access source of the frames of a split (a Grain RandomAccessDataSource).

    A pickled copy shares the tables with the original and opens its own videos.

    Args:
        info: the dataset.
        horizon: A, actions per sample, one per frame.
        cameras: camera keys, in the order of the prompt's placeholders.
        state_key: feature slices of the state, see wallx_jax.config.feature_slices.
        action_key: feature slices of the action.
        frames: the split's frames, int [n]; None for all.

    Attributes:
        frames: the split's frames; consecutive ones are stored as a range, which takes no memory.
        table: the tables of the whole dataset.
        images: the images of the whole dataset.

    Raises:
        ValueError: a key is not in the dataset (the message lists its keys), or a frame is out of range.
        FileNotFoundError: a table file is missing.
        DatasetError: tables or videos contradict the metadata.
    """

    def __init__(
        self,
        info: DatasetInfo,
        horizon: int,
        cameras: Sequence[str],
        state_key: str = "observation.state",
        action_key: str = "action",
        frames: np.ndarray | Sequence[int] | None = None,
    ):
        self.info, self.horizon, self.cameras = info, horizon, tuple(cameras)
        self.state_key, self.action_key = state_key, action_key
        for camera in cameras:
            info.check_camera(camera)
        from_videos = any(map(info.is_video, cameras))
        self.table = FrameTable(info, info.parts(state_key), info.parts(action_key), check_times=from_videos)
        self.images = CameraReader(info, cameras, self.table)
        self._set_frames(range(info.num_frames) if frames is None else frames)

    def _set_frames(self, frames: np.ndarray | Sequence[int]) -> None:
        if not isinstance(frames, range):
            frames = np.asarray(frames, np.int64)
            if len(frames) and (np.diff(frames) == 1).all():
                frames = range(int(frames[0]), int(frames[-1]) + 1)
        self.frames: range | np.ndarray = frames
        if not len(frames):
            return
        first, last = (frames[0], frames[-1]) if isinstance(frames, range) else (frames.min(), frames.max())
        if first < 0 or last >= self.info.num_frames:
            raise ValueError(
                f"{self.info.repo_id}: frames {first}..{last} requested, but it has {self.info.num_frames} frames"
            )

    def __repr__(self) -> str:
        return f"LeRobotSource({self.info.repo_id}, {len(self)} frames, horizon {self.horizon}, cameras {self.cameras})"

    @property
    def instructions(self) -> dict[int, str]:
        """Return {task_index: instruction} of the tasks that occur in the dataset's frames."""
        return {number: self.info.tasks[number] for number in sorted(self.table.tasks_used)}

    def select(self, frames: np.ndarray | Sequence[int]) -> "LeRobotSource":
        """Return a source of these frames of the dataset that shares tables and open videos with this one."""
        other = copy.copy(self)
        other._set_frames(frames)
        return other

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> RawSample:
        """Return the i-th frame of the split, with images.

        Raises:
            FrameError: an image cannot be read or decoded; names dataset, episode, frame and file.
        """
        frame = int(self.frames[i])
        images = tuple(self.images.read(camera, frame) for camera in self.cameras)
        return dataclasses.replace(self.low_dim(i), images=images)

    def low_dim(self, i: int) -> RawSample:
        """Return the i-th frame without images (an empty tuple), reading only the tables; nothing is decoded."""
        frame = int(self.frames[i])
        episode, place = self.info.locate(frame)
        self.table.load(frame)
        steps, stop = frame + np.arange(self.horizon), frame - place + self.info.episode_lengths[episode]
        return RawSample(
            images=(),
            state=self.table.state[frame].astype(np.float32),
            actions=self.table.action[np.minimum(steps, stop - 1)].astype(np.float32),
            action_is_pad=steps >= stop,
            instruction=self.info.tasks[int(self.table.task[frame])],
            episode=int(self.info.episode_numbers[episode]),
            frame=int(place),
        )

    def locate(self, places: Any) -> tuple[Any, Any, Any]:
        """Locate positions of the split in the dataset.

        Args:
            places: one position or int [n].

        Returns:
            (frame in the dataset, `episode_index`, `frame_index`), each of the shape of `places`.
        """
        frames = self.frames.start + places if isinstance(self.frames, range) else self.frames[places]
        episodes, within = self.info.locate(frames)
        return frames, self.info.episode_numbers[episodes], within

    def actions_at(self, frames: np.ndarray) -> np.ndarray:
        """Return the recorded actions of frames of the dataset (not of the split), float32 [n, D]."""
        self.table.load(frames)
        return self.table.action[frames].astype(np.float32)
