"""Measure the throughput of the data pipeline in training samples per second, and their CPU and memory cost.

    python scripts/benchmark_loader.py [--workers 0 1 2 4] [--json OUT]
    python scripts/benchmark_loader.py --compare-lerobot [--json OUT]

Writes a LeRobot v3.0 dataset with three 480x640 cameras (moving textured scenes with sensor noise) into a temporary
folder and reads it as training does: random frames, decoded and resized to 252x196, encoded, batched. Measures first
without the frame cache, then with it: filling it, and reading from it, as training does in every epoch from the second
on. `ratio` is cached over decoded throughput at the same number of workers.

--compare-lerobot alternates with a torch DataLoader over LeRobotDataset, with the same batch size and two workers:
"lerobot" as it is, which returns full-size frames, and "lerobot_resized" with the frames resized as in this package,
in the workers; then both again without workers ("one_process"). `ratio_samples_per_s` and `ratio_cpu_per_sample` are
the improvement factors of this package at the same work; those with the suffix "_unresized" are relative to lerobot's
loader as it is. Prints JSON.
"""

import argparse
import dataclasses
import importlib.metadata
import inspect
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tabletop import assets

from wallx_jax.config import default_config, resolve
from wallx_jax.config.schema import Camera
from wallx_jax.data.build import DatasetRun, build_processor, cache_frames, load_stats, split_datasets
from wallx_jax.data.datasets import DatasetSpec, open_datasets
from wallx_jax.data.images import resize
from wallx_jax.data.pipeline import DataLoader, Encode, training_dataset
from wallx_jax.data.processor import Processor
from wallx_jax.data.source import FrameSource
from wallx_jax.data.writer import DatasetWriter
from wallx_jax.utils.files import read_json_object, write_text

VIEWS = {"face_view": "cam_high", "left_wrist_view": "cam_left_wrist", "right_wrist_view": "cam_right_wrist"}
DIMS, FPS, CHANNELS = 14, 30, 20
WORKERS = 2  # in the comparison with lerobot
ROUNDS = 3  # alternations in that comparison


def write_dataset(root: Path, episodes: int, frames: int, height: int, width: int, codec: str = "libsvtav1") -> None:
    """Write episodes of random joint movements, each seen by three cameras that pan over a random texture."""
    vector = {"dtype": "float32", "shape": (DIMS,), "names": [f"joint_{d}" for d in range(DIMS)]}
    video = {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
    keys = [f"observation.images.{camera}" for camera in VIEWS.values()]
    features = {"observation.state": vector, "action": vector} | dict.fromkeys(keys, video)
    rng = np.random.default_rng(0)
    with DatasetWriter(root, FPS, features, codec=codec) as writer:
        for _ in range(episodes):
            joints = np.cumsum(rng.normal(scale=0.02, size=(frames + 1, DIMS)), axis=0).astype(np.float32)
            images = {key: list(pan(rng, frames, height, width)) for key in keys}
            vectors = {"observation.state": joints[:-1], "action": joints[1:]}
            writer.add_episode(vectors | images, task="open the cabinet")


def lengthen(root: Path, times: int) -> None:
    """Repeat a dataset's tables and video packets `times` times, which gives large files without encoding."""
    info_file = root / "meta" / "info.json"
    info = read_json_object(info_file)
    episodes, frames = info["total_episodes"], info["total_frames"]
    seconds = frames / info["fps"]
    steps = {"episode_index": episodes, "index": frames, "dataset_from_index": frames, "dataset_to_index": frames}
    for file in [*root.glob("data/*/*.parquet"), *root.glob("meta/episodes/*/*.parquet")]:
        table, repeats = pq.read_table(file), np.arange(times)
        whole = table.take(pa.array(np.tile(np.arange(len(table)), times)))
        for place, field in enumerate(table.schema):
            step = seconds if field.name.endswith("/from_timestamp") or field.name.endswith("/to_timestamp") else 0
            if step := steps.get(field.name, step):
                shifted = whole[field.name].to_numpy() + np.repeat(repeats, len(table)) * step
                whole = whole.set_column(place, field, pa.array(shifted, field.type))
        pq.write_table(whole, file, row_group_size=len(table))
    for file in root.rglob("*.mp4"):
        repeat_video(file, times)
    info |= {"total_episodes": episodes * times, "total_frames": frames * times}
    info_file.write_text(json.dumps(info | {"splits": {"train": f"0:{episodes * times}"}}), "utf-8")


def repeat_video(file: Path, times: int) -> None:
    longer = file.with_suffix(".longer.mp4")
    with av.open(str(file)) as source, av.open(str(longer), "w") as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream, opaque=True)
        packets = [packet for packet in source.demux(stream) if packet.dts is not None]
        for repeat in range(times):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = (time + repeat * stream.duration for time in (packet.pts, packet.dts))
                copy.duration, copy.is_keyframe = packet.duration, packet.is_keyframe
                copy.stream, copy.time_base = out, stream.time_base
                target.mux(copy)
    longer.replace(file)


def pan(rng: np.random.Generator, frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Yield frames of a camera that moves over an image with multi-scale structure, uint8 [height, width, 3]."""
    layers = []
    for cell in (64, 16, 4):
        small = rng.integers(0, 256, (max(height // cell, 2), max(width // cell, 2), 3), dtype=np.uint8)
        size = (width + 2 * frames, height)
        layers.append(np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), np.float32))
    scene = np.average(layers, axis=0, weights=(4, 2, 1))
    for frame in range(frames):
        noise = rng.normal(scale=3, size=(height, width, 1))
        yield np.clip(scene[:, 2 * frame :][:, :width] + noise, 0, 255).astype(np.uint8)


def prepare(root: Path, folder: Path) -> DatasetRun:
    """Build settings and preprocessing of a run on the dataset at `root`, with every frame used for training."""
    c = default_config()
    c.pretrained_wallx_path, c.repo_id, c.save_path = "unused", str(root), str(folder / "run")
    c.camera_views, c.train_test_split = VIEWS, 1.0
    (spec,) = open_datasets(resolve(c))
    tokenizer = assets.write_tokenizer(folder / "tokenizer")
    stats = load_stats(spec.settings, spec.source)
    processor = build_processor(spec.settings, spec.source, tokenizer, None, stats, CHANNELS, CHANNELS)
    (dataset,) = split_datasets([spec], [processor])
    return dataset


def steady(batches: Iterator[Any], batch: int, workers: int, seconds: float) -> dict[str, float]:
    """Measure the steady rate, the CPU time per sample of this process and its workers, and the memory of a worker.

    Batches that are prefetched while the workers start are drawn first, and not counted.
    """
    for _ in range(2 + 4 * workers):
        next(batches)
    drawn, start, cpu = 0, time.perf_counter(), cpu_seconds()
    while (elapsed := time.perf_counter() - start) < seconds or not drawn:
        next(batches)
        drawn += 1
    return {
        "samples_per_s": drawn * batch / elapsed,
        "cpu_ms_per_sample": 1000 * (cpu_seconds() - cpu) / (drawn * batch),
        "worker_mib": max(map(proportional_mib, children())) if workers else 0.0,
    }


def children(pid: int | str = "self") -> list[int]:
    """Return the ids of all running descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # the process has ended in the meantime
            own = list(map(int, (task / "children").read_text("utf-8").split()))
            found += [*own, *(grandchild for child in own for grandchild in children(child))]
    return found


def cpu_seconds() -> float:
    """Return the CPU time of this process and its workers so far, in seconds."""
    ticks = 0
    for pid in children():
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def proportional_mib(pid: int) -> float:
    """Return the proportional set size of a process in MiB, which counts its share of shared pages."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def ours(source: FrameSource, processor: Processor, batch: int, workers: int, seconds: float) -> dict[str, float]:
    with closing(DataLoader(training_dataset(source, processor, seed=0), batch, workers)) as batches:
        return steady(batches, batch, workers, seconds)


def parts_of_a_sample(spec: DatasetSpec, processor: Processor, count: int) -> dict[str, float]:
    """Measure the CPU milliseconds per sample of decoding, resizing and encoding, in one process."""
    source, encode = spec.source, Encode(processor)
    chosen = np.random.default_rng(1).integers(len(source), size=count).tolist()
    source[0]  # opens the files

    def timed(work: Callable[[Any], Any], items: list) -> tuple[float, list]:
        start = time.process_time()
        results = [work(item) for item in items]
        return 1000 * (time.process_time() - start) / count, results

    def resized(sample: Any) -> Any:
        cameras = zip(sample.images, spec.settings.data.cameras, strict=True)
        images = tuple(resize(image, camera.resolution) for image, camera in cameras)
        return dataclasses.replace(sample, images=images, resized=True)

    decode_ms, decoded = timed(source.__getitem__, chosen)
    resize_ms, small = timed(resized, decoded)
    rest_ms, _ = timed(encode, small)
    return {"decode_ms": decode_ms, "resize_ms": resize_ms, "encode_ms": rest_ms}


class Resized:
    """A LeRobotDataset with frames resized as for the model.

    Args:
        dataset: the LeRobotDataset; its frames are [C, H, W], uint8 or float32 in [0, 1].
        cameras: cameras of the run.
    """

    def __init__(self, dataset: Any, cameras: Sequence[Camera]):
        self.dataset, self.cameras = dataset, cameras

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        for camera in self.cameras:
            pixels = row[camera.key].permute(1, 2, 0).numpy()
            if pixels.dtype != np.uint8:
                pixels = np.rint(pixels * 255).astype(np.uint8)
            row[camera.key] = resize(pixels, camera.resolution)
        return row


def lerobots_loader(
    spec: DatasetSpec, horizon: int, backend: str, batch: int, workers: int, resized: bool = False
) -> Iterator[Any]:
    """Yield batches of a torch DataLoader over LeRobotDataset, epoch after epoch."""
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    # Newer releases can return the decoded bytes without conversion, which is faster.
    options = {"return_uint8": True} if "return_uint8" in inspect.signature(LeRobotDataset.__init__).parameters else {}
    steps = {"action": [step / FPS for step in range(horizon)]}
    root = spec.info.root
    dataset = LeRobotDataset("benchmark/loader", root, delta_timestamps=steps, video_backend=backend, **options)
    if resized:
        dataset = Resized(dataset, spec.settings.data.cameras)
    loader = torch.utils.data.DataLoader(
        dataset, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        yield from loader


def compare(spec: DatasetSpec, processor: Processor, batch: int, seconds: float) -> dict[str, Any]:
    """Compare with lerobot's loader using the faster of its decoders: with WORKERS processes, and in this process."""
    horizon, speeds = processor.config.horizon, {}
    for backend in ("torchcodec", "pyav"):
        try:
            with closing(lerobots_loader(spec, horizon, backend, batch, WORKERS)) as batches:
                speeds[backend] = steady(batches, batch, WORKERS, seconds)["samples_per_s"]
        except Exception as error:  # a decoder that is not installed, or lacks its libraries
            speeds[backend] = None
            print(f"lerobot with {backend} does not work here: {' '.join(str(error).split())[:120]}", file=sys.stderr)
    backend = max((name for name, speed in speeds.items() if speed), key=speeds.get)
    return {
        "workers": WORKERS,
        "lerobot_version": importlib.metadata.version("lerobot"),
        "lerobot_backend": backend,
        "lerobot_backends_samples_per_s": speeds,
        **in_turn(spec, processor, backend, batch, WORKERS, seconds),
        "one_process": in_turn(spec, processor, backend, batch, 0, seconds),
        "per_sample": parts_of_a_sample(spec, processor, count=100),
    }


def in_turn(
    spec: DatasetSpec, processor: Processor, backend: str, batch: int, workers: int, seconds: float
) -> dict[str, Any]:
    """Measure lerobot's loader and this package's alternately; return the medians over ROUNDS rounds."""
    rounds: dict[str, list[dict[str, float]]] = {"lerobot": [], "lerobot_resized": [], "wallx_jax": []}
    for _ in range(ROUNDS):
        for name, resized in (("lerobot", False), ("lerobot_resized", True)):
            with closing(lerobots_loader(spec, processor.config.horizon, backend, batch, workers, resized)) as batches:
                rounds[name].append(steady(batches, batch, workers, seconds))
        rounds["wallx_jax"].append(ours(spec.source, processor, batch, workers, seconds))
    medians = {
        name: {key: statistics.median(figures[key] for figures in each) for key in each[0]}
        for name, each in rounds.items()
    }
    mine, ratios = medians["wallx_jax"], {}
    for suffix, other in (("", medians["lerobot_resized"]), ("_unresized", medians["lerobot"])):
        ratios[f"ratio_samples_per_s{suffix}"] = mine["samples_per_s"] / other["samples_per_s"]
        ratios[f"ratio_cpu_per_sample{suffix}"] = other["cpu_ms_per_sample"] / mine["cpu_ms_per_sample"]
    return {**medians, "rounds": rounds, **ratios}


def measure(dataset: DatasetRun, cache: Path, batch: int, workers: list[int], seconds: float):
    """Measure throughput with and without the frame cache."""

    def by_workers(source: FrameSource) -> dict[str, float]:
        return {str(n): ours(source, dataset.processor, batch, n, seconds)["samples_per_s"] for n in workers}

    decoded, settings = by_workers(dataset.train), dataset.settings
    with_cache = dataclasses.replace(settings, data=dataclasses.replace(settings.data, frame_cache=str(cache)))
    start = time.perf_counter()
    source = cache_frames(dataclasses.replace(dataset, settings=with_cache)).train
    fill = dataset.info.num_frames / (time.perf_counter() - start)
    cached = by_workers(source)
    return {
        "decoded_samples_per_s": decoded,
        "fill_samples_per_s": fill,
        "cached_samples_per_s": cached,
        "ratio": {n: cached[n] / decoded[n] for n in decoded},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--compare-lerobot", action="store_true", help="also measure LeRobotDataset in a torch DataLoader"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="numbers of worker processes")
    parser.add_argument("--episodes", type=int, default=6)
    parser.add_argument("--frames", type=int, default=100, help="frames per episode")
    parser.add_argument("--repeat", type=int, default=1, help="lengthen the files by this factor; 25: about 190 MB")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--codec", default="libsvtav1", help="of the videos: libsvtav1, h264 or hevc")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="time per measurement")
    parser.add_argument("--folder", type=Path, help="where temporary files go; the cache's disk is measured too")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark_loader_") as folder:
        root = Path(folder) / "dataset"
        write_dataset(root, arguments.episodes, arguments.frames, *arguments.size, arguments.codec)
        if arguments.repeat > 1:
            lengthen(root, arguments.repeat)
        dataset = prepare(root, Path(folder))
        if arguments.compare_lerobot:
            figures = compare(dataset, dataset.processor, arguments.batch, arguments.seconds)
        else:
            cache = Path(folder) / "cache"
            figures = measure(dataset, cache, arguments.batch, arguments.workers, arguments.seconds)
        report = {
            "camera_size": arguments.size,
            "cameras": len(VIEWS),
            "codec": arguments.codec,
            "video_file_bytes": max(file.stat().st_size for file in root.rglob("*.mp4")),
            "samples": dataset.info.num_frames,
            "batch": arguments.batch,
            "cpu_count": os.cpu_count(),
            "python": platform.python_version(),
            **figures,
        }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        write_text(arguments.json, text + "\n")


if __name__ == "__main__":
    main()
