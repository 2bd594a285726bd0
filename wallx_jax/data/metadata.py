"""Reads the meta folder of a LeRobot v3.0 dataset: episodes, instructions, features and the location of its files."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from packaging.version import Version

from wallx_jax.config import feature_slices, ranges
from wallx_jax.config.feature_slices import Slice
from wallx_jax.data.episodes import read_episodes, read_listed_tasks
from wallx_jax.data.errors import DatasetError
from wallx_jax.data.info_json import read_info_json
from wallx_jax.data.tasks import read_tasks
from wallx_jax.utils import hub

NEWEST = Version("3.0")  # newest dataset format that this package reads


@dataclass(frozen=True, eq=False)
class DatasetInfo:
    """Metadata of a dataset, for all of its episodes or for a selection.

    Frames are numbered from 0 to num_frames - 1 through the episodes in the order of `episode_index`; a `frame`
    argument is always this number. In the tables a frame's `index` is `first_indices[episode] + frame_index`.

    Attributes:
        repo_id: hub repo id, or the name of the local folder.
        root: the dataset's folder.
        fps: frames per second.
        features: {key: {"dtype", "shape", "names"}}, as in meta/info.json.
        tasks: {task_index: instruction}.
        episode_numbers: int64 [E], `episode_index` of each episode, ascending.
        episode_lengths: int64 [E], frames of each episode.
        first_indices: int64 [E], `index` of each episode's first frame in the tables.
        data_path: path template of a table file below root, with {chunk_index} and {file_index}.
        video_path: path template of a video file below root, with {video_key} as well; None without videos.
        whole: whether all of the dataset's episodes are included.
        listed_tasks: int64 [n, 2], pairs (`episode_index`, `task_index`) of the instructions listed in meta/episodes.
        commit: hub commit from which missing files are fetched; None for a local folder.
    """

    repo_id: str
    root: Path
    fps: float
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    episode_numbers: np.ndarray
    episode_lengths: np.ndarray
    first_indices: np.ndarray
    data_path: str
    video_path: str | None = None
    whole: bool = True
    listed_tasks: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int64))
    commit: str | None = None

    @property
    def num_episodes(self) -> int:
        return len(self.episode_numbers)

    @functools.cached_property
    def num_frames(self) -> int:
        return int(self.episode_lengths.sum())

    @functools.cached_property
    def episode_starts(self) -> np.ndarray:
        """First frame of each episode, int64 [E]."""
        return np.cumsum(self.episode_lengths) - self.episode_lengths

    def locate(self, frames: Any) -> tuple[Any, Any]:
        """Locate frames in their episodes.

        Args:
            frames: one frame or int [n].

        Returns:
            The episode (0 to E - 1) and the frame's index within it (`frame_index`), each shaped like `frames`.
        """
        starts = self.episode_starts
        episodes = np.searchsorted(starts, frames, side="right") - 1
        return episodes, frames - starts[episodes]

    def start_of(self, number: Any) -> Any:
        """Return the first frame of the episode with this `episode_index`, one or int [n]."""
        return self.episode_starts[np.searchsorted(self.episode_numbers, number)]

    def frames_of(self, number: int) -> np.ndarray:
        """Return the frames of the episode with this `episode_index`, int64 [length]."""
        length = self.episode_lengths[np.searchsorted(self.episode_numbers, number)]
        return self.start_of(number) + np.arange(length)

    def describe(self, frame: int) -> str:
        """Return the name of a frame for messages."""
        episode, place = self.locate(frame)
        return f"episode {self.episode_numbers[episode]}, frame {place}"

    @property
    def camera_keys(self) -> tuple[str, ...]:
        return tuple(key for key, feature in self.features.items() if feature["dtype"] in ("image", "video"))

    def is_video(self, camera: str) -> bool:
        """Return whether a camera's frames are stored in video files rather than as images in the tables."""
        return self.features[camera]["dtype"] == "video"

    def check_camera(self, camera: str) -> None:
        """Check that a camera exists and records color.

        Raises:
            ValueError: if there is no such camera, or if it records depth maps.
        """
        if camera not in self.camera_keys:
            raise ValueError(f"{self.repo_id} has no camera {camera!r}; it has {list(self.camera_keys)}")
        if is_depth(self.features[camera]):
            raise ValueError(f"{self.repo_id}: camera {camera!r} holds depth maps; choose a color camera")

    def frame_size(self, camera: str) -> tuple[int, int]:
        """Return (height, width) of a camera's frames in pixels.

        Raises:
            ValueError: see `check_camera`.
        """
        self.check_camera(camera)
        shape, names = self.features[camera]["shape"], list(self.features[camera].get("names") or ())
        if len(names) == len(shape) and {"height", "width"} <= set(names):
            return shape[names.index("height")], shape[names.index("width")]
        channels_first = len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
        return tuple(shape[1:]) if channels_first else tuple(shape[:2])

    def parts(self, vector: str) -> tuple[Slice, ...]:
        """Return the feature slices of a state or action.

        Args:
            vector: feature slices as text, see wallx_jax.config.feature_slices.

        Raises:
            ValueError: if the dataset has no such dims; the message lists the vectors it has.
        """
        try:
            return feature_slices.locate(vector, self.features)
        except ValueError as error:
            raise ValueError(f"{self.repo_id}: {error}; it has {list(feature_slices.widths(self.features))}") from None

    def dims(self, vector: str) -> int:
        """Return the number of dims of a state or action."""
        return sum(part.stop - part.start for part in self.parts(vector))

    def dim_names(self, vector: str) -> list[str]:
        """Return the dataset's names for the dims of a state or action; a dim without a name gets its number."""
        self.parts(vector)
        return feature_slices.dim_names(vector, self.features)

    def data_file(self, chunk: int, file: int) -> str:
        """Return the path of a table file below the dataset's folder."""
        return self.data_path.format(chunk_index=chunk, file_index=file)

    def video_file(self, camera: str, chunk: int, file: int) -> str:
        """Return the path of a video file below the dataset's folder.

        Raises:
            ValueError: if the dataset has no videos.
        """
        if self.video_path is None:
            raise ValueError(f"{self.repo_id} has no videos: meta/info.json has no video_path")
        return self.video_path.format(video_key=camera, chunk_index=chunk, file_index=file)


def is_depth(feature: Mapping[str, Any]) -> bool:
    """Return whether a camera records depth; lerobot has used three different places to mark this over time."""
    info, video_info = feature.get("info") or {}, feature.get("video_info") or {}
    marks = (info.get("is_depth_map"), info.get("video.is_depth_map"), video_info.get("video.is_depth_map"))
    return any(mark is True for mark in marks)


def read_info(repo_id_or_path: str | Path, revision: str | None = None, episodes: str | None = None) -> DatasetInfo:
    """Read and check the metadata of a LeRobot v3.0 dataset.

    Args:
        repo_id_or_path: a local folder or a hub repo id. A repo id is looked up in lerobot's cache, in the hub's cache
            and then on the hub. Only the meta folder of a hub dataset is fetched; see `data.fetch`.
        revision: git revision on the hub; None for the newest tag that this package reads.
        episodes: which episodes to use, e.g. "0:50,60"; None for all.

    Raises:
        FileNotFoundError: with a one-line message, if the dataset is not found or the folder is not a LeRobot dataset.
        DatasetError: for another format version (with the command that converts it), damaged files, or metadata that
            contradicts itself.
    """
    root = Path(repo_id_or_path).expanduser()
    repo_id, commit = root.resolve().name, None
    if not root.is_dir():
        repo_id = str(repo_id_or_path)
        root, commit = _find_repo(repo_id, revision)
    if not (root / "meta" / "info.json").is_file():
        raise FileNotFoundError(f"{root} is not a LeRobot dataset: it has no meta/info.json")
    info = read_info_json(root / "meta" / "info.json", repo_id, local=commit is None)
    table, tasks = read_episodes(root, repo_id, info), read_tasks(root / "meta" / "tasks.parquet")
    selected = np.ones(len(table["episode_index"]), bool)
    if episodes is not None:
        try:
            selected = ranges.select(episodes, table["episode_index"])
        except ValueError as error:
            raise DatasetError(f"{repo_id}: episodes = {episodes!r}: {error}") from None
    return DatasetInfo(
        repo_id=repo_id,
        root=root,
        fps=info["fps"],
        features=info["features"],
        tasks=tasks,
        listed_tasks=read_listed_tasks(root, tasks),
        episode_numbers=table["episode_index"][selected],
        episode_lengths=table["length"][selected],
        first_indices=table["dataset_from_index"][selected],
        data_path=info["data_path"],
        video_path=info.get("video_path"),
        whole=bool(selected.all()),
        commit=commit,
    )


def _find_repo(repo_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Find a dataset in lerobot's own cache, where `lerobot-record` writes, then in the hub's cache, then on the hub.

    Returns:
        The dataset's folder with the meta files, and the commit if it comes from the hub.
    """
    home = Path(os.environ.get("HF_LEROBOT_HOME", Path(constants.HF_HOME) / "lerobot")).expanduser()
    if revision is None and (home / repo_id / "meta" / "info.json").is_file():
        return home / repo_id, None
    try:
        if revision is None and hub.may_be_repo(repo_id, "dataset"):
            revision = hub.newest_version(repo_id, "dataset", NEWEST)
        root = hub.resolve(repo_id, kind="dataset", revision=revision, patterns=["meta/*"])
    except FileNotFoundError as error:
        if not hub.REPO_ID.fullmatch(repo_id):
            raise
        raise FileNotFoundError(f"{error} (lerobot's cache {home} has no {repo_id} either)") from None
    return root, root.name  # the hub's cache names a snapshot's folder after its commit
