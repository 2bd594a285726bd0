"""LeRobot v3.0 datasets: what the meta files say, and frames with their action chunks as a random-access source.

The only module that imports lerobot and torch, and only inside the functions that need them: meta and table files are
read without.
"""

import importlib.metadata
import inspect
import json
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants
from tqdm import tqdm

from wallx_jax import hub, vectors
from wallx_jax.vectors import Slice


@dataclass(frozen=True, eq=False)
class DatasetInfo:
    """What a dataset's meta folder says. `features` is info.json's: {key: {"dtype", "shape", "names"}}.

    episode_lengths: int64 [num_episodes] frames; episode e starts at frame `episode_starts[e]`.
    tasks: the instructions, by task_index.
    """

    repo_id: str
    root: Path
    fps: float
    num_episodes: int
    num_frames: int
    robot_type: str | None
    features: dict[str, dict[str, Any]]
    camera_keys: tuple[str, ...]
    tasks: list[str]
    episode_lengths: np.ndarray

    @property
    def episode_starts(self) -> np.ndarray:
        """int64 [num_episodes]: index of each episode's first frame."""
        return np.cumsum(self.episode_lengths) - self.episode_lengths

    def parts(self, vector: str) -> tuple[Slice, ...]:
        """Where the dims of a state or action are found; `vector` as in wallx_jax.vectors.

        Raises:
            ValueError: the dataset has no such dims; lists the vectors that it has.
        """
        try:
            return vectors.locate(vector, self.features)
        except ValueError as error:
            raise ValueError(f"{self.repo_id}: {error}; it has {list(vectors.widths(self.features))}") from None

    def dims(self, vector: str) -> int:
        """Width of a state or action."""
        return sum(part.stop - part.start for part in self.parts(vector))

    def dim_names(self, vector: str) -> list[str]:
        """What the dataset calls the dims of a state or action; else numbers."""
        self.parts(vector)
        return vectors.dim_names(vector, self.features)

    def frame_size(self, camera: str) -> tuple[int, int]:
        """(height, width) in pixels of a camera's frames."""
        if camera not in self.camera_keys:
            raise ValueError(f"{self.repo_id} has no camera {camera!r}; it has {list(self.camera_keys)}")
        feature = self.features[camera]
        shape, names = tuple(feature["shape"]), list(feature.get("names") or ())
        if names and "height" in names and "width" in names:
            return shape[names.index("height")], shape[names.index("width")]
        return shape[1:] if shape[0] == 3 else shape[:2]


def read_info(repo_id_or_path: str | Path, revision: str | None = None, download_videos: bool = True) -> DatasetInfo:
    """Reads the meta files of a LeRobot v3.0 dataset, without lerobot.

    Args:
        repo_id_or_path: a local folder, or a hub repo id (looked up in lerobot's and the hub's cache, then downloaded).
        revision: git revision on the hub.
        download_videos: when downloading, also fetch the videos.

    Raises:
        FileNotFoundError: in one line, if it is nowhere to be found or the folder is no LeRobot dataset.
        ValueError: for another format version (with the command that converts it), or meta files that contradict.
    """
    root = Path(repo_id_or_path).expanduser()
    local = root.is_dir()
    repo_id = root.resolve().name if local else str(repo_id_or_path)
    if not local:
        root = _find_repo(repo_id, revision, download_videos)
    info_file = root / "meta" / "info.json"
    if not info_file.is_file():
        raise FileNotFoundError(f"{root} is not a LeRobot dataset: it has no meta/info.json")
    info = json.loads(info_file.read_text())
    version = str(info.get("codebase_version", "unknown"))
    if version.lstrip("v").split(".")[0] in ("1", "2"):
        command = _conversion_command(repo_id, root if local else None)
        raise ValueError(f"{repo_id} is in LeRobot format {version}; convert it to v3.0 with: {command}")
    if not version.startswith("v3."):
        raise ValueError(f"{repo_id} is in LeRobot format {version}; this package reads v3.0")

    tasks = _read_tables([root / "meta" / "tasks.parquet"])
    text = next(name for name in tasks.column_names if name != "task_index")
    tasks = tasks.sort_by("task_index")[text].to_pylist()
    episodes = _read_tables(sorted((root / "meta" / "episodes").glob("*/*.parquet")) or [root / "meta" / "episodes"],
                            ["episode_index", "length"]).sort_by("episode_index")  # fmt: skip
    lengths = episodes["length"].to_numpy().astype(np.int64)
    if len(lengths) != info["total_episodes"] or lengths.sum() != info["total_frames"]:
        raise ValueError(
            f"{repo_id}: meta/info.json counts {info['total_episodes']} episodes and {info['total_frames']} frames, "
            f"meta/episodes {len(lengths)} and {lengths.sum()}; the dataset is not complete, copy it again"
        )
    features = info["features"]
    cameras = tuple(key for key, feature in features.items() if feature["dtype"] in ("image", "video"))
    return DatasetInfo(repo_id, root, info["fps"], len(lengths), int(lengths.sum()), info.get("robot_type"), features,
                       cameras, tasks, lengths)  # fmt: skip


def _find_repo(repo_id: str, revision: str | None, download_videos: bool) -> Path:
    """lerobot's own cache, where `lerobot-record` writes, then the hub's cache, then the hub."""
    home = Path(os.environ.get("HF_LEROBOT_HOME", Path(constants.HF_HOME) / "lerobot")).expanduser()
    if revision is None and (home / repo_id / "meta" / "info.json").is_file():
        return home / repo_id
    patterns = None if download_videos else ["meta/*", "data/*"]
    try:
        return hub.resolve(repo_id, kind="dataset", revision=revision, patterns=patterns)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (lerobot's cache {home} has no {repo_id} either)") from None


def _conversion_command(repo_id: str, root: Path | None) -> str:
    """What to type to convert a v2.1 dataset with the installed lerobot: the module moved in 0.5, and --root then
    became the dataset's folder instead of the one around it."""
    try:
        moved = importlib.metadata.version("lerobot").split(".")[:2] > ["0", "4"]
    except importlib.metadata.PackageNotFoundError:
        moved = True
    module = "lerobot.scripts" if moved else "lerobot.datasets.v30"
    folder = "" if root is None else f" --root={root.resolve() if moved else root.resolve().parent}"
    return f"python -m {module}.convert_dataset_v21_to_v30 --repo-id={repo_id}{folder} --push-to-hub=false"


def read_columns(info: DatasetInfo, keys: Sequence[str], progress: bool = False) -> list[np.ndarray]:
    """Whole columns of data/chunk-*/file-*.parquet in frame order: [N, D] for vectors (wallx_jax.vectors), [N] for
    lerobot's own, "episode_index" and the like. One file is in memory at a time, beside what it gave.

    Args:
        progress: show a bar over the files.

    Raises:
        FileNotFoundError, ValueError: if files are missing or hold other than `info.num_frames` frames.
    """
    parts = {key: (Slice(key),) if key in vectors.BOOKKEEPING else info.parts(key) for key in keys}
    features = list(dict.fromkeys(part.feature for found in parts.values() for part in found))
    files = sorted((info.root / "data").glob("*/*.parquet")) or [info.root / "data"]
    columns: dict[str, np.ndarray] = {}
    seen, count = np.zeros(info.num_frames, bool), 0
    for file in tqdm(files, desc=f"reading {info.repo_id}", unit="file", disable=not progress):
        table = _read_table(file, ["index", *features])
        index = table["index"].to_numpy()
        count += len(index)
        if index.max(initial=0) >= info.num_frames:
            continue
        seen[index] = True
        read = {feature: _to_numpy(table[feature]) for feature in features}
        for key, found in parts.items():
            values = _concatenate(found, read.__getitem__)
            if key in vectors.BOOKKEEPING:
                values = values[:, 0]
            if key not in columns:
                columns[key] = np.empty((info.num_frames, *values.shape[1:]), values.dtype)
            columns[key][index] = values
    if count != info.num_frames or not seen.all():
        raise ValueError(
            f"{info.repo_id}: data/ holds {count} frames, meta/ counts {info.num_frames}; "
            "the dataset is not complete, copy it again"
        )
    return [columns[key] for key in keys]


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """[n] or, for a feature of several dims, [n, D]."""
    values = column.combine_chunks()
    if pa.types.is_nested(values.type):
        return values.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return values.to_numpy(zero_copy_only=False)


def _concatenate(parts: Sequence[Slice], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """[n, D]: the parts of a vector side by side; `read` gives a feature's values [n, dims], or [n] where it has one
    dim, as lerobot stores it."""
    values = [read(part.feature) for part in parts]
    columns = [x.reshape(len(x), -1)[:, part.start : part.stop] for x, part in zip(values, parts, strict=True)]
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def read_episodes(info: DatasetInfo, keys: Sequence[str]) -> list[np.ndarray]:
    """Columns [num_episodes] of meta/episodes, in episode order."""
    files = sorted((info.root / "meta" / "episodes").glob("*/*.parquet"))
    table = _read_tables(files, ["episode_index", *keys]).sort_by("episode_index")
    return [table[key].to_numpy() for key in keys]


def _read_tables(files: Sequence[Path], columns: list[str] | None = None) -> pa.Table:
    """Reads and joins parquet files."""
    return pa.concat_tables([_read_table(file, columns) for file in files], promote_options="permissive")


def _read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a parquet file; names it if it is missing or broken."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the dataset is not complete, copy it again")
    try:
        table = pq.ParquetFile(file).read(columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy the dataset again") from error
    if columns and (missing := set(columns) - set(table.column_names)):
        raise ValueError(f"{file} lacks columns {sorted(missing)}; it has {table.column_names}")
    return table


@dataclass(frozen=True, eq=False)
class RawSample:
    """One frame as recorded: uint8 RGB [H, W, 3] per camera in the configured order, state float32 [D], the next
    actions float32 [A, D] starting with this frame's, action_is_pad bool [A] (True past the episode's end, where the
    last action repeats), the instruction, the episode and the frame's place in it. NaN values are kept. `resized`: the
    images have the model's size already (data.cache)."""

    images: tuple[np.ndarray, ...]
    state: np.ndarray
    actions: np.ndarray
    action_is_pad: np.ndarray
    instruction: str
    episode: int
    frame: int
    resized: bool = False


class LeRobotSource:
    """Random access to the frames of a split (a Grain RandomAccessDataSource). Opens its files on first use and is
    pickled without them, so every worker process has its own.

    Args:
        info: the dataset.
        horizon: A, actions per sample, one per frame.
        cameras: camera keys, in the order the prompt names them.
        state_key, action_key: vectors, see wallx_jax.vectors.
        frames: indices of the split's frames; None for all.
        video_backend: lerobot's name of the decoder. torchcodec is faster but needs the system's FFmpeg libraries.

    Raises:
        ValueError: if a key is not in the dataset, listing what it offers, or a frame is out of range.
    """

    def __init__(
        self,
        info: DatasetInfo,
        horizon: int,
        cameras: Sequence[str],
        state_key: str = "observation.state",
        action_key: str = "action",
        frames: np.ndarray | None = None,
        video_backend: str = "pyav",
    ):
        for camera in cameras:
            info.frame_size(camera)
        self.state_parts, self.action_parts = info.parts(state_key), info.parts(action_key)
        self.info, self.horizon, self.cameras = info, horizon, tuple(cameras)
        self.state_key, self.action_key, self.video_backend = state_key, action_key, video_backend
        self.frames = np.arange(info.num_frames) if frames is None else np.asarray(frames, np.int64)
        if len(self.frames) and not 0 <= self.frames.min() <= self.frames.max() < info.num_frames:
            first, last = self.frames.min(), self.frames.max()
            raise ValueError(f"{info.repo_id}: frames {first}..{last} asked for, but it has {info.num_frames}")
        self._clear()

    def _clear(self) -> None:
        self._dataset, self._columns, self._lock = None, None, threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_dataset", "_columns", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def __repr__(self) -> str:
        return f"LeRobotSource({self.info.repo_id}, {len(self)} frames, horizon {self.horizon}, cameras {self.cameras})"

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> RawSample:
        """The i-th frame of the split, with images.

        Raises:
            RuntimeError: naming dataset, episode and frame, if it cannot be read or decoded.
        """
        index, episode, frame = map(int, self.locate(i))
        dataset, ahead = self._open(), self.action_features
        try:
            item = dataset[index]
            images = tuple(to_uint8(item[camera]) for camera in self.cameras)
        except Exception as error:
            raise RuntimeError(
                f"{self.info.repo_id}: episode {episode}, frame {frame} (index {index}) cannot be read from "
                f"{self.info.root}: {type(error).__name__}: {error}"
            ) from error

        def now(feature: str) -> np.ndarray:
            values = item[feature].numpy()
            return values[:1] if feature in ahead else values[None]

        return RawSample(
            images,
            _concatenate(self.state_parts, now)[0].astype(np.float32),
            _concatenate(self.action_parts, lambda feature: item[feature].numpy()).astype(np.float32),
            item[f"{ahead[0]}_is_pad"].numpy(),
            item["task"],
            episode,
            frame,
        )

    @property
    def action_features(self) -> tuple[str, ...]:
        """The dataset's features that actions are made of."""
        return tuple(dict.fromkeys(part.feature for part in self.action_parts))

    def low_dim(self, i: int) -> RawSample:
        """The same without images (an empty tuple): from the table files alone, nothing is decoded."""
        states, actions, task = self._table()
        index, episode, frame = map(int, self.locate(i))
        ahead = index + np.arange(self.horizon)
        end = index - frame + self.info.episode_lengths[episode]
        return RawSample(
            (),
            states[index].astype(np.float32),
            actions[np.minimum(ahead, end - 1)].astype(np.float32),
            ahead >= end,
            self.info.tasks[task[index]],
            episode,
            frame,
        )

    def locate(self, places: Any) -> tuple[Any, Any, Any]:
        """Places in the split, one or an int array -> (frame index in the dataset, episode, frame in the episode)."""
        index = self.frames[places]
        starts = self.info.episode_starts
        episode = np.searchsorted(starts, index, side="right") - 1
        return index, episode, index - starts[episode]

    def actions_at(self, indices: np.ndarray) -> np.ndarray:
        """float32 [n, D]: the recorded actions of frames of the dataset (not of the split)."""
        return self._table()[1][indices].astype(np.float32)

    def _table(self) -> list[np.ndarray]:
        """Columns of the table files, read once: states, actions, task numbers."""
        with self._lock:
            if self._columns is None:
                self._columns = read_columns(self.info, [self.state_key, self.action_key, "task_index"])
            return self._columns

    def _open(self) -> Any:
        with self._lock:
            if self._dataset is None:
                self._dataset = _open_dataset(self)
            return self._dataset


class DatasetOpenError(RuntimeError):
    """lerobot does not open the dataset: no frame of it can be read."""


def _open_dataset(source: LeRobotSource) -> Any:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    # lerobot's "pyav" reads through torchvision, which announces its retirement at every start.
    warnings.filterwarnings("ignore", message="The video decoding and encoding capabilities of torchvision")
    options = inspect.signature(LeRobotDataset.__init__).parameters
    # Newer releases can hand out the decoded bytes; converting whole frames to float32 costs more than decoding them.
    raw = {"return_uint8": True} if "return_uint8" in options else {}
    info = source.info
    try:
        return LeRobotDataset(
            info.repo_id,
            root=info.root,
            delta_timestamps={
                feature: [step / info.fps for step in range(source.horizon)] for feature in source.action_features
            },
            video_backend=source.video_backend,
            **raw,
        )
    except Exception as error:
        raise DatasetOpenError(
            f"lerobot cannot open {info.repo_id} at {info.root} (are all files of data/ and videos/ there?): "
            f"{type(error).__name__}: {error}"
        ) from error


def to_uint8(image: Any) -> np.ndarray:
    """lerobot's CHW tensor, uint8 or float32 in [0, 1], -> the uint8 [H, W, 3] that was decoded.

    lerobot divides bytes by 255 in float32; multiplying by 255 and rounding gives every byte back.
    """
    import torch

    if image.dtype != torch.uint8:
        image = image.mul(255).round_().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().numpy()


def use_one_thread(worker: int, workers: int) -> None:
    """Start of a Grain worker process: torch would otherwise run as many threads as there are cores in each."""
    import torch

    torch.set_num_threads(1)


def torch_permutation(n: int, seed: int) -> np.ndarray:
    """The permutation that torch's random_split draws for this seed: int64 [n]."""
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
