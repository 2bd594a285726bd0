"""Defines the interface through which the pipeline reads frames."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from wallx_jax.data.lerobot import RawSample
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.tables import FrameTable


class FrameSource(Protocol):
    """Random access to the frames of a split by position; implemented by LeRobotSource and its wrappers.

    Attributes:
        info: the dataset.
        frames: frames of the dataset that belong to the split, int64 [n] or a range.
        table: tables of the whole dataset.
    """

    @property
    def info(self) -> DatasetInfo: ...

    @property
    def frames(self) -> Sequence[int] | np.ndarray: ...

    @property
    def table(self) -> FrameTable: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> RawSample: ...

    def low_dim(self, i: int) -> RawSample: ...
