"""Check from their headers, without decoding, that video files contain the frames that the metadata places in them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.spans import read_spans
from wallx_jax.data.video import open_video, place_in_video, tick, video_runs

OPENED = 16  # number of headers read concurrently


@dataclass(frozen=True)
class Problem:
    """A problem with a video file.

    Attributes:
        camera: key of the camera.
        message: the problem; names the file.
        remedy: what to do, as a clause.
        certain: whether images are certain to be missing or wrong.
    """

    camera: str
    message: str
    remedy: str = "copy the file again, or leave its episodes out with the setting `episodes`"
    certain: bool = True


def problems(source: LeRobotSource, only_present: bool = False) -> Iterator[Problem]:
    """Yield the problems of the video files of the source's cameras.

    Args:
        source: the dataset.
        only_present: skip missing files, for a dataset that is not fetched yet.
    """
    info = source.info
    for camera in filter(info.is_video, source.cameras):
        spans = read_spans(info, camera)
        runs = [(*place_in_video(info, camera, spans, int(frames[-1])), frames) for frames in video_runs(info, spans)]
        wanted = [(camera, *run) for run in runs if run[0].is_file() or not only_present]
        with ThreadPoolExecutor(OPENED) as pool:
            for problem in pool.map(lambda run: _problem(info, *run), wanted):
                if problem is not None:
                    yield problem


def _problem(info: DatasetInfo, camera: str, file: Path, seconds: float, frames: np.ndarray) -> Problem | None:
    """Check a video file that should contain `frames`, the last of them at `seconds` from its start."""
    try:
        container = open_video(file)
    except (OSError, ValueError) as error:
        return Problem(camera, str(error))
    with container:
        stream = container.streams.video[0]
        start = float((stream.start_time or 0) * tick(stream))
        length, rate = _seconds(container, stream, info.fps), float(stream.average_rate or info.fps)
        size, counted = (stream.height, stream.width), stream.frames
    half_frame, promised = 0.5 / info.fps, info.frame_size(camera)
    if size != promised and all(size):
        return Problem(
            camera,
            f"{file} has frames of {size[0]}x{size[1]} (height x width), meta/info.json says "
            f"{promised[0]}x{promised[1]}",
            "correct meta/info.json, or encode the camera anew",
        )
    if abs(start) > half_frame:
        return Problem(camera, f"{file} begins at {start:g} s instead of 0", "encode the camera anew")
    each = max(round(rate / info.fps), 1)  # video frames per dataset frame
    if abs(seconds - seconds * each * info.fps / rate) > half_frame and counted != 1:  # a single frame has no rate
        return Problem(
            camera,
            f"{file} has {rate:.6g} frames per second, meta/info.json says {info.fps:.6g}: images would drift away "
            "from their states",
            "correct `fps` there or encode the camera anew, whichever is wrong",
        )
    if length is not None and length < seconds + half_frame:
        return Problem(
            camera, f"{file} ends at {length:.2f} s, but meta/episodes places a frame in it at {seconds:.2f} s"
        )
    if info.whole and counted and counted > each * (len(frames) + 0.5):
        return Problem(
            camera,
            f"{file} has {counted} frames, meta/episodes counts {len(frames)} in it",
            "fine if the surplus stands at an episode's end; elsewhere images do not belong to their states: look at "
            "them with scripts/inspect_batch.py",
            certain=False,
        )
    return None


def _seconds(container: av.container.InputContainer, stream: av.VideoStream, fps: float) -> float | None:
    """Return the duration of a video in seconds, if its header contains it."""
    if stream.duration is not None:
        return float(stream.duration * tick(stream))
    if container.duration is not None:
        return container.duration / av.time_base
    return stream.frames / fps if stream.frames else None
