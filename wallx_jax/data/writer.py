"""Writes LeRobot v3.0 datasets from arrays, without lerobot; episodes are written straight to the dataset's files."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallx_jax.data import episode_stats, writer_schema
from wallx_jax.data.episode_stats import PixelStats, Stats
from wallx_jax.data.video_writer import ENCODERS, PIX_FMT, VideoWriter
from wallx_jax.data.writer_schema import CAMERA, NUMERIC
from wallx_jax.utils.files import new_directory

FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{FILE}.mp4"
EPISODES_PATH = f"meta/episodes/{FILE}.parquet"
EPISODES_PER_ROW_GROUP = 100  # in meta/episodes
MB = 2**20
X265_NARROW = 48  # pixels; x265 4.1 writes past its buffers for videos of this width or less


class DatasetWriter:
    """Writer of a LeRobot v3.0 dataset, one episode at a time.

    Example:
        with DatasetWriter(root, fps=10, features=features) as writer:
            writer.add_episode({"observation.state": states, "action": actions, ...}, task="open the cabinet")

    The dataset appears at `root` when the block ends; if the block raises, nothing is created. Memory: one episode's
    vectors and embedded images, and the frames in the video encoders' lookahead.
    """

    def __init__(
        self,
        root: str | Path,
        fps: float | Fraction,
        features: Mapping[str, Mapping[str, Any]],
        robot_type: str | None = None,
        codec: str = "libsvtav1",
        *,
        crf: int = 30,
        gop: int = 2,
        preset: int | str | None = None,
        data_files_size_in_mb: float = 100,
        video_files_size_in_mb: float = 200,
        chunks_size: int = 1000,
    ):
        """Check the settings; files are created on entering the context.

        Args:
            root: the dataset's folder; must be missing or empty.
            fps: frames per second. For the videos a float is rounded to a fraction, 29.97 to 2997/100.
            features: {key: {"dtype", "shape", "names"}} as in info.json, without timestamp, frame_index, episode_index,
                index and task_index, which are added. dtype float32, float64, int64, int32 or bool with shape (D,);
                string with shape (1,); video or image with shape (H, W, 3).
            robot_type: name of the robot.
            codec: video encoder: libsvtav1 (AV1), h264 or libx264, hevc or libx265.
            crf: constant rate factor of the videos; lower means better and larger. The default is lerobot's.
            gop: maximum distance between key frames. The default is lerobot's.
            preset: speed/size preset of the encoder; None for lerobot's choice: 12 for AV1, the encoder's own for x264
                and x265.
            data_files_size_in_mb: maximum size of a table file in MiB, exceeded only by a single larger episode.
            video_files_size_in_mb: the same for video files; approximate, because sizes are estimated before encoding.
            chunks_size: files per chunk folder.

        Raises:
            ValueError: for a setting or a feature that cannot be written.
        """
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps is {fps}; it must be finite and above 0")
        if codec not in ENCODERS:
            raise ValueError(f"codec is {codec!r}; choose one of {list(ENCODERS)}")
        limits = {
            "data_files_size_in_mb": data_files_size_in_mb,
            "video_files_size_in_mb": video_files_size_in_mb,
            "chunks_size": chunks_size,
        }
        for name, value in ({"gop": gop} | limits).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        self.root, self.robot_type, self.codec = Path(root), robot_type, codec
        self.fps = int(fps) if fps == int(fps) else float(fps)
        self.rate = Fraction(fps).limit_denominator(100_000)
        self.features = writer_schema.check_features(features)
        for key in self._keys("video") if codec == "hevc" else ():
            if (width := self.features[key]["shape"][1]) <= X265_NARROW:
                raise ValueError(f"{key} is {width} pixels wide, too narrow for hevc; use another codec")
        self.tasks: dict[str, int] = {}  # instruction -> task_index
        self.num_episodes = self.num_frames = 0
        self._limits, self._chunks_size = limits, chunks_size
        self._encoder = codec, crf, gop, preset
        self._stats: Stats | None = None
        self._rows: list[dict[str, Any]] = []  # pending rows of meta/episodes
        self._adding = False  # remains set if add_episode raises while writing

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(new_directory(self.root))
            (self._folder / "meta").mkdir(parents=True)
            table_bytes = self._limits["data_files_size_in_mb"] * MB
            self._data = _TableWriter(partial(self._path, DATA_PATH), table_bytes)
            self._episodes = _TableWriter(partial(self._path, EPISODES_PATH), table_bytes)
            self._videos: dict[str, VideoWriter] = {}
            stack.callback(self._abort)
            stack.push(self._finish)
            for key in self._keys("video"):
                path = partial(self._path, VIDEO_PATH.replace("{video_key}", key))
                height, width, _ = self.features[key]["shape"]
                video_bytes = self._limits["video_files_size_in_mb"] * MB
                self._videos[key] = VideoWriter(path, (height, width), self.rate, video_bytes, *self._encoder)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add_episode(self, values: Mapping[str, Any], task: str | Sequence[str]) -> None:
        """Write an episode of T frames.

        Args:
            values: {key: values} with an array [T, D] of the feature's dtype, or [T] for shape (1,); a sequence of T
                strings; or a camera's uint8 RGB frames, as an array [T, H, W, 3] or any iterable of T arrays [H, W, 3].
                NaN and infinity are allowed: they are stored, and excluded from the statistics.
            task: the instruction, or a sequence of T instructions.

        Raises:
            ValueError: if the episode does not match the features. Nothing has been written in that case, unless an
                iterable other than an array, list or tuple yields a wrong frame or a wrong number of frames: those are
                checked during encoding, and the dataset cannot be completed afterwards.
            RuntimeError: if an earlier episode was written only in part.
        """
        self._check_complete()
        length, checked = writer_schema.check_values(values, self.features)
        tasks = writer_schema.check_tasks(task, length)
        self._adding = True
        images, spans, pixel_stats = self._write_frames(checked, length)
        for text in tasks:
            self.tasks.setdefault(text, len(self.tasks))
        checked |= {
            "timestamp": (np.arange(length) / self.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, self.num_episodes),
            "index": np.arange(self.num_frames, self.num_frames + length),
            "task_index": np.array([self.tasks[text] for text in tasks]),
        }
        place = self._write_table(checked, images)
        vectors = [checked[key].reshape(length, -1) for key in self._keys(*NUMERIC)]
        vector_stats = episode_stats.vector_stats(np.concatenate(vectors, axis=1, dtype=np.float64))
        stats = episode_stats.concatenate([vector_stats, *(pixels.stats() for pixels in pixel_stats)])
        self._stats = stats if self._stats is None else episode_stats.merge(self._stats, stats)
        self._rows.append(
            {
                "episode_index": self.num_episodes,
                "tasks": list(dict.fromkeys(tasks)),
                "length": length,
                **place,
                "dataset_from_index": self.num_frames,
                "dataset_to_index": self.num_frames + length,
                **spans,
                **{f"stats/{key}/{name}": x for key, of in self._by_feature(stats).items() for name, x in of.items()},
            }
        )
        self.num_episodes += 1
        self.num_frames += length
        if len(self._rows) == EPISODES_PER_ROW_GROUP:
            self._write_rows()
        self._adding = False

    def _write_frames(
        self, values: Mapping[str, Any], length: int
    ) -> tuple[dict[str, pa.Array], dict[str, Any], list[PixelStats]]:
        """Encode an episode's frames.

        Returns:
            Columns of embedded images, fields of meta/episodes that locate the videos, and each camera's statistics.
        """
        images: dict[str, pa.Array] = {}
        spans: dict[str, Any] = {}
        pixel_stats: list[PixelStats] = []
        for key in self._keys(*CAMERA):
            shape = self.features[key]["shape"]
            pixels = PixelStats(length, *shape[:2])
            pixel_stats.append(pixels)
            frames = pixels.observe(writer_schema.check_frames(key, values[key], length, shape))
            if key in self._videos:
                number, first = self._videos[key].write(frames, length)
                spans |= self._location(f"videos/{key}", number)
                spans[f"videos/{key}/from_timestamp"] = float(first / self.rate)
                spans[f"videos/{key}/to_timestamp"] = float((first + length) / self.rate)
            else:
                images[key] = writer_schema.image_column(frames)
        return images, spans, pixel_stats

    def _write_table(self, values: Mapping[str, Any], images: Mapping[str, pa.Array]) -> dict[str, int]:
        """Write an episode's frames as one row group; return the fields of meta/episodes that locate it."""
        features = {key: feature for key, feature in self.features.items() if feature["dtype"] != "video"}
        columns = {
            key: images[key] if key in images else writer_schema.column(values[key], feature)
            for key, feature in features.items()
        }
        table = pa.table(columns).replace_schema_metadata(writer_schema.schema_metadata(features))
        location = self._location("data", self._data.reserve(table.nbytes))
        self._data.write(table)
        return location

    def _write_rows(self) -> None:
        """Write the pending rows of meta/episodes as one row group."""
        table = pa.Table.from_pylist(self._rows)
        for name, index in self._location("meta/episodes", self._episodes.reserve(table.nbytes)).items():
            table = table.append_column(name, pa.array([index] * len(table), pa.int64()))
        self._episodes.write(table)
        self._rows = []

    def _finish(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the dataset, unless the block raised."""
        if kind is not None:
            return
        self._check_complete()
        if self._stats is None:
            raise ValueError(f"{self.root} would have no episodes; add at least one")
        if self._rows:
            self._write_rows()
        for writer in self._writers():
            writer.close()
        pq.write_table(_task_table(self.tasks), self._folder / "meta" / "tasks.parquet")
        self._write_json("stats.json", self._by_feature(self._stats))
        self._write_json("info.json", self._info())

    def _abort(self) -> None:
        """Close the files that are still open."""
        for writer in self._writers():
            writer.abort()

    def _writers(self) -> "list[VideoWriter | _TableWriter]":
        return [*self._videos.values(), self._data, self._episodes]

    def _check_complete(self) -> None:
        if self._adding:
            raise RuntimeError(
                f"episode {self.num_episodes} of {self.root} was written only in part, so the dataset cannot be "
                "completed; write it again"
            )

    def _info(self) -> dict[str, Any]:
        """Return the content of info.json."""
        features = {key: dict(feature) for key, feature in self.features.items()}
        for key in self._videos:
            height, width, channels = features[key]["shape"]
            features[key]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": av.Codec(ENCODERS[self.codec], "w").canonical_name,
                "video.pix_fmt": PIX_FMT,
                "video.is_depth_map": False,
                "video.fps": int(self.rate),  # truncated, as in lerobot
                "video.channels": channels,
                "has_audio": False,
            }
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self.tasks),
            **self._limits,
            "fps": self.fps,
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "features": features,
        }

    def _by_feature(self, stats: Stats) -> dict[str, dict[str, list]]:
        """Split statistics by feature: {key: {name: list}}, with shape [D] for vectors and [3, 1, 1] for cameras."""
        split: dict[str, dict[str, list]] = {}
        start = 0
        for key in (*self._keys(*NUMERIC), *self._keys(*CAMERA)):
            shape = self.features[key]["shape"]
            shape = (3, 1, 1) if len(shape) == 3 else shape
            columns = slice(start, start + shape[0])
            split[key] = {name: values[columns].reshape(shape).tolist() for name, values in stats.items()}
            split[key]["count"] = [int(stats["count"][columns].max())]
            start += shape[0]
        return {key: split[key] for key in self.features if key in split}

    def _keys(self, *dtypes: str) -> list[str]:
        """Return the features with one of these dtypes."""
        return [key for key, feature in self.features.items() if feature["dtype"] in dtypes]

    def _location(self, prefix: str, number: int) -> dict[str, int]:
        chunk, file = divmod(number, self._chunks_size)
        return {f"{prefix}/chunk_index": chunk, f"{prefix}/file_index": file}

    def _path(self, template: str, number: int) -> Path:
        chunk, file = divmod(number, self._chunks_size)
        return self._folder / template.format(chunk_index=chunk, file_index=file)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self._folder / "meta" / name).write_text(json.dumps(content, indent=4, ensure_ascii=False), "utf-8")


class _TableWriter:
    """Writer of parquet tables, one row group each, that starts a new file when the current one is full."""

    def __init__(self, path: Callable[[int], Path], max_bytes: float):
        self.path, self.max_bytes = path, max_bytes
        self.number = -1
        self._file: pa.OSFile | None = None
        self._parquet: pq.ParquetWriter | None = None

    def reserve(self, size: int) -> int:
        """Return the index of the file for a table of at most `size` bytes, and start that file if it is a new one."""
        if self._file is None or self._file.tell() + size > self.max_bytes:
            self.close()
            self.number += 1
            path = self.path(self.number)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = pa.OSFile(str(path), "wb")
        return self.number

    def write(self, table: pa.Table) -> None:
        """Write a table to the file that `reserve` chose."""
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._file, table.schema, compression="snappy")
        self._parquet.write_table(table, row_group_size=len(table))

    def close(self) -> None:
        """Finish the current file, if there is one."""
        if self._parquet is not None:
            self._parquet.close()
        if self._file is not None:
            self._file.close()
        self._file = self._parquet = None

    def abort(self) -> None:
        """Close the current file, complete or not."""
        with contextlib.suppress(pa.ArrowException, OSError):
            self.close()


def _task_table(tasks: Mapping[str, int]) -> pa.Table:
    """Return the table of instructions, with pandas metadata that makes them the index, as lerobot expects."""
    columns = [("task_index", "int64", "int64"), ("task", "unicode", "object")]
    metadata = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
            for name, kind, numpy_type in columns
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": None,
    }
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(metadata)})
