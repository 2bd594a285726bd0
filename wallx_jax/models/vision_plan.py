"""Where each patch sits: the vision tower's static geometry, worked out in NumPy at trace time.

Qwen2.5-VL lets patches attend inside windows of `window_size` pixels, and inside the whole frame in a few layers.
We keep a frame's patches sorted by window, windows of equal size together, so that windowed attention is a
reshape: no gather, no padding, no mask. Attention does not depend on the order; the rotary angles travel along.
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
    """One frame of a given size.

    order: int [P], the patch (in merge order, 2x2 blocks contiguous) that stands at each place.
    restore: int [P / merge^2], the place of each merged cell, to go back to row-major order after the merger.
    angles: float32 [P, H] rotary angles in the new order.
    windows: (how many, patches in each) per window size, in the new order.
    """

    order: np.ndarray
    restore: np.ndarray
    angles: np.ndarray
    windows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FrameRun:
    """Consecutive frames of the same size, which the tower handles as one more batch axis."""

    count: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns


def frame_runs(grids: tuple[Grid, ...]) -> tuple[FrameRun, ...]:
    """Grids of all images and videos in order -> runs of equal frames."""
    sizes = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    return tuple(FrameRun(len(list(run)), *size) for size, run in groupby(sizes))


def token_count(grid: Grid, config: VisionConfig) -> int:
    """Decoder tokens of one image or video."""
    return grid[0] * grid[1] * grid[2] // config.spatial_merge_size**2


@functools.cache
def plan_frame(rows: int, columns: int, config: VisionConfig) -> FramePlan:
    """Plans one frame of rows x columns patches. Raises ValueError when it does not divide into merged cells."""
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
    inner = np.indices((merge, merge)).reshape(2, -1)  # patch inside its cell
    coordinates = np.stack([cell_rows, cell_columns])[:, :, None] * merge + inner[:, None, :]
    angles = vision_angles(coordinates.reshape(2, -1).T, config.hidden_size // config.num_heads, config.rope_theta)
    return FramePlan(order, np.argsort(cell_order), angles[order], windows)
