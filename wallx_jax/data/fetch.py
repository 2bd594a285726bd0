"""List the dataset files that a run reads, and fetch the missing ones from the hub."""

from collections.abc import Sequence

import numpy as np

from wallx_jax.data.episodes import read_episode_columns
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.spans import read_spans
from wallx_jax.utils import hub


def fetch(info: DatasetInfo, cameras: Sequence[str] = (), first_only: bool = False) -> None:
    """Fetch missing files of a hub dataset: tables of the used episodes and videos of the given cameras.

    Does nothing for a local dataset.

    Args:
        info: the dataset.
        cameras: camera keys; a camera whose images are in the tables needs no further files.
        first_only: fetch only the video with the first episode for each camera.

    Raises:
        FileNotFoundError: a file cannot be fetched.
        DatasetError: the metadata does not locate an episode.
    """
    if info.commit is None:
        return
    names = [*data_files(info), *(name for camera in cameras for name in video_files(info, camera, first_only))]
    if missing := [name for name in names if not (info.root / name).is_file()]:
        hub.fetch_files(info.repo_id, "dataset", info.commit, missing)


def data_files(info: DatasetInfo) -> list[str]:
    """List the table files of the used episodes, as paths relative to the dataset's folder."""
    columns = ["data/chunk_index", "data/file_index"]
    table = read_episode_columns(info.root, columns)
    rows = np.isin(table["episode_index"], info.episode_numbers)
    pairs = zip(*(table[column][rows].tolist() for column in columns), strict=True)
    return [info.data_file(chunk, file) for chunk, file in sorted(set(pairs))]


def video_files(info: DatasetInfo, camera: str, first_only: bool = False) -> list[str]:
    """List the video files of the used episodes, relative to the dataset's folder; none for images in the tables."""
    if not info.is_video(camera):
        return []
    spans = read_spans(info, camera)
    count = 1 if first_only else info.num_episodes
    pairs = zip(spans.chunk[:count].tolist(), spans.file[:count].tolist(), strict=True)
    return [info.video_file(camera, chunk, file) for chunk, file in sorted(set(pairs))]
