"""Do the video files hold the frames that the metadata places in them? Asked of their headers; nothing is decoded."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.spans import read_spans
from wallx_jax.data.video import open_video, place_in_video, video_runs

OPENED = 16  # headers that are read at a time


@dataclass(frozen=True)
class Problem:
    """Something wrong with a video file.

    Attributes:
        message: what is wrong; names the file.
        remedy: what to do, in a clause.
        certain: whether images are missing or wrong for certain.
    """

    camera: str
    message: str
    remedy: str = "copy the file again, or leave its episodes out with the setting `episodes`"
    certain: bool = True


def problems(source: LeRobotSource, only_present: bool = False) -> Iterator[Problem]:
    """Yields what is wrong with the video files of the source's cameras.

    Args:
        only_present: pass over files that are missing, of a dataset that is not fetched yet.
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
    """What is wrong with a video file that holds these frames, the last of which is shown at `seconds`."""
    try:
        container = open_video(file)
    except (OSError, ValueError) as error:
        return Problem(camera, str(error))
    with container:
        stream = container.streams.video[0]
        start = float((stream.start_time or 0) * stream.time_base)
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
    each = max(round(rate / info.fps), 1)  # frames of the video for one of the dataset
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
    """Duration of a video, if its header says it."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    return stream.frames / fps if stream.frames else None
