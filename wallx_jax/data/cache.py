"""Decoded, resized frames kept on disk: with them, reading a sample costs no video decoding and no resizing."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wallx_jax.data.images import resize
from wallx_jax.data.lerobot import LeRobotSource, RawSample
from wallx_jax.data.processor import ProcessorConfig
from wallx_jax.data.video import decode_in_order, is_video


class CachedSource:
    """A LeRobotSource whose images come resized, from a cache on disk.

    `fill` decodes the videos from front to back. Frames that are not in the cache are decoded one by one and kept;
    every process may do that, since two that decode the same frame write the same bytes. The folder's name is a hash of
    the dataset's files and of the image sizes, so that a changed dataset never meets an old cache.

    Args:
        source: the frames.
        config: cameras, resolutions and image sizes, in the source's order of cameras.
        folder: where caches live. The whole file is allocated at once: num_frames x height x width x 3 bytes a camera.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, source: LeRobotSource, config: ProcessorConfig, folder: str | Path):
        if config.camera_keys != source.cameras:
            raise ValueError(f"the processor has cameras {config.camera_keys}, the source {source.cameras}")
        self.source, self.resolutions, self.sizes, self.views = (
            source,
            config.resolutions,
            config.image_sizes,
            config.views,
        )
        self.folder = Path(folder).expanduser().absolute() / self._fingerprint()
        self.folder.mkdir(parents=True, exist_ok=True)
        frames = source.info.num_frames
        for name, row in self._rows():
            _allocate(self.folder / name, frames * int(np.prod(row, dtype=np.int64)))
        self._maps: list[np.ndarray] | None = None

    def fill(self) -> None:
        """Puts every frame of the dataset's videos into the cache, with a progress bar, unless they are all there."""
        info, (*images, done) = self.source.info, self._open()
        if done.all() or not all(is_video(info, camera) for camera in self.source.cameras):
            return
        cameras = zip(self.source.cameras, images, self.resolutions, self.views, strict=True)
        with tqdm(total=len(images) * info.num_frames, desc=f"decoding {info.repo_id}", unit="frame") as bar:
            for camera, kept, resolution, view in cameras:
                for index, frame in decode_in_order(info, camera):
                    kept[index] = resize(frame, resolution, view)
                    bar.update()
        done[:] = 1  # last: a frame that is marked is whole

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"CachedSource({self.source!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None}

    def __getitem__(self, i: int) -> RawSample:
        """As the source's, with images resized and `resized` set."""
        index = int(self.source.frames[i])
        *images, done = self._open()
        if not done[index]:
            raw = self.source[i]
            for image, kept, resolution, view in zip(raw.images, images, self.resolutions, self.views, strict=True):
                kept[index] = resize(image, resolution, view)
            done[index] = 1
        else:
            raw = self.source.low_dim(i)
        return dataclasses.replace(raw, images=tuple(np.array(kept[index]) for kept in images), resized=True)

    def low_dim(self, i: int) -> RawSample:
        return self.source.low_dim(i)

    def _rows(self) -> list[tuple[str, tuple[int, ...]]]:
        """(file, shape of one frame's entry): a file per camera, then one byte that says whether they are filled."""
        return [(f"camera_{n}.uint8", (*size, 3)) for n, size in enumerate(self.sizes)] + [("done.uint8", ())]

    def _open(self) -> list[np.ndarray]:
        if self._maps is None:
            frames = self.source.info.num_frames
            self._maps = [
                np.memmap(self.folder / name, np.uint8, "r+", shape=(frames, *row)) for name, row in self._rows()
            ]
        return self._maps

    def _fingerprint(self) -> str:
        root = self.source.info.root
        files = sorted(path for path in root.rglob("*") if path.suffix in (".mp4", ".parquet", ".png", ".json"))
        facts = {
            "files": [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files],
            "images": [self.source.cameras, self.resolutions, self.sizes],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _allocate(path: Path, size: int) -> None:
    """Gives `path` `size` bytes on disk: writing to a mapped file that the disk has no room for kills the process."""
    if path.exists() and path.stat().st_size == size:
        return
    with path.open("ab") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink()
            raise OSError(
                f"frame_cache: no room for {size / 2**30:.2f} GiB at {path.parent}: {error.strerror}"
            ) from error
