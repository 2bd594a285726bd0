"""Do the video files hold the frames that the metadata places in them? Asked of their headers; nothing is decoded."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av

from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.spans import read_spans
from wallx_jax.data.video import open_video, place_in_video, video_runs

OPENED = 16  # headers that are read at a time


def problems(source: LeRobotSource, only_present: bool = False) -> Iterator[tuple[str, str]]:
    """Yields (camera, what is wrong) of each video file of the source's cameras that does not hold its frames.

    Args:
        only_present: pass over files that are missing, of a dataset that is not fetched yet.
    """
    info = source.info
    for camera in filter(info.is_video, source.cameras):
        spans = read_spans(info, camera)
        last = [place_in_video(info, camera, spans, int(frames[-1])) for frames in video_runs(info, spans)]
        wanted = [(file, seconds) for file, seconds in last if file.is_file() or not only_present]
        with ThreadPoolExecutor(OPENED) as pool:
            for problem in pool.map(lambda place: _problem(info, *place), wanted):
                if problem is not None:
                    yield camera, problem


def _problem(info: DatasetInfo, file: Path, seconds: float) -> str | None:
    """What is wrong with a video file whose last frame is shown at `seconds`."""
    try:
        container = open_video(file)
    except (OSError, ValueError) as error:
        return str(error)
    with container:
        stream = container.streams.video[0]
        start = float((stream.start_time or 0) * stream.time_base)
        length, rate = _seconds(container, stream, info.fps), float(stream.average_rate or info.fps)
        single = stream.frames == 1  # has no rate
    half_frame = 0.5 / info.fps
    if abs(start) > half_frame:
        return f"{file} begins at {start:g} s instead of 0"
    if rate < 0.99 * info.fps and not single:
        return f"{file} has {rate:g} frames per second, the dataset {info.fps:g}"
    if length is not None and length < seconds + half_frame:
        return f"{file} ends at {length:.2f} s, but meta/episodes places a frame in it at {seconds:.2f} s"
    return None


def _seconds(container: av.container.InputContainer, stream: av.VideoStream, fps: float) -> float | None:
    """Duration of a video, if its header says it."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    return stream.frames / fps if stream.frames else None
