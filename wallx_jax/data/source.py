"""What the pipeline reads frames from."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from wallx_jax.data.lerobot import RawSample
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.tables import FrameTable


class FrameSource(Protocol):
    """The frames of a split by their place in it: LeRobotSource, and what wraps it.

    Attributes:
        info: the dataset.
        frames: the frames of the dataset that the split has, int64 [n] or a range.
        table: the tables of the whole dataset.
    """

    info: DatasetInfo
    frames: Sequence[int] | np.ndarray
    table: FrameTable

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> RawSample: ...

    def low_dim(self, i: int) -> RawSample: ...
