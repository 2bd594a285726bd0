"""Lets training continue past frames that cannot be decoded, by replacing them with other frames."""

from collections.abc import Sequence

import numpy as np

from wallx_jax.data.errors import FrameError
from wallx_jax.data.lerobot import LeRobotSource, RawSample
from wallx_jax.data.source import FrameSource

ATTEMPTS = 100  # replacement frames tried before the error is raised


class SkipUnreadable:
    """A split in which every frame that cannot be decoded is replaced by another one.

    The replacement depends only on the position, so all other samples keep their order whatever the number of workers,
    and a resumed run sees the same samples. Skipped frames are marked in the dataset's table.

    Args:
        source: a LeRobotSource or a wrapper of one.
    """

    def __init__(self, source: FrameSource):
        self.source = source
        self.info, self.frames, self.table = source.info, source.frames, source.table

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"SkipUnreadable({self.source!r})"

    def __getitem__(self, i: int) -> RawSample:
        """Return the i-th frame or its replacement.

        Raises:
            FrameError: if neither the frame nor any of ATTEMPTS others can be decoded.
        """
        others = np.random.default_rng(i).integers(len(self), size=ATTEMPTS)
        for place in (i, *others.tolist()):
            frame = int(self.frames[place])
            if self.table.unreadable[frame]:
                continue
            try:
                return self.source[place]
            except FrameError:
                self.table.mark_unreadable(frame)
        return self.source[i]  # raises the FrameError

    def low_dim(self, i: int) -> RawSample:
        return self.source.low_dim(i)


class SkippedFrames:
    """Tracks the frames that a run's data workers have skipped.

    Args:
        sources: the run's datasets.

    Attributes:
        count: number of frames reported so far.
    """

    def __init__(self, sources: Sequence[LeRobotSource]):
        self._known: list[tuple[LeRobotSource, set[int]]] = [(source, set()) for source in sources]

    @property
    def count(self) -> int:
        return sum(len(known) for _, known in self._known)

    def new(self) -> list[str]:
        """Return a message for each frame skipped since the last call, with the reason."""
        messages = []
        for source, known in self._known:
            for frame in np.flatnonzero(source.table.unreadable).tolist():
                if frame not in known:
                    known.add(frame)
                    messages.append(_reason(source, frame))
        return messages


def _reason(source: LeRobotSource, frame: int) -> str:
    """Return why a frame cannot be read, by reading it again."""
    try:
        for camera in source.cameras:
            source.images.read(camera, frame)
    except FrameError as error:
        return f"frame skipped: {error}"
    return f"frame skipped: {source.info.repo_id}: {source.info.describe(frame)} could not be read a moment ago"
