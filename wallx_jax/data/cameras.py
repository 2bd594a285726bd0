"""Read camera images by frame, from videos or from the dataset's tables."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wallx_jax.data.errors import unreadable
from wallx_jax.data.image_columns import ImageColumns, check_column
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.spans import read_spans
from wallx_jax.data.tables import FrameTable
from wallx_jax.data.video import VideoReader, check_size, decode_in_order, place_in_video, video_runs


class CameraReader:
    """Reader for the images of the given cameras. Thread-safe; a pickled copy opens its own files.

    Args:
        info: the dataset.
        cameras: camera keys.
        table: the dataset's tables.

    Raises:
        ValueError: the dataset has no such camera, or its images are depth maps.
        DatasetError: the time spans of a camera's videos contradict the episodes, or a table lacks its images.
    """

    def __init__(self, info: DatasetInfo, cameras: Sequence[str], table: FrameTable):
        self._info, self._table = info, table
        self._sizes = {camera: info.frame_size(camera) for camera in cameras}
        self._spans = {camera: read_spans(info, camera) for camera in cameras if info.is_video(camera)}
        for camera in cameras:
            if camera not in self._spans:
                for file in table.files:
                    check_column(file, camera)
        self._open()

    def _open(self) -> None:
        self._videos, self._images = VideoReader(self._info.fps), ImageColumns(self._info.root)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_videos", "_images")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, camera: str, frame: int) -> np.ndarray:
        """Return the image of a frame, uint8 RGB [H, W, 3].

        Raises:
            FrameError: the image cannot be read or decoded; names dataset, episode, frame and file.
        """
        info, file = self._info, self.file_of(camera, frame)
        try:
            if camera in self._spans:
                image = self._videos.read(*place_in_video(info, camera, self._spans[camera], frame))
            else:
                self._table.load(frame)
                image = self._images.read(file, camera, int(self._table.row[frame]))
            check_size(image, self._sizes[camera])
        except Exception as error:  # decoders raise exceptions of any type
            raise unreadable(camera, file, info.repo_id, info.describe(frame), error) from error
        return image

    def file_of(self, camera: str, frame: int) -> Path:
        """Return the video or table file that contains the image of a frame."""
        if camera in self._spans:
            return place_in_video(self._info, camera, self._spans[camera], frame)[0]
        return self._table.file_of(frame)

    def read_in_order(self, camera: str, frames: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (frame, image) for many frames, fastest in the order of `runs`. Raises as `read` does."""
        if camera in self._spans:
            yield from decode_in_order(self._info, camera, frames, self._spans[camera])
        else:
            yield from ((frame, self.read(camera, frame)) for frame in frames.tolist())

    def runs(self, camera: str, most: int) -> Iterator[np.ndarray]:
        """Yield all frames as runs, int [n], in the order in which a camera's files store them.

        All frames of a run are in one file.

        Args:
            camera: camera key.
            most: maximum number of frames in a run.
        """
        for frames in video_runs(self._info, self._spans[camera]) if camera in self._spans else self._table.runs():
            yield from np.array_split(frames, -(-len(frames) // most))
