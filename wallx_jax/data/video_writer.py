"""Writes the MP4 files of a LeRobot dataset: one camera's episodes, encoded back to back."""

import contextlib
import os
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np

ENCODERS = {
    "libsvtav1": "libsvtav1",
    "h264": "libx264",
    "libx264": "libx264",
    "hevc": "libx265",
    "libx265": "libx265",
}
DEFAULT_OPTIONS = {
    "libsvtav1": {"preset": "12"},  # as in lerobot
    "libx264": {"x264-params": "log=-1"},
    # x265 bypasses FFmpeg's logging. Its default, open GOPs, stores the frames shown just before a key frame after it,
    # so a reader that seeks to that key frame cannot decode them.
    "libx265": {"x265-params": "log-level=none", "flags": "+cgop"},
}
PIX_FMT = "yuv420p"
COMPRESSION = 50  # raw size over encoded size, assumed until the encoder has returned its first packet


class VideoWriter:
    """Encoder of one camera that starts a new file when the current one is full.

    Frame n of a file has the time stamp n / rate, exactly.

    Attributes:
        number: index of the current file, from 0.
    """

    def __init__(
        self,
        path: Callable[[int], Path],
        size: tuple[int, int],
        rate: Fraction,
        max_bytes: float,
        codec: str,
        crf: int,
        gop: int,
        preset: int | str | None,
    ):
        """Open the first file.

        Args:
            path: maps the index of a file to its path.
            size: (height, width) of the frames in pixels, both even.
            rate: frames per second.
            max_bytes: maximum file size, exceeded only by a single larger episode.
            codec: a key of ENCODERS.
            crf: constant rate factor; lower means better and larger.
            gop: maximum distance between key frames.
            preset: speed/size preset of the encoder; None for its entry in DEFAULT_OPTIONS or its own default.

        Raises:
            ValueError: if the encoder rejects the settings.
        """
        self.path, self.size, self.rate, self.max_bytes = path, size, rate, max_bytes
        self.encoder = ENCODERS[codec]
        self.options = DEFAULT_OPTIONS[self.encoder] | {"crf": str(crf), "g": str(gop)}
        if preset is not None:
            self.options["preset"] = str(preset)
        self.number, self._time_base = -1, 1 / rate
        self._open()

    def write(self, frames: Iterable[np.ndarray], length: int) -> tuple[int, int]:
        """Encode an episode.

        Encoders buffer packets, so the sizes of the episode and of the current file are estimated from the mean packet
        size so far.

        Args:
            frames: uint8 RGB [H, W, 3] each.
            length: number of frames.

        Returns:
            Index of the file that contains the episode, and the episode's first frame in it.
        """
        if self._frames and (self._frames + length) * self._bytes_per_frame() > self.max_bytes:
            self.close()
            self._open()
        first = self._frames
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = self._frames, self._time_base
            self._encode(frame)
            self._frames += 1
        return self.number, first

    def close(self) -> None:
        """Flush the encoder and finish the current file."""
        _silence()
        self._encode(None)
        self._container.close()

    def abort(self) -> None:
        """Close the current file, complete or not."""
        with contextlib.suppress(av.FFmpegError):
            self._container.close()

    def _open(self) -> None:
        """Start the next file."""
        _silence()
        self.number += 1
        self._frames = self._packets = self._bytes = 0
        path, (height, width) = self.path(self.number), self.size
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        stream = self._container.add_stream(self.encoder, rate=self.rate, options=dict(self.options))
        self._stream = cast(av.VideoStream, stream)  # all of ENCODERS are for video
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, PIX_FMT
        self._stream.time_base = self._time_base
        try:
            self._stream.codec_context.open()
        except av.FFmpegError as error:
            self.abort()
            raise ValueError(
                f"{self.encoder} does not encode {height}x{width} frames at {float(self.rate):g} fps with "
                f"{self.options}: {error.strerror}; choose other settings or another codec"
            ) from error

    def _encode(self, frame: av.VideoFrame | None) -> None:
        """Encode a frame, or flush with None, and write the packets that come out."""
        for packet in self._stream.encode(frame):
            packet.duration = 1  # in units of 1 / rate; otherwise the last frame would have no duration
            if self.encoder == "libx265" and self._frames <= 2 and packet.pts is not None:
                # x265 leaves dts uninitialized in a stream this short; 2 is its delay in longer ones.
                packet.dts = packet.pts - 2
            self._packets += 1
            self._bytes += packet.size
            self._container.mux(packet)

    def _bytes_per_frame(self) -> float:
        height, width = self.size
        return self._bytes / self._packets if self._packets else height * width * 3 / COMPRESSION


def _silence() -> None:
    """Keep FFmpeg and the encoders from writing to stderr."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only; SVT-AV1 takes its log level only from the environment
    # lerobot reinstates FFmpeg's own log handler, which prints; this restores PyAV's, at its current level.
    av.logging.set_level(av.logging.get_level())
