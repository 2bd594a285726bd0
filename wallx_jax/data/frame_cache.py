"""Cache decoded, resized frames on disk, so that reading a sample needs no decoding or resizing."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wallx_jax.data.errors import FrameError
from wallx_jax.data.fetch import data_files, video_files
from wallx_jax.data.image_columns import linked_files
from wallx_jax.data.images import resize
from wallx_jax.data.lerobot import LeRobotSource, RawSample
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.processor import ProcessorConfig
from wallx_jax.data.tables import FrameTable

RUN = 256  # consecutive frames that a thread decodes per task
SAMPLES, SAMPLE = 8, 16 * 1024  # number and size in bytes of the pieces hashed of a large file


class CachedSource:
    """LeRobotSource whose images are already resized and come from a cache on disk.

    `fill` decodes the videos sequentially. Frames that are not in the cache yet are decoded one by one and added to it.
    Any process may do so, because two processes that decode the same frame write the same bytes. The name of the cache
    folder is a hash of the dataset's files and of the image sizes, so that a changed dataset never uses an old cache.

    Args:
        source: the frames.
        config: cameras, resolutions and image sizes, in the source's order of cameras.
        folder: parent folder of the caches. The whole file is allocated at once: num_frames x height x width x 3 bytes
            per camera.

    Raises:
        ValueError: `config` and `source` have different cameras.
        OSError: the disk does not have enough space.
    """

    def __init__(self, source: LeRobotSource, config: ProcessorConfig, folder: str | Path):
        if config.camera_keys != source.cameras:
            raise ValueError(f"the processor has cameras {config.camera_keys}, but the source has {source.cameras}")
        self.source = source
        self._layout = tuple(zip(source.cameras, config.resolutions, config.views, config.image_sizes, strict=True))
        self.folder = Path(folder).expanduser().absolute() / self._fingerprint()
        self.folder.mkdir(parents=True, exist_ok=True)
        new = [name for name, _ in self._files() if not (self.folder / name).exists()]
        try:
            for name, shape in self._files():
                _allocate(self.folder / name, int(np.prod(shape, dtype=np.int64)))
        except OSError:
            for name in new:  # files of the other cameras, which are still empty
                (self.folder / name).unlink(missing_ok=True)
            raise
        self._maps: dict[str, np.ndarray] = {}

    @property
    def info(self) -> DatasetInfo:
        return self.source.info

    @property
    def frames(self) -> Sequence[int] | np.ndarray:
        return self.source.frames

    @property
    def table(self) -> FrameTable:
        return self.source.table

    def select(self, frames: np.ndarray | Sequence[int]) -> "CachedSource":
        """Return a source of these frames of the dataset, with the same cache."""
        other = copy.copy(self)
        other.source = self.source.select(frames)
        return other

    def fill(self, skip_unreadable: bool = False) -> None:
        """Add all missing frames of the dataset to the cache, on all cores and with a progress bar.

        Args:
            skip_unreadable: whether to leave out frames that cannot be decoded.

        Raises:
            FrameError: a frame cannot be decoded; names dataset, episode, frame and file.
        """
        images, todo = self.source.images, []
        for number, (camera, *_) in enumerate(self._layout):
            missing = self._map(f"done_{number}.uint8") == 0
            if missing.any():
                runs = (run[missing[run]] for run in images.runs(camera, RUN))
                todo += [(number, run) for run in runs if len(run)]
        if not todo:
            return

        def decode(task: tuple[int, np.ndarray]) -> int:
            number, frames = task
            try:
                self._keep_run(number, frames)
            except FrameError:
                if not skip_unreadable:
                    raise
                for frame in frames:  # keep the readable ones
                    with contextlib.suppress(FrameError):
                        self._keep_run(number, np.array([frame]))
            return len(frames)

        total = sum(len(frames) for _, frames in todo)
        with (
            tqdm(total=total, desc=f"decoding {self.info.repo_id}", unit="frame") as bar,
            ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        ):
            try:
                for count in pool.map(decode, todo):
                    bar.update(count)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"CachedSource({self.source!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def __getitem__(self, i: int) -> RawSample:
        """Return the source's i-th frame with resized images and `resized` set. Raises as the source does."""
        frame, images = int(self.source.frames[i]), []
        for number, (camera, *_) in enumerate(self._layout):
            if not self._map(f"done_{number}.uint8")[frame]:
                self._keep(number, frame, self.source.images.read(camera, frame))
            images.append(np.array(self._map(f"camera_{number}.uint8")[frame]))
        return dataclasses.replace(self.source.low_dim(i), images=tuple(images), resized=True)

    def low_dim(self, i: int) -> RawSample:
        return self.source.low_dim(i)

    def _keep_run(self, number: int, frames: np.ndarray) -> None:
        for frame, image in self.source.images.read_in_order(self._layout[number][0], frames):
            self._keep(number, frame, image)

    def _keep(self, number: int, frame: int, image: np.ndarray) -> None:
        """Resize a frame's image and write it into the cache."""
        _, resolution, view, _ = self._layout[number]
        self._map(f"camera_{number}.uint8")[frame] = resize(image, resolution, view)
        self._map(f"done_{number}.uint8")[frame] = 1  # last, so that a marked frame is complete

    def _files(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (file name, shape) of the uint8 arrays.

        Per camera, these are the images and one byte per frame, which is 1 once the frame is cached.
        """
        frames = self.info.num_frames
        for number, (*_, size) in enumerate(self._layout):
            yield f"camera_{number}.uint8", (frames, *size, 3)
            yield f"done_{number}.uint8", (frames,)

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            self._maps[name] = np.memmap(self.folder / name, np.uint8, "r+", shape=dict(self._files())[name])
        return self._maps[name]

    def _fingerprint(self) -> str:
        """Hash what the cached images depend on: the files with images, the frames in them, and the image sizes."""
        info = self.info
        names = {str(path.relative_to(info.root)) for path in (info.root / "meta" / "episodes").rglob("*.parquet")}
        for camera in self.source.cameras:
            if info.is_video(camera):
                names |= set(video_files(info, camera))
            else:
                names |= set(data_files(info)).union(*(linked_files(file, camera) for file in self.table.files))
        facts = {
            "fps": info.fps,
            "episodes": hashlib.sha256(info.episode_numbers.tobytes()).hexdigest(),
            "files": [(name, *_identity(info.root / name)) for name in sorted(names)],
            "images": self._layout,
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _identity(path: Path) -> tuple[int, int, str]:
    """Return a file's size, modification time in ns, and a hash of its content, sampled in pieces for large files.

    The time is not sufficient, because extracting an archive can give all files the same one.
    """
    if not path.is_file():
        return 0, 0, "missing"  # reading one of its frames raises the error
    status = path.stat()
    digest = hashlib.sha256()
    starts = np.linspace(0, max(status.st_size - SAMPLE, 0), SAMPLES).astype(int)
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return status.st_size, status.st_mtime_ns, digest.hexdigest()


def _allocate(path: Path, size: int) -> None:
    """Allocate `size` bytes for `path`, because writing to a memory-mapped file on a full disk kills the process."""
    if path.exists() and path.stat().st_size == size:
        return
    with path.open("ab") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink()
            raise OSError(
                f"frame_cache: not enough space for {size / 2**30:.2f} GiB in {path.parent}: {error.strerror}; use "
                "another disk, or lower resolution"
            ) from error
