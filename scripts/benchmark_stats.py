"""Measures how long the statistics of a dataset take, with absolute and with relative actions.

    python scripts/benchmark_stats.py [--frames 1000000] [--json OUT]

Writes the tables of a LeRobot v3.0 dataset (random walks; no video) into a temporary folder, then times reading and
`compute_stats`. Prints JSON. The peak memory is the process's, each time after what was measured before.
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallx_jax.data.lerobot import read_info
from wallx_jax.data.stats import compute_stats

STATE, ACTION = "observation.state", "action"
EPISODE = 400  # frames, the last one of a file shorter


def write_dataset(root: Path, frames: int, dims: int, files: int) -> None:
    """The meta and table files of a dataset whose actions are the next states."""
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    lengths: list[int] = []
    for number, rows in enumerate(np.array_split(np.arange(frames), files)):
        walk = np.cumsum(np.random.default_rng(number).normal(size=(len(rows) + 1, dims)), axis=0).astype(np.float32)
        own = [len(part) for part in np.split(rows, np.arange(EPISODE, len(rows), EPISODE))]
        columns = {
            STATE: pa.FixedSizeListArray.from_arrays(pa.array(walk[:-1].ravel()), dims),
            ACTION: pa.FixedSizeListArray.from_arrays(pa.array(walk[1:].ravel()), dims),
            "index": rows,
            "episode_index": np.repeat(len(lengths) + np.arange(len(own)), own),
            "task_index": np.zeros(len(rows), np.int64),
        }
        lengths += own
        pq.write_table(pa.table(columns), root / "data" / "chunk-000" / f"file-{number:03d}.parquet")
    vector = {"dtype": "float32", "shape": [dims], "names": [f"joint_{d}" for d in range(dims)]}
    info = {
        "codebase_version": "v3.0",
        "fps": 50,
        "total_episodes": len(lengths),
        "total_frames": frames,
        "features": {STATE: vector, ACTION: vector},
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    episodes = {"episode_index": np.arange(len(lengths)), "length": lengths}
    pq.write_table(pa.table(episodes), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.table({"task_index": [0], "task": ["walk"]}), root / "meta" / "tasks.parquet")


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
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
