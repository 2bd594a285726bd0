"""Frames of a dataset's video files, with a bounded number of open decoders."""

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
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

OPEN_VIDEOS = 16  # decoders that a process keeps open, of all its readers together
COLORSPACES = (Colorspace.ITU709, Colorspace.FCC, Colorspace.SMPTE240M)  # tags that ask for other coefficients
EARLIER_S = (0.0, 1.0, 10.0)  # how far before the wanted time to seek, in turn; then the start of the file


class VideoFile:
    """One open video: frames by time, read forward where that is cheaper than seeking.

    Args:
        path: the file.
        fps: frames per second of the dataset; a frame is found if it is less than half a frame away.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: no video, or one that holds depth maps.
    """

    def __init__(self, path: Path, fps: float):
        self.path, self._half_frame, self._fps = path, 0.5 / fps, fps
        self._container = open_video(path)
        self._stream = self._container.streams.video[0]
        context = self._stream.codec_context
        # Within a quarter of the video's own frames a frame is the one that was meant: the next cannot be nearer.
        rates = (self._stream.average_rate, self._stream.base_rate, fps)
        self._exact = 0.25 / max(float(rate) for rate in rates if rate)
        # Random access decodes a frame or two at a time: more threads would only add frames in flight.
        context.thread_count = 1
        self._reformatter = VideoReformatter()
        self._frames: Iterator[av.VideoFrame] = iter(())  # what follows
        self._last: av.VideoFrame | None = None  # decoded last
        self._reach = 2  # frames that a seek may cost: up to so many ahead, decoding them is not slower

    def read(self, seconds: float) -> np.ndarray:
        """Returns the frame that is shown at this time, uint8 RGB [H, W, 3].

        Raises:
            ValueError: there is none within half a frame, or it is damaged.
            av.FFmpegError: it cannot be decoded.
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
        return float(frame.pts * self._stream.time_base)

    def _near(self, seconds: float) -> av.VideoFrame | None:
        """The frame, if it was decoded last or follows soon after that."""
        if self._last is None:
            return None
        distance = seconds - self._time(self._last)
        if abs(distance) < self._exact:
            return self._last
        return self._search(seconds)[0] if 0 < distance * self._fps < self._reach + 0.5 else None

    def _seek(self, seconds: float) -> None:
        """Goes to the last key frame that is not later."""
        # A key frame that is less than half of the video's own frames later still is the wanted one.
        margin = 0.5 / max(self._fps, float(self._stream.average_rate or self._fps))
        ticks = int((seconds + margin) / self._stream.time_base) - 1 if seconds > 0 else 0
        self._container.seek(ticks, stream=self._stream, backward=True)
        self._frames = (frame for frame in self._container.decode(self._stream) if frame.pts is not None)
        self._last = None

    def _search(self, seconds: float) -> tuple[av.VideoFrame | None, bool]:
        """Decodes until the frame is found or passed; tells also whether the first frame was too late already."""
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
    """Raises ValueError unless an image has the (height, width) that meta/info.json promises."""
    if image.shape[:2] != promised:
        found, said = (f"{height}x{width}" for height, width in (image.shape[:2], promised))
        raise ValueError(f"the image is {found} (height x width), meta/info.json says {said}")


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Converts a decoded frame to uint8 RGB [H, W, 3], with the coefficients of the color space that it is tagged with.

    Untagged frames count as BT.601, as everywhere. lerobot's "torchcodec" heeds the tag, its "pyav" does not.
    """
    colors = {}
    if frame.colorspace in COLORSPACES:  # RGB has none, but PyAV acts on a difference alone
        colors = {
            "src_colorspace": frame.colorspace,
            "dst_colorspace": Colorspace.ITU601,
            "src_color_range": frame.color_range,
            "dst_color_range": ColorRange.JPEG,
        }
    return reformatter.reformat(frame, format="rgb24", **colors).to_ndarray()


class VideoReader:
    """Frames of many video files. All readers of a process share OPEN_VIDEOS decoders; safe to use from threads."""

    _open: OrderedDict[tuple[int, Path], tuple[VideoFile, threading.Lock]] = OrderedDict()
    _open_lock = threading.Lock()
    _numbers = itertools.count()

    def __init__(self, fps: float):
        self._fps = fps
        # A file that was replaced since another reader opened it is opened anew.
        self._number = next(self._numbers)

    def read(self, path: Path, seconds: float) -> np.ndarray:
        """Returns the frame that is shown at this time, uint8 RGB [H, W, 3]; raises as `VideoFile`."""
        video, lock = self._get(path)
        with lock:
            return video.read(seconds)

    def _get(self, path: Path) -> tuple[VideoFile, threading.Lock]:
        key = (self._number, path)
        with self._open_lock:
            if key not in self._open:
                while len(self._open) >= OPEN_VIDEOS:
                    self._open.popitem(last=False)  # closed as soon as no other thread reads from it
                self._open[key] = VideoFile(path, self._fps), threading.Lock()
            self._open.move_to_end(key)
            return self._open[key]


def place_in_video(info: DatasetInfo, camera: str, spans: VideoSpans, frame: int) -> tuple[Path, float]:
    """Returns the video file that shows a frame, and the seconds at which it does."""
    episode, place = info.locate(frame)
    file = info.root / info.video_file(camera, spans.chunk[episode], spans.file[episode])
    return file, float(spans.start[episode] + place / info.fps)


def video_runs(info: DatasetInfo, spans: VideoSpans) -> Iterator[np.ndarray]:
    """Yields for each video file of a camera its frames in the order in which it shows them, int [n]."""
    order = np.lexsort((spans.start, spans.file, spans.chunk))
    files = np.stack([spans.chunk, spans.file])[:, order]
    for episodes in np.split(order, np.flatnonzero(np.diff(files).any(axis=0)) + 1):
        yield np.concatenate([info.episode_starts[e] + np.arange(info.episode_lengths[e]) for e in episodes])


def decode_in_order(
    info: DatasetInfo, camera: str, frames: Iterable[int] | None = None, spans: VideoSpans | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Decodes frames of a camera's videos from front to back, which costs a fraction of random access.

    Args:
        frames: which ones, in the order of `video_runs`; None: all.
        spans: what `read_spans` gives.

    Yields:
        the frame and its image, uint8 RGB [H, W, 3].

    Raises:
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
        except Exception as error:  # decoders raise what they like
            raise unreadable(camera, file, info.repo_id, info.describe(frame), error) from error
        yield int(frame), image


def read_frame(info: DatasetInfo, camera: str, frame: int) -> np.ndarray:
    """Reads the image of one frame, uint8 RGB [H, W, 3], whatever state the rest of the dataset is in.

    Raises:
        ValueError: the dataset has no such camera or no such frame.
        FrameError: naming dataset, episode, frame and file.
    """
    info.check_camera(camera)
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
    """Opens a file that has a video stream.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is a Git LFS pointer, no video, or one of depth maps.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'a folder, no video' if path.is_dir() else 'missing'}")
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is a Git LFS pointer, not the video; fetch it with `git lfs pull`")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path} cannot be opened as a video: {error.strerror or error}") from None
    if not container.streams.video or container.format.name.endswith("_pipe"):  # a single picture
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


def _is_cut_off(path: Path) -> bool:
    """Whether an MP4 file ends before its boxes do; other files: no."""
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while start < size:
            file.seek(start)
            header = file.read(16)
            if start == 0 and header[4:8] != b"ftyp":
                return False
            length = int.from_bytes(header[:4], "big")
            if length == 1:  # a long box
                length = int.from_bytes(header[8:16], "big")
            if length == 0:  # to the end of the file
                return False
            start += max(length, 8)
    return start > size


def read_video(file: Path, fps: float) -> tuple[list[np.ndarray], float]:
    """Reads the frames of a video file, uint8 RGB [H, W, 3], at about `fps` per second.

    Returns:
        the frames, and how many of them a second has: a file with fewer frames per second than asked for gives all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, or an fps that is not above 0.
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
