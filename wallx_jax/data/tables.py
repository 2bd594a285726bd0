"""Maps the rows of a dataset's table files to frames and exposes their values as memory-mapped arrays.

Rows are identified by `episode_index` and `frame_index`, regardless of their position.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wallx_jax.config.feature_slices import Slice
from wallx_jax.data import parquet
from wallx_jax.data.errors import DatasetError
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.utils.temporary import ScratchFolder

KEYS = ("episode_index", "frame_index", "index", "task_index")
REPAIR = "repair the dataset or write it again"


class FrameTable:
    """State, action and task of every frame.

    A table file is converted when one of its frames is first requested: its columns are copied, in frame order, to
    arrays in a temporary folder that all processes map into memory. A pickled copy reads and fills the same arrays, so
    data workers share one copy of the tables.

    Args:
        info: the dataset.
        state: feature slices of the state (`DatasetInfo.parts`).
        action: feature slices of the action.
        check_times: whether a frame's timestamp must correspond to its `frame_index`, as videos require.

    Attributes:
        state: float or int [N, D of the state], in dataset units; valid for the frames that `load` has loaded.
        action: float or int [N, D of the action], likewise.
        task: int64 [N], `task_index`, likewise.
        row: int64 [N], row in the table file, likewise.
        files: the table files that contain frames.
        tasks_used: every `task_index` that occurs in the frames.
        unreadable: uint8 [N], 1 for frames passed to `mark_unreadable` in any process.

    Raises:
        FileNotFoundError: see `parquet.open_parquet`.
        DatasetError: if the rows are not exactly the frames that meta/episodes lists.
    """

    def __init__(self, info: DatasetInfo, state: Sequence[Slice], action: Sequence[Slice], check_times: bool = False):
        self.info, self._state, self._action = info, tuple(state), tuple(action)
        self._check_times = check_times
        self._listed_tasks = _TaskLists(info)
        self.files, self._file_of_episode, self.tasks_used = self._find_rows()
        self._scratch: ScratchFolder | None = None
        self._folder: Path | None = None
        self._arrays: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        self._prepare()  # once, for all copies
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_scratch": None, "_arrays": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def state(self) -> np.ndarray:
        return self._map("state")

    @property
    def action(self) -> np.ndarray:
        return self._map("action")

    @property
    def task(self) -> np.ndarray:
        return self._map("task")[:, 0]

    @property
    def row(self) -> np.ndarray:
        return self._map("row")[:, 0]

    @property
    def unreadable(self) -> np.ndarray:
        return self._map("unreadable")[:, 0]

    def mark_unreadable(self, frame: int) -> None:
        """Mark a frame as unreadable, visibly to all processes."""
        self._write("unreadable", np.array([frame]), np.ones((1, 1), np.uint8))

    def file_of(self, frame: int) -> Path:
        """Return the table file that contains a frame."""
        return self.files[self._file_of_episode[self.info.locate(frame)[0]]]

    def runs(self) -> Iterator[np.ndarray]:
        """Yield the frames of each table file in the order of the dataset, int [n]."""
        starts, lengths = self.info.episode_starts, self.info.episode_lengths
        for number in range(len(self.files)):
            episodes = np.flatnonzero(self._file_of_episode == number)
            yield np.concatenate([starts[e] + np.arange(lengths[e]) for e in episodes])

    def load(self, frames: Any = None, progress: bool = False) -> None:
        """Load frames, so that the array attributes are valid for them.

        Args:
            frames: one frame or int [n]; None for all.
            progress: show a progress bar over the files.

        Raises:
            DatasetError: for nulls, rows of another width, or numbers of another type.
            OSError: if the temporary directory is full.
        """
        done = self._map("done")[:, 0]
        wanted = range(len(self.files)) if frames is None else self._file_of_episode[self.info.locate(frames)[0]]
        missing = [int(number) for number in np.unique(wanted) if not done[number]]
        if not missing:
            return
        bar = tqdm(total=len(missing), desc=f"reading {self.info.repo_id}", unit="file", disable=not progress)
        with bar, ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._convert, missing):
                bar.update()

    def read(self, column: str) -> np.ndarray:
        """Read a column of scalars that is not one of the attributes, float64 [N]."""
        values = np.empty(self.info.num_frames)
        for path in self.files:
            frames = self._frames_of(path)
            read = parquet.matrix(parquet.read_columns(path, [column]), column, path, 1, np.dtype(np.float64))[:, 0]
            values[frames[frames >= 0]] = read[frames >= 0]
        return values

    def _find_rows(self) -> tuple[list[Path], np.ndarray, set[int]]:
        """Find the table file of each episode, checking the keys of every row.

        Returns:
            The table files that contain frames, the index of each episode's file int32 [E], and the tasks in use.
        """
        info = self.info
        paths = [path for path in _files_of(info.root, info.data_path) if _may_hold(path, info)]
        files: list[Path] = []
        tasks_used: set[int] = set()
        file_of_episode = np.full(info.num_episodes, -1, np.int32)
        seen = np.zeros(info.num_frames, bool)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for path, (frames, tasks) in zip(paths, pool.map(self._read_keys, paths), strict=True):
                tasks_used.update(tasks.tolist())
                frames = frames[frames >= 0]
                if not (np.diff(frames) > 0).all():
                    frames = np.sort(frames)
                if (twice := frames[seen[frames] | (np.diff(frames, append=-1) == 0)]).size:
                    raise DatasetError(
                        f"{path}: {len(twice)} frames are in more than one row, the first is "
                        f"{info.describe(twice[0])}; {REPAIR}"
                    )
                seen[frames] = True
                episodes = _distinct(info.locate(frames)[0], info.num_episodes)
                if (split := episodes[file_of_episode[episodes] >= 0]).size:
                    number, other = info.episode_numbers[split[0]], files[file_of_episode[split[0]]]
                    raise DatasetError(f"{path}: some rows of episode {number} are in {other}; {REPAIR}")
                if len(frames):
                    file_of_episode[episodes] = len(files)
                    files.append(path)
        if (missing := np.flatnonzero(~seen)).size:
            raise DatasetError(
                f"{info.root / 'data'} lacks {len(missing)} of the {info.num_frames} frames that meta/episodes counts, "
                f"the first is {info.describe(missing[0])}; the dataset is not complete, copy it again"
            )
        return files, file_of_episode, tasks_used

    def _frames_of(self, path: Path) -> np.ndarray:
        """Return the frame in each row of a file, int64 [n]; -1 where its episode is not used."""
        return self._read_keys(path)[0]

    def _read_keys(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Read and check the keys of a table file.

        Returns:
            The frame in each row, int64 [n], -1 where its episode is not used; and the tasks of the rows in use, int64
            [tasks].

        Raises:
            DatasetError: if keys contradict each other or the metadata.
        """
        info = self.info
        columns, optional = ([*KEYS, "timestamp"], []) if self._check_times else (KEYS, ["timestamp"])
        table = parquet.read_columns(path, columns, optional)
        number, place, index, task = (parquet.integers(table, key, path) for key in KEYS)
        # Rows of an episode are mostly adjacent, so per-episode values are looked up once per run of rows.
        runs = np.flatnonzero(np.r_[len(number) > 0, np.diff(number) != 0])
        counts = np.diff(runs, append=len(number))
        episode = np.minimum(np.searchsorted(info.episode_numbers, number[runs]), info.num_episodes - 1)

        def of_rows(of_episodes: np.ndarray) -> np.ndarray:
            return np.repeat(of_episodes[episode], counts)

        used = of_rows(info.episode_numbers) == number

        def refuse(wrong: np.ndarray, column: str, values: np.ndarray, what: str) -> None:
            if (rows := np.flatnonzero(wrong & used)).size:
                row = rows[0]
                raise DatasetError(
                    f"{path}: column {column!r} is not {what} in {len(rows)} of {len(used)} rows, the first is row "
                    f"{row} (episode {number[row]}, frame {place[row]}): {values[row]}; {REPAIR}"
                )

        if info.whole and not used.all():
            strangers = ", ".join(map(str, np.unique(number[~used])[:5]))
            raise DatasetError(
                f"{path}: {int((~used).sum())} rows are of episodes that meta/episodes does not have (episode_index "
                f"{strangers}); {REPAIR}"
            )
        outside = (place < 0) | (place >= of_rows(info.episode_lengths))
        refuse(outside, "frame_index", place, "within the length of the episode")
        expected = of_rows(info.first_indices) + place
        refuse(index != expected, "index", index, "dataset_from_index of meta/episodes + frame_index")
        refuse(~np.isin(task, list(info.tasks)), "task_index", task, "one of meta/tasks.parquet")
        contradicts = self._listed_tasks.contradict(number, task)
        refuse(contradicts, "task_index", task, "among the tasks that meta/episodes lists for its episode")
        time = np.zeros(len(place))
        if "timestamp" in table.column_names:
            time = parquet.matrix(table, "timestamp", path, 1, np.dtype(np.float64))[:, 0]
        if self._check_times:
            off = ~(abs(time - place / info.fps) < 0.5 / info.fps)  # written so that NaN counts as off
            refuse(off, "timestamp", time, f"frame_index / {info.fps:g} fps, its time in the video,")
        else:
            order = np.lexsort((place, number))
            back = np.zeros(len(time), bool)
            back[order[1:]] = (np.diff(time[order]) < 0) & (np.diff(number[order]) == 0)
            refuse(back, "timestamp", time, "at or after that of the frame before")
        return np.where(used, of_rows(info.episode_starts) + place, -1), np.unique(task[used])

    def _convert(self, number: int) -> None:
        """Copy the columns of a table file to the arrays."""
        path, info = self.files[number], self.info
        frames = self._frames_of(path)
        rows = np.flatnonzero(frames >= 0)
        rows = rows[np.argsort(frames[rows], kind="stable")]
        features = list(dict.fromkeys(part.feature for part in (*self._state, *self._action)))
        table = parquet.read_columns(path, [*features, "task_index"])

        def describe_row(row: int) -> str:
            return f"row {row}" + (f" ({info.describe(frames[row])})" if frames[row] >= 0 else "")

        values = {
            feature: parquet.matrix(table, feature, path, *self._layout(feature), describe_row) for feature in features
        }
        columns = {
            "state": _join(self._state, values),
            "action": _join(self._action, values),
            "task": parquet.matrix(table, "task_index", path, 1, np.dtype(np.int64)),
            "row": np.arange(len(frames))[:, None],
        }
        for name, column in columns.items():
            self._write(name, frames[rows], column[rows])
        self._write("done", np.array([number]), np.ones((1, 1), np.uint8))  # last: "done" means complete

    def _layout(self, feature: str) -> tuple[int, np.dtype]:
        """Return (dims, dtype) of a feature from meta/info.json; float16 is widened: the table may be more precise."""
        described = self.info.features[feature]
        dtype = np.dtype(described["dtype"])
        return int(described["shape"][0]), np.dtype(np.float32) if dtype == np.float16 else dtype

    def _shapes(self) -> dict[str, tuple[int, int, np.dtype]]:
        """Return (rows, columns, dtype) of each array."""

        def dtype(parts: Sequence[Slice]) -> np.dtype:
            return np.result_type(*(self._layout(part.feature)[1] for part in parts))

        def width(parts: Sequence[Slice]) -> int:
            return sum(part.stop - part.start for part in parts)

        frames = self.info.num_frames
        return {
            "state": (frames, width(self._state), dtype(self._state)),
            "action": (frames, width(self._action), dtype(self._action)),
            "task": (frames, 1, np.dtype(np.int64)),
            "row": (frames, 1, np.dtype(np.int64)),
            "unreadable": (frames, 1, np.dtype(np.uint8)),
            "done": (len(self.files), 1, np.dtype(np.uint8)),
        }

    def _prepare(self) -> Path:
        """Return the folder with the arrays; they begin as sparse files, which take no space until written to."""
        with self._lock:
            if self._folder is None:
                self._scratch = ScratchFolder()
                for name, (rows, width, dtype) in self._shapes().items():
                    with (self._scratch.path / name).open("wb") as file:
                        file.truncate(rows * width * dtype.itemsize)
                self._folder = self._scratch.path
            return self._folder

    def _map(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            rows, width, dtype = self._shapes()[name]
            mapped = np.memmap(self._prepare() / name, dtype, "r", shape=(rows, width))
            self._arrays[name] = np.asarray(mapped)  # so that slices are ordinary arrays
        return self._arrays[name]

    def _write(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Write rows (int [n], ascending) of an array.

        This writes to the file, because writing to mapped memory on a full disk would kill the process.
        """
        _, width, dtype = self._shapes()[name]
        values = np.ascontiguousarray(values, dtype)
        starts = np.r_[0, np.flatnonzero(np.diff(rows) != 1) + 1, len(rows)]
        folder = self._prepare()
        with self._room(folder), (folder / name).open("r+b") as file:
            for start, stop in zip(starts[:-1], starts[1:], strict=True):
                file.seek(int(rows[start]) * width * dtype.itemsize)
                file.write(values[start:stop].data)

    @contextlib.contextmanager
    def _room(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            size = sum(rows * width * dtype.itemsize for rows, width, dtype in self._shapes().values())
            raise OSError(
                f"{self.info.repo_id}: no room for {size / 2**30:.2f} GiB of tables in {folder.parent}: "
                f"{error.strerror}; set TMPDIR to a folder on a larger disk"
            ) from error


class _TaskLists:
    """The instructions that meta/episodes lists for each episode."""

    def __init__(self, info: DatasetInfo):
        episodes, tasks = info.listed_tasks.T
        self._episodes, self._tasks = np.unique(episodes), np.array(sorted(info.tasks), np.int64)
        self._pairs = np.unique(self._pair(episodes, tasks))

    def contradict(self, episodes: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return which rows have a task that is not listed for their episode, bool [n].

        Args:
            episodes: `episode_index` of each row, int [n].
            tasks: `task_index` of each row, int [n].

        Returns:
            The flags; False for every row of an episode without a list.
        """
        runs = np.flatnonzero(np.r_[len(tasks) > 0, (np.diff(episodes) != 0) | (np.diff(tasks) != 0)])
        counts, episodes, tasks = np.diff(runs, append=len(tasks)), episodes[runs], tasks[runs]
        wrong = np.isin(episodes, self._episodes) & ~np.isin(self._pair(episodes, tasks), self._pairs)
        return np.repeat(wrong, counts)

    def _pair(self, episodes: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return a unique number per pair, built from ranks because the numbers themselves may be large."""
        return np.searchsorted(self._episodes, episodes) * len(self._tasks) + np.searchsorted(self._tasks, tasks)


def _files_of(root: Path, template: str) -> list[Path]:
    """Return the files below a folder that match a path template.

    Args:
        root: the folder.
        template: e.g. "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet".
    """
    pieces = re.split(r"\{[^{}]*\}", template)
    named = re.compile(r"\d+".join(map(re.escape, pieces)))
    return sorted(path for path in root.glob("*".join(pieces)) if named.fullmatch(str(path.relative_to(root))))


def _may_hold(path: Path, info: DatasetInfo) -> bool:
    """Return whether a file may contain rows of the used episodes, judging by the statistics in its footer."""
    if info.whole:
        return True
    with parquet.open_parquet(path) as table:
        metadata = table.metadata
        columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        if "episode_index" not in columns:
            return True
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(columns.index("episode_index")).statistics
            if statistics is None or not statistics.has_min_max:
                return True
            first = np.searchsorted(info.episode_numbers, statistics.min)
            if first < np.searchsorted(info.episode_numbers, statistics.max, side="right"):
                return True
    return False


def _distinct(numbers: np.ndarray, count: int) -> np.ndarray:
    """Return the distinct values of int [n] numbers from 0 to count - 1, ascending."""
    there = np.zeros(count, bool)
    there[numbers] = True
    return np.flatnonzero(there)


def _join(parts: Sequence[Slice], values: dict[str, np.ndarray]) -> np.ndarray:
    """Concatenate the slices of a vector, [n, D]."""
    columns = [values[part.feature][:, part.start : part.stop] for part in parts]
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
