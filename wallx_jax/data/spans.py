"""Read where the episodes of a LeRobot dataset are located in its video files."""

from dataclasses import dataclass

import numpy as np

from wallx_jax.data.episodes import read_episode_columns
from wallx_jax.data.errors import REWRITE, DatasetError
from wallx_jax.data.metadata import DatasetInfo

COLUMNS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


@dataclass(frozen=True, eq=False)
class VideoSpans:
    """Location of each episode in the video files of one camera.

    Attributes:
        chunk: int64 [E], chunk index.
        file: int64 [E], file index within the chunk.
        start: float64 [E], time of each episode's first frame in the file, in seconds.
    """

    chunk: np.ndarray
    file: np.ndarray
    start: np.ndarray


def read_spans(info: DatasetInfo, camera: str) -> VideoSpans:
    """Read the location of the episodes in a camera's videos and check it for consistency.

    Raises:
        DatasetError: if an index or time is negative, a span is not as long as its episode, or two spans of a file
            overlap.
    """
    columns = {column: f"videos/{camera}/{column}" for column in COLUMNS}
    table = read_episode_columns(info.root, columns.values())
    rows = np.isin(table["episode_index"], info.episode_numbers)
    chunk, file, start, stop = (table[columns[column]][rows] for column in COLUMNS)
    if (negative := (chunk < 0) | (file < 0) | (start < -0.5 / info.fps)).any():
        row = np.flatnonzero(negative)[0]
        raise DatasetError(
            f"{info.root / 'meta' / 'episodes'}: videos/{camera} of episode {info.episode_numbers[row]} has "
            f"chunk_index {chunk[row]}, file_index {file[row]}, from_timestamp {start[row]:g}; they must not be "
            f"negative: {REWRITE}"
        )
    numbers, half_frame = info.episode_numbers, 0.5 / info.fps
    where = f"{info.root / 'meta' / 'episodes'}: videos/{camera}/from_timestamp and to_timestamp"
    remedy = f"images would not match their states: {REWRITE}, or exclude these episodes with the setting `episodes`"
    wrong = ~(abs(stop - start - info.episode_lengths / info.fps) < half_frame)  # written so that NaN counts as wrong
    if wrong.any():
        row = np.flatnonzero(wrong)[0]
        raise DatasetError(
            f"{where} do not span the length of the episode for {wrong.sum()} episodes, the first is episode "
            f"{numbers[row]}: {start[row]:g} to {stop[row]:g} s for {info.episode_lengths[row]} frames at {info.fps:g} "
            f"fps; {remedy}"
        )
    order = np.lexsort((start, file, chunk))
    same = (np.diff(chunk[order]) == 0) & (np.diff(file[order]) == 0)
    overlap = np.flatnonzero(same & (start[order][1:] < stop[order][:-1] - half_frame))
    if len(overlap):
        one, other = numbers[order][overlap[0]], numbers[order][overlap[0] + 1]
        raise DatasetError(f"{where} overlap for episodes {one} and {other}, in the same file; {remedy}")
    return VideoSpans(chunk, file, start)
