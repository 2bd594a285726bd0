"""Measures how many training samples a second the data pipeline delivers, by number of worker processes.

    python scripts/benchmark_loader.py [--workers 0 1 2 4] [--json OUT]

Writes a LeRobot v3.0 dataset with three 480x640 cameras (textured scenes that move, with sensor noise) into a
temporary folder and reads it as training does: random frames, decoded and resized to 252x196, encoded, batched. First
without the frame cache; then with it: filling it from front to back, and what training reads afterwards, which is every
epoch from the second on. Prints JSON; `ratio` is cached over decoded at the same number of workers.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import demo_assets
import numpy as np
from PIL import Image

from wallx_jax.config import default_config, resolve
from wallx_jax.data.lerobot import read_info
from wallx_jax.data.mapping import check_dataset
from wallx_jax.data.pipeline import Batches, samples
from wallx_jax.data.processor import Processor
from wallx_jax.data.setup import Source, build_processor, load_stats, split_sources
from wallx_jax.run_config import RunConfig

VIEWS = {"face_view": "cam_high", "left_wrist_view": "cam_left_wrist", "right_wrist_view": "cam_right_wrist"}
DIMS, FPS, CHANNELS = 14, 30, 20


def write_dataset(root: Path, episodes: int, frames: int, height: int, width: int) -> None:
    """Episodes of random joint movements, each seen by three cameras that pan over a random texture."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    vector = {"dtype": "float32", "shape": (DIMS,), "names": [f"joint_{d}" for d in range(DIMS)]}
    video = {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
    keys = [f"observation.images.{camera}" for camera in VIEWS.values()]
    features = {"observation.state": vector, "action": vector} | dict.fromkeys(keys, video)
    dataset = LeRobotDataset.create("benchmark/loader", FPS, features, root=root, video_backend="pyav")
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        joints = np.cumsum(rng.normal(scale=0.02, size=(frames + 1, DIMS)), axis=0).astype(np.float32)
        scenes = {key: scene(rng, height, width + 2 * frames) for key in keys}
        for frame in range(frames):
            images = {
                key: np.clip(pixels[:, 2 * frame :][:, :width] + rng.normal(scale=3, size=(height, width, 1)), 0, 255)
                for key, pixels in scenes.items()
            }
            images = {key: pixels.astype(np.uint8) for key, pixels in images.items()}
            dataset.add_frame(
                {"observation.state": joints[frame], "action": joints[frame + 1], "task": "open the cabinet", **images}
            )
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


def scene(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture with structure of several sizes, float32 [height, width, 3]."""
    layers = []
    for cell in (64, 16, 4):
        small = rng.integers(0, 256, (max(height // cell, 2), max(width // cell, 2), 3), dtype=np.uint8)
        layers.append(np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.float32))
    return np.average(layers, axis=0, weights=(4, 2, 1))


def prepare(root: Path, folder: Path) -> tuple[RunConfig, Processor]:
    """Settings and preprocessing of a run on the dataset at `root`, with every frame for training."""
    c = default_config()
    c.pretrained_wallx_path, c.repo_id, c.save_path = "unused", str(root), str(folder / "run")
    c.camera_views, c.train_test_split = VIEWS, 1.0
    info = read_info(root)
    settings = check_dataset(resolve(c), info)
    tokenizer = demo_assets.write_tokenizer(folder / "tokenizer")
    stats = load_stats(settings, info)
    return settings, build_processor(settings, info, tokenizer, None, stats, CHANNELS, CHANNELS)


def samples_per_s(source: Source, processor: Processor, batch: int, workers: int, seconds: float) -> float:
    """Steady rate: what is read ahead while the workers start is drawn first, and does not count."""
    batches = Batches(samples(source, processor, seed=0), batch, workers)
    try:
        for _ in range(2 + 4 * workers):
            next(batches)
        drawn, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not drawn:
            next(batches)
            drawn += 1
        return drawn * batch / elapsed
    finally:
        batches.close()


def measure(settings: RunConfig, processor: Processor, cache: Path, batch: int, workers: list[int], seconds: float):
    """The report's figures."""

    def by_workers(source: Source) -> dict[str, float]:
        return {str(n): samples_per_s(source, processor, batch, n, seconds) for n in workers}

    info = read_info(settings.data.location)
    decoded = by_workers(split_sources(settings, info, processor.config)[0])
    with_cache = dataclasses.replace(settings, data=dataclasses.replace(settings.data, frame_cache=str(cache)))
    start = time.perf_counter()
    source = split_sources(with_cache, info, processor.config)[0]
    fill = info.num_frames / (time.perf_counter() - start)
    cached = by_workers(source)
    return {
        "samples": info.num_frames,
        "decoded_samples_per_s": decoded,
        "fill_samples_per_s": fill,
        "cached_samples_per_s": cached,
        "ratio": {n: cached[n] / decoded[n] for n in decoded},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="numbers of worker processes")
    parser.add_argument("--episodes", type=int, default=6)
    parser.add_argument("--frames", type=int, default=100, help="frames per episode")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="time per measurement")
    parser.add_argument("--folder", type=Path, help="where temporary files go; the cache's disk is measured too")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    os.environ.setdefault("SVT_LOG", "1")  # the video encoder reports every file otherwise
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark_loader_") as folder:
        root = Path(folder) / "dataset"
        write_dataset(root, arguments.episodes, arguments.frames, *arguments.size)
        settings, processor = prepare(root, Path(folder))
        cache = Path(folder) / "cache"
        figures = measure(settings, processor, cache, arguments.batch, arguments.workers, arguments.seconds)
    report = {
        "camera_size": arguments.size,
        "cameras": len(VIEWS),
        "batch": arguments.batch,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        **figures,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
