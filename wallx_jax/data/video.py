"""Decodes frames from a dataset's video files, with a bounded number of open decoders."""

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from wallx_jax.data.errors import unreadable
from wallx_jax.data.image_columns import decode
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.spans import VideoSpans, read_spans
from wallx_jax.utils.files import is_lfs_pointer

OPEN_VIDEOS = 16  # maximum number of open decoders per process, over all readers
COLORSPACES = (Colorspace.ITU709, Colorspace.FCC, Colorspace.SMPTE240M)  # tags with other coefficients than BT.601
EARLIER_S = (0.0, 1.0, 10.0)  # offsets before the target time to seek to, tried in turn, then the start


class VideoFile:
    """An open video that returns frames by time, reading forward where that is cheaper than seeking.

    Args:
        path: the file.
        fps: the dataset's frames per second; a frame is found if it is less than half a frame interval away.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a video, or contains depth maps.
    """

    def __init__(self, path: Path, fps: float):
        self.path, self._half_frame, self._fps = path, 0.5 / fps, fps
        self._container = open_video(path)
        self._stream = self._container.streams.video[0]
        self._tick = tick(self._stream)
        context = self._stream.codec_context
        # A frame within a quarter of the video's own frame interval is the target: no other frame can be nearer.
        rates = (self._stream.average_rate, self._stream.base_rate, fps)
        self._exact = 0.25 / max(float(rate) for rate in rates if rate)
        # Random access decodes one or two frames at a time; more threads would only add frames in flight.
        context.thread_count = 1
        self._reformatter = VideoReformatter()
        self._frames: Iterator[av.VideoFrame] = iter(())  # the frames that follow
        self._last: av.VideoFrame | None = None  # the last decoded frame
        self._reach = 2  # frames decoded per seek; reading up to this many frames ahead is no slower than seeking

    def read(self, seconds: float) -> np.ndarray:
        """Decode the frame that is shown at a time, uint8 RGB [H, W, 3].

        Raises:
            ValueError: if there is no frame within half a frame interval, or it is corrupt.
            av.FFmpegError: if it cannot be decoded.
        """
        frame = self._near(seconds)
        for earlier in (*EARLIER_S, math.inf):
            if frame is not None:
                break
            self._seek(seconds - earlier)
            frame, started_late = self._search(seconds)
            if not started_late:
                break
        if frame is None:
            raise ValueError(f"{self.path} has no frame at {seconds:.3f} s")
        if frame.is_corrupt:
            raise ValueError(f"{self.path}: the frame at {seconds:.3f} s is damaged")
        return to_rgb(frame, self._reformatter)

    def _time(self, frame: av.VideoFrame) -> float:
        return float(frame.pts * self._tick)

    def _near(self, seconds: float) -> av.VideoFrame | None:
        """Return the frame if it is the last decoded one or follows soon after it, else None."""
        if self._last is None:
            return None
        distance = seconds - self._time(self._last)
        if abs(distance) < self._exact:
            return self._last
        return self._search(seconds)[0] if 0 < distance * self._fps < self._reach + 0.5 else None

    def _seek(self, seconds: float) -> None:
        """Seek to the last key frame that is not later than this time."""
        # A key frame less than half of the video's own frame interval later is still the target.
        margin = 0.5 / max(self._fps, float(self._stream.average_rate or self._fps))
        ticks = int((seconds + margin) / self._tick) - 1 if seconds > 0 else 0
        self._container.seek(ticks, stream=self._stream, backward=True)
        self._frames = (frame for frame in self._container.decode(self._stream) if frame.pts is not None)
        self._last = None

    def _search(self, seconds: float) -> tuple[av.VideoFrame | None, bool]:
        """Decode until the frame is found or passed.

        Returns:
            The frame, or None; and whether the first decoded frame was already too late.
        """
        nearest, least, started_late = None, self._half_frame, False
        for count, frame in enumerate(self._frames):
            self._last, offset = frame, self._time(frame) - seconds
            if abs(offset) < least:
                nearest, least = frame, abs(offset)
                self._reach = max(self._reach, count)
            started_late |= count == 0 and offset > self._half_frame
            if offset >= 0 or abs(offset) < self._exact:
                break
        return nearest, started_late


def check_size(image: np.ndarray, promised: tuple[int, int]) -> None:
    """Check that an image has the (height, width) given in meta/info.json.

    Raises:
        ValueError: if it has another size.
    """
    if image.shape[:2] != promised:
        found, said = (f"{height}x{width}" for height, width in (image.shape[:2], promised))
        raise ValueError(f"the image is {found} (height x width), meta/info.json says {said}")


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Convert a decoded frame to uint8 RGB [H, W, 3], using the coefficients of its color space tag.

    Untagged frames are treated as BT.601, as is common. lerobot's "torchcodec" backend respects the tag, its "pyav"
    backend does not.
    """
    colors = {}
    if frame.colorspace in COLORSPACES:  # RGB has no coefficients, but PyAV converts only if the two differ
        colors = {
            "src_colorspace": frame.colorspace,
            "dst_colorspace": Colorspace.ITU601,
            "src_color_range": frame.color_range,
            "dst_color_range": ColorRange.JPEG,
        }
    return reformatter.reformat(frame, format="rgb24", **colors).to_ndarray()


class VideoReader:
    """Reads frames of many video files; thread-safe.

    All readers of a process share OPEN_VIDEOS decoders.

    Args:
        fps: the dataset's frames per second.
    """

    _open: OrderedDict[tuple[int, Path], tuple[VideoFile, threading.Lock]] = OrderedDict()
    _open_lock = threading.Lock()
    _numbers = itertools.count()

    def __init__(self, fps: float):
        self._fps = fps
        # Part of the cache key, so that a file replaced since another reader opened it is reopened.
        self._number = next(self._numbers)

    def read(self, path: Path, seconds: float) -> np.ndarray:
        """Decode the frame that is shown at a time, uint8 RGB [H, W, 3].

        Raises:
            FileNotFoundError: see `VideoFile`.
            ValueError: see `VideoFile` and `VideoFile.read`.
            av.FFmpegError: see `VideoFile.read`.
        """
        video, lock = self._get(path)
        with lock:
            return video.read(seconds)

    def _get(self, path: Path) -> tuple[VideoFile, threading.Lock]:
        key = (self._number, path)
        with self._open_lock:
            if key not in self._open:
                while len(self._open) >= OPEN_VIDEOS:
                    self._open.popitem(last=False)  # closed once no thread reads from it
                self._open[key] = VideoFile(path, self._fps), threading.Lock()
            self._open.move_to_end(key)
            return self._open[key]


def place_in_video(info: DatasetInfo, camera: str, spans: VideoSpans, frame: int) -> tuple[Path, float]:
    """Return the video file that contains a frame, and the frame's time in it in seconds.

    Raises:
        ValueError: if the dataset has no such frame.
    """
    _check_frame(info, frame)
    episode, place = info.locate(frame)
    file = info.root / info.video_file(camera, spans.chunk[episode], spans.file[episode])
    return file, float(spans.start[episode] + place / info.fps)


def _check_frame(info: DatasetInfo, frame: int) -> None:
    """Refuse a frame that does not exist: its time would be that of a frame of another episode in the same file."""
    if not 0 <= frame < info.num_frames:
        raise ValueError(
            f"{info.root}: frame {frame} is asked for, but the {info.num_episodes} episodes in use have "
            f"{info.num_frames} frames, 0 to {info.num_frames - 1}"
        )


def video_runs(info: DatasetInfo, spans: VideoSpans) -> Iterator[np.ndarray]:
    """Yield the frames of each of a camera's video files, in the order in which they are stored, int [n]."""
    order = np.lexsort((spans.start, spans.file, spans.chunk))
    files = np.stack([spans.chunk, spans.file])[:, order]
    for episodes in np.split(order, np.flatnonzero(np.diff(files).any(axis=0)) + 1):
        yield np.concatenate([info.episode_starts[e] + np.arange(info.episode_lengths[e]) for e in episodes])


def decode_in_order(
    info: DatasetInfo, camera: str, frames: Iterable[int] | None = None, spans: VideoSpans | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode frames of a camera's videos from front to back, at a fraction of the cost of random access.

    Args:
        info: the dataset.
        camera: the camera key.
        frames: the frames, in the order of `video_runs`; None for all.
        spans: result of `read_spans`; None to read them.

    Yields:
        The frame number and its image, uint8 RGB [H, W, 3].

    Raises:
        ValueError: if the dataset has no such frame.
        FrameError: naming dataset, episode, frame and file.
    """
    spans = read_spans(info, camera) if spans is None else spans
    video, size = None, info.frame_size(camera)
    for frame in itertools.chain.from_iterable(video_runs(info, spans)) if frames is None else frames:
        file, seconds = place_in_video(info, camera, spans, frame)
        try:
            if video is None or video.path != file:
                video = VideoFile(file, info.fps)
            image = video.read(seconds)
            check_size(image, size)
        except Exception as error:  # decoders raise arbitrary exceptions
            raise unreadable(camera, file, info.repo_id, info.describe(frame), error) from error
        yield int(frame), image


def read_frame(info: DatasetInfo, camera: str, frame: int) -> np.ndarray:
    """Read the image of one frame, uint8 RGB [H, W, 3], even if other parts of the dataset are damaged.

    Raises:
        ValueError: if the dataset has no such camera or frame.
        FrameError: naming dataset, episode, frame and file.
    """
    info.check_camera(camera)
    _check_frame(info, frame)
    if info.is_video(camera):
        return next(decode_in_order(info, camera, [frame]))[1]
    episode, place = info.locate(frame)
    keys = [("episode_index", "=", info.episode_numbers[episode]), ("frame_index", "=", place)]
    folder = info.root / "data"
    try:
        return decode(pq.read_table(folder, columns=[camera], filters=keys)[camera][0].as_py(), info.root)
    except Exception as error:
        raise unreadable(camera, folder, info.repo_id, info.describe(frame), error) from error


def open_video(path: Path) -> av.container.InputContainer:
    """Open a video file.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is a Git LFS pointer, not a video, cut off, of an unsupported codec, or contains depth maps.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'a folder, no video' if path.is_dir() else 'missing'}")
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is a Git LFS pointer, not the video; fetch it with `git lfs pull`")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path} cannot be opened as a video: {error.strerror or error}") from None
    if not container.streams.video or container.format.name.endswith("_pipe"):  # a still image
        container.close()
        raise ValueError(f"{path} has no video stream: it is cut off or no video")
    if container.streams.video[0].codec_context is None:
        container.close()
        raise ValueError(f"{path} is of a codec that the installed PyAV does not decode, or damaged")
    if _is_cut_off(path):
        container.close()
        raise ValueError(f"{path} is cut off; copy it again")
    pixels = container.streams.video[0].codec_context.pix_fmt
    if pixels and pixels.startswith("gray") and pixels != "gray":
        container.close()
        raise ValueError(f"{path} holds depth maps ({pixels}); choose a color camera")
    return container


def tick(stream: av.VideoStream) -> Fraction:
    """Return the unit of a stream's time stamps in seconds; FFmpeg's own for a stream that does not name one."""
    return stream.time_base or Fraction(1, av.time_base)


def _is_cut_off(path: Path) -> bool:
    """Return whether an MP4 file ends before its last box does; False for other formats."""
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while start < size:
            file.seek(start)
            header = file.read(16)
            if start == 0 and header[4:8] != b"ftyp":
                return False
            length = int.from_bytes(header[:4], "big")
            if length == 1:  # 64-bit box size
                length = int.from_bytes(header[8:16], "big")
            if length == 0:  # box extends to the end of the file
                return False
            start += max(length, 8)
    return start > size


def read_video(file: Path, fps: float) -> tuple[list[np.ndarray], float]:
    """Read the frames of a video file, uint8 RGB [H, W, 3], at about `fps` per second.

    Returns:
        The frames and their actual rate per second. A file with a lower frame rate than `fps` returns all of its
        frames.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a video, or `fps` is not above 0.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    with open_video(Path(file)) as video:
        try:
            rate = float(video.streams.video[0].average_rate or fps)
            step = max(rate / fps, 1.0)
            kept, frames, reformatter = 0, [], VideoReformatter()
            for number, frame in enumerate(video.decode(video=0)):
                if number >= kept * step:
                    frames.append(to_rgb(frame, reformatter))
                    kept += 1
        except av.FFmpegError as error:
            raise ValueError(f"{file} cannot be decoded: {error.strerror or error}") from error
    return frames, rate / step
