"""Measure how long a large dataset takes to open, and how much memory its tables cost data workers.

    python scripts/bench/benchmark_open.py [--frames 50000000] [--episode 500] [--json OUT]

Writes the meta and table files of a LeRobot v3.0 dataset (random walks; no video) into a temporary folder, about 180 MB
per million frames. Then measures, once each: reading the metadata, opening (which checks the keys of every row), the
first sample, converting all tables into memory-mapped arrays, and random samples in worker processes. A worker's memory
is its proportional set size without and with pages of the arrays, which the system drops when it needs the memory.
Prints JSON.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

import numpy as np
from benchmark_stats import write_dataset

from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import read_info
from wallx_jax.utils.files import write_text

HORIZON = 32


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def read_in_worker(pickled: bytes, seed: int, samples: int, out: multiprocessing.Queue) -> None:
    """Read random samples in a worker; put their rate and the worker's memory into `out`."""
    source: LeRobotSource = pickle.loads(pickled)
    chosen = np.random.default_rng(seed).integers(len(source), size=samples).tolist()
    seconds, _ = timed(lambda: [source.low_dim(i) for i in chosen])
    out.put({"samples_per_s": samples / seconds, **memory_mib()})


def memory_mib() -> dict[str, float]:
    """Return the proportional set size of this process in MiB, and the part of it that is pages of mapped files."""
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()[1:]:
        name, value, *_ = line.split()
        sizes[name.rstrip(":")] = int(value) / 1024
    return {"private_mib": sizes["Pss_Anon"], "mapped_mib": sizes["Pss"] - sizes["Pss_Anon"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=50_000_000)
    parser.add_argument("--episode", type=int, default=500, help="frames of an episode")
    parser.add_argument("--dims", type=int, default=14, help="of the state, and of the action")
    parser.add_argument("--files", type=int, default=75, help="table files")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=10_000, help="that each worker reads")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark_open_") as folder:
        root = Path(folder) / "dataset"
        write_dataset(root, arguments.frames, arguments.dims, arguments.files, arguments.episode)
        before = memory_mib()["private_mib"]
        read_s, info = timed(lambda: read_info(root))
        open_s, source = timed(lambda: LeRobotSource(info, HORIZON, []))
        first_s, _ = timed(lambda: source.low_dim(arguments.frames // 2))
        opened = memory_mib()["private_mib"]
        load_s, _ = timed(source.table.load)
        report = {
            "frames": arguments.frames,
            "episodes": info.num_episodes,
            "dims": arguments.dims,
            "table_bytes": sum(file.stat().st_size for file in root.rglob("*.parquet")),
            "cpu_count": os.cpu_count(),
            "python": platform.python_version(),
            "read_info_s": read_s,
            "open_s": open_s,
            "first_sample_s": first_s,
            "convert_all_s": load_s,
            "private_mib_before": before,
            "private_mib_opened": opened,
            "private_mib_converted": memory_mib()["private_mib"],
            "workers": run_workers(source, arguments.workers, arguments.samples),
        }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        write_text(arguments.json, text + "\n")


def run_workers(source: LeRobotSource, workers: int, samples: int) -> list[dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    out, pickled = context.Queue(), pickle.dumps(source)
    processes = [context.Process(target=read_in_worker, args=(pickled, i, samples, out)) for i in range(workers)]
    for process in processes:
        process.start()
    figures = [out.get() for _ in processes]
    for process in processes:
        process.join()
    return figures


if __name__ == "__main__":
    main()
