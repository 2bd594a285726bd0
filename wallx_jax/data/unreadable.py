"""Training past frames that cannot be decoded."""

from collections.abc import Sequence

import numpy as np

from wallx_jax.data.errors import FrameError
from wallx_jax.data.lerobot import LeRobotSource, RawSample
from wallx_jax.data.source import FrameSource

ATTEMPTS = 100  # frames tried in the place of one before the error is raised


class SkipUnreadable:
    """A split in which another frame takes the place of each that cannot be decoded.

    Which frame that is depends on the place alone. So all other samples keep their order, whatever the number of
    workers, and a run that is resumed meets the same ones. Skipped frames are marked in the dataset's table.

    Args:
        source: a LeRobotSource, or what wraps one.
    """

    def __init__(self, source: FrameSource):
        self.source = source
        self.info, self.frames, self.table = source.info, source.frames, source.table

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"SkipUnreadable({self.source!r})"

    def __getitem__(self, i: int) -> RawSample:
        """Returns the i-th frame, or the one in its place.

        Raises:
            FrameError: neither the frame nor any of ATTEMPTS others can be decoded.
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
        return self.source[i]  # raises

    def low_dim(self, i: int) -> RawSample:
        return self.source.low_dim(i)


class SkippedFrames:
    """The frames that a run's data workers have skipped.

    Args:
        sources: the run's datasets.

    Attributes:
        count: how many there are by now.
    """

    def __init__(self, sources: Sequence[LeRobotSource]):
        self._known = [(source, set()) for source in sources]

    @property
    def count(self) -> int:
        return sum(len(known) for _, known in self._known)

    def new(self) -> list[str]:
        """Says of each frame that was skipped since the last call what is wrong with it."""
        messages = []
        for source, known in self._known:
            for frame in np.flatnonzero(source.table.unreadable).tolist():
                if frame not in known:
                    known.add(frame)
                    messages.append(_reason(source, frame))
        return messages


def _reason(source: LeRobotSource, frame: int) -> str:
    """Why a frame cannot be read, found by reading it again."""
    try:
        for camera in source.cameras:
            source.images.read(camera, frame)
    except FrameError as error:
        return f"frame skipped: {error}"
    return f"frame skipped: {source.info.repo_id}: {source.info.describe(frame)} could not be read a moment ago"
