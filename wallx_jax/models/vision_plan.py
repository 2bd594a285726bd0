"""Compute the static geometry of the vision tower, in NumPy at trace time: patch order, windows and rotary angles.

Qwen2.5-VL's patches attend within windows of `window_size` pixels, and within the whole frame in a few layers.
We sort the patches of a frame by window, with windows of equal size adjacent, so that windowed attention is a reshape:
no gather, no padding, no mask. Attention does not depend on the order, since the rotary angles are sorted likewise.
"""

import functools
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from wallx_jax.models.config import VisionConfig
from wallx_jax.models.rope import vision_angles

Grid = tuple[int, int, int]  # (frames, rows, columns) of patches, before merging; a still image has one frame


@dataclass(frozen=True)
class FramePlan:
    """Patch order, rotary angles and windows of a frame; P is the number of patches in it, H the head dim.

    Attributes:
        order: int [P], index in merge order (2x2 cells contiguous) of the patch at each position.
        restore: int [P / merge^2], position of each merged cell, to restore row-major order after the merger.
        angles: float32 [P, H], rotary angles in the new order.
        windows: (number of windows, patches per window) for each window size, in the new order.
    """

    order: np.ndarray
    restore: np.ndarray
    angles: np.ndarray
    windows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FrameRun:
    """Consecutive frames of equal size, which the tower folds into the batch axis.

    Attributes:
        count: number of frames.
        rows: rows of patches in a frame.
        columns: columns of patches in a frame.
    """

    count: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns


def frame_runs(grids: tuple[Grid, ...]) -> tuple[FrameRun, ...]:
    """Group the frames of all images and videos, in order, into runs of equal size."""
    sizes = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    return tuple(FrameRun(len(list(run)), *size) for size, run in groupby(sizes))


def token_count(grid: Grid, config: VisionConfig) -> int:
    """Return the number of decoder tokens of an image or video."""
    return grid[0] * grid[1] * grid[2] // config.spatial_merge_size**2


@functools.cache
def plan_frame(rows: int, columns: int, config: VisionConfig) -> FramePlan:
    """Plan a frame of rows x columns patches.

    Raises:
        ValueError: if rows or columns is not a multiple of `spatial_merge_size`.
    """
    merge = config.spatial_merge_size
    if rows % merge or columns % merge:
        raise ValueError(f"an image grid of {rows}x{columns} patches must be a multiple of {merge} on both sides")
    cell_rows, cell_columns = np.indices((rows // merge, columns // merge)).reshape(2, -1)
    side = config.window_size // merge // config.patch_size  # merged cells per window side
    window = cell_rows // side * columns + cell_columns // side
    size_of_window = np.bincount(window)
    cell_order = np.lexsort((np.arange(len(window)), window, -size_of_window[window]))
    sizes = size_of_window[window][cell_order] * merge**2  # patches in each cell's window
    windows = tuple((len(list(run)) * merge**2 // size, int(size)) for size, run in groupby(sizes.tolist()))

    order = (cell_order[:, None] * merge**2 + np.arange(merge**2)).reshape(-1)
    inner = np.indices((merge, merge)).reshape(2, -1)  # position of a patch within its cell
    coordinates = np.stack([cell_rows, cell_columns])[:, :, None] * merge + inner[:, None, :]
    angles = vision_angles(coordinates.reshape(2, -1).T, config.hidden_size // config.num_heads, config.rope_theta)
    return FramePlan(order, np.argsort(cell_order), angles[order], windows)
