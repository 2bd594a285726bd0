"""Measure how long computing a dataset's statistics takes, with absolute and with relative actions.

    python scripts/bench/benchmark_stats.py [--frames 1000000] [--json OUT]

Writes the tables of a LeRobot v3.0 dataset (random walks; no video) into a temporary folder, then times reading and
`compute_stats`. Prints JSON. Peak memory is that of the whole process so far, so each value includes earlier stages.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallx_jax.data.metadata import read_info
from wallx_jax.data.stats import compute_stats
from wallx_jax.utils.files import write_text

STATE, ACTION = "observation.state", "action"
EPISODE, FPS = 400, 50


def write_dataset(root: Path, frames: int, dims: int, files: int, episode: int = EPISODE) -> None:
    """Write the meta and table files of a dataset whose actions are the next states, with a row group per episode.

    Args:
        root: directory of the dataset.
        frames: number of frames in the whole dataset.
        dims: number of dims of the state, and of the action.
        files: number of table files, each with about the same number of episodes.
        episode: frames per episode; the last one may be shorter.
    """
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    starts = np.arange(0, frames, episode)
    lengths = np.minimum(frames - starts, episode)
    file_of_episode = np.zeros(len(starts), np.int64)
    for number, episodes in enumerate(np.array_split(np.arange(len(starts)), min(files, len(starts)))):
        file_of_episode[episodes] = number
        _write_tables(root / "data" / "chunk-000" / f"file-{number:03d}.parquet", episodes, lengths, starts, dims)
    scalar, vector = {"shape": [1], "names": None}, {"shape": [dims], "names": [f"joint_{d}" for d in range(dims)]}
    features = {key: {"dtype": "float32", **vector} for key in (STATE, ACTION)}
    features["timestamp"] = {"dtype": "float32", **scalar}
    features |= {key: {"dtype": "int64", **scalar} for key in ("frame_index", "episode_index", "index", "task_index")}
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "total_episodes": len(lengths),
        "total_frames": frames,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": features,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info), "utf-8")
    columns = {
        "episode_index": np.arange(len(lengths)),
        "length": lengths,
        "data/chunk_index": np.zeros(len(lengths), np.int64),
        "data/file_index": file_of_episode,
        "dataset_from_index": starts,
        "dataset_to_index": starts + lengths,
    }
    pq.write_table(pa.table(columns), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.table({"task_index": [0], "task": ["walk"]}), root / "meta" / "tasks.parquet")


def _write_tables(file: Path, episodes: np.ndarray, lengths: np.ndarray, starts: np.ndarray, dims: int) -> None:
    """Write a table file with the rows of some episodes."""
    writer = None
    rng = np.random.default_rng(int(episodes[0]))
    for episode in episodes:
        length, frame = lengths[episode], np.arange(lengths[episode])
        walk = np.cumsum(rng.normal(size=(length + 1, dims)).astype(np.float32), axis=0)
        table = pa.table(
            {
                STATE: pa.FixedSizeListArray.from_arrays(pa.array(walk[:-1].ravel()), dims),
                ACTION: pa.FixedSizeListArray.from_arrays(pa.array(walk[1:].ravel()), dims),
                "timestamp": (frame / FPS).astype(np.float32),
                "frame_index": frame,
                "episode_index": np.full(length, episode),
                "index": starts[episode] + frame,
                "task_index": np.zeros(length, np.int64),
            }
        )
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    writer.close()


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--dims", type=int, default=14, help="of the state, and of the action")
    parser.add_argument("--files", type=int, default=8, help="table files")
    parser.add_argument("--horizon", type=int, default=32, help="steps of a chunk of relative actions")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    report = {
        "frames": arguments.frames,
        "dims": arguments.dims,
        "files": arguments.files,
        "horizon": arguments.horizon,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark_stats_") as folder:
        root = Path(folder) / "dataset"
        write_dataset(root, arguments.frames, arguments.dims, arguments.files)
        info = read_info(root)
        report["peak_rss_bytes_before"] = peak_bytes()
        for name, relative_to in (("absolute", ()), ("relative", tuple(range(arguments.dims)))):
            start = time.perf_counter()
            compute_stats(info, STATE, ACTION, None, relative_to, arguments.horizon, progress=True)
            seconds = time.perf_counter() - start
            report[name] = {
                "seconds": seconds,
                "frames_per_second": arguments.frames / seconds,
                "peak_rss_bytes": peak_bytes(),
            }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        write_text(arguments.json, text + "\n")


if __name__ == "__main__":
    main()
