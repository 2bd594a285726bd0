"""Video files read from front to back: tens of times cheaper than seeking every frame on its own. And one frame of one
camera, where that is what is wanted."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from wallx_jax.data.lerobot import DatasetInfo, read_episodes


def is_video(info: DatasetInfo, camera: str) -> bool:
    """Are a camera's frames in video files (rather than images in the tables)?"""
    return info.features[camera]["dtype"] == "video"


def decode_in_order(info: DatasetInfo, camera: str) -> Iterator[tuple[int, np.ndarray]]:
    """(frame index in the dataset, uint8 RGB [H, W, 3]) for every frame of a camera, file by file.

    Raises:
        ValueError: a file lacks frames of the episodes that the meta files place in it.
    """
    import av

    chunks, files, starts = _places(info, camera)
    for chunk, file in sorted(set(zip(chunks.tolist(), files.tolist(), strict=True))):
        index_of = {}  # number of a frame in the file -> its index in the dataset
        for episode in np.flatnonzero((chunks == chunk) & (files == file)):
            first = round(starts[episode] * info.fps)
            length, index = info.episode_lengths[episode], info.episode_starts[episode]
            index_of |= {first + n: int(index) + n for n in range(length)}
        path = _file(info, camera, chunk, file)
        with av.open(str(path)) as video:
            for frame in video.decode(video=0):
                index = index_of.pop(round(float(frame.pts * frame.time_base) * info.fps), None)
                if index is not None:
                    yield index, frame.to_ndarray(format="rgb24")
        if index_of:
            raise ValueError(
                f"{path} lacks {len(index_of)} of the frames that meta/episodes places there; copy the dataset again"
            )


def read_frame(info: DatasetInfo, camera: str, index: int) -> np.ndarray:
    """uint8 RGB [H, W, 3]: one camera's frame, whatever state the other cameras are in.

    Args:
        index: of the frame in the dataset.

    Raises:
        ValueError: the video ends before the frame. And what decoders raise: OSError, av.FFmpegError, ...
    """
    if not is_video(info, camera):
        table = pq.read_table(info.root / "data", columns=[camera], filters=[("index", "=", index)])
        with Image.open(io.BytesIO(table[camera][0].as_py()["bytes"])) as image:
            return np.asarray(image.convert("RGB"))
    import av

    episode = int(np.searchsorted(info.episode_starts, index, side="right")) - 1
    chunk, file, start = (column[episode] for column in _places(info, camera))
    path = _file(info, camera, chunk, file)
    seconds = start + (index - info.episode_starts[episode]) / info.fps
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        video.seek(int(seconds / stream.time_base), stream=stream)
        for frame in video.decode(stream):
            if abs(float(frame.pts * frame.time_base) - seconds) < 0.5 / info.fps:
                return frame.to_ndarray(format="rgb24")
    raise ValueError(f"{path} has no frame at {seconds:.3f} s")


def _places(info: DatasetInfo, camera: str) -> list[np.ndarray]:
    """Of each episode the chunk and the file of its video, and the second at which it starts there."""
    return read_episodes(info, [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")])


def _file(info: DatasetInfo, camera: str, chunk: int, file: int) -> Path:
    return info.root / f"videos/{camera}/chunk-{chunk:03d}/file-{file:03d}.mp4"


def read_video(file: Path, fps: float) -> tuple[list[np.ndarray], float]:
    """Frames of a video file, uint8 RGB [H, W, 3], at about `fps` per second, and how many a second has.

    A file with fewer frames per second than asked for gives all it has.

    Raises:
        ValueError: no such file, not a video, or an fps that is not above 0.
        ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise ImportError("reading videos needs PyAV: pip install av") from None

    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    try:
        with av.open(str(file)) as video:
            rate = float(video.streams.video[0].average_rate)
            step = max(rate / fps, 1.0)
            kept, frames = 0, []
            for number, frame in enumerate(video.decode(video=0)):
                if number >= kept * step:
                    frames.append(frame.to_ndarray(format="rgb24"))
                    kept += 1
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{file} cannot be read as a video: {error}") from error
    return frames, rate / step
