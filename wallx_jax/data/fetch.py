"""The files that a run reads of a dataset: which they are, and fetching those that are missing."""

from collections.abc import Sequence

import numpy as np

from wallx_jax.data.episodes import read_episode_columns
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.spans import read_spans
from wallx_jax.utils import hub


def fetch(info: DatasetInfo, cameras: Sequence[str] = (), first_only: bool = False) -> None:
    """Fetches what is missing of a hub dataset: the tables of the used episodes and the videos of the named cameras.

    Nothing happens for a local dataset.

    Args:
        cameras: keys; cameras whose images are in the tables need nothing more.
        first_only: of each camera only the video with the first episode.

    Raises:
        FileNotFoundError: a file cannot be fetched.
        DatasetError: the metadata does not say where an episode is.
    """
    if info.commit is None:
        return
    names = [*data_files(info), *(name for camera in cameras for name in video_files(info, camera, first_only))]
    if missing := [name for name in names if not (info.root / name).is_file()]:
        hub.fetch_files(info.repo_id, "dataset", info.commit, missing)


def data_files(info: DatasetInfo) -> list[str]:
    """Lists the table files of the used episodes, as paths below the dataset's folder."""
    columns = ["data/chunk_index", "data/file_index"]
    table = read_episode_columns(info.root, columns)
    rows = np.isin(table["episode_index"], info.episode_numbers)
    pairs = zip(*(table[column][rows].tolist() for column in columns), strict=True)
    return [info.data_file(chunk, file) for chunk, file in sorted(set(pairs))]


def video_files(info: DatasetInfo, camera: str, first_only: bool = False) -> list[str]:
    """Lists the video files of the used episodes, as paths below the dataset's folder; none for embedded images."""
    if not info.is_video(camera):
        return []
    spans = read_spans(info, camera)
    count = 1 if first_only else info.num_episodes
    pairs = zip(spans.chunk[:count].tolist(), spans.file[:count].tolist(), strict=True)
    return [info.video_file(camera, chunk, file) for chunk, file in sorted(set(pairs))]
