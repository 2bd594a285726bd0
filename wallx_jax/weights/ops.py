"""How one PyTorch tensor is laid out as a parameter; every operation has an exact inverse and moves no data itself.

Each gives views (NumPy or JAX), so what is read from a file is copied once, into its place, by `copy`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from wallx_jax.models.config import VisionConfig

Shape = tuple[int, ...]


class Op(Protocol):
    """`torch_shape` is the file's shape of a parameter of shape `shape`; the others undo each other bit for bit."""

    def torch_shape(self, shape: Shape, vision: VisionConfig) -> Shape: ...
    def to_jax(self, x: Any) -> Any: ...
    def to_torch(self, x: Any, vision: VisionConfig) -> Any: ...


@dataclass(frozen=True)
class Identity:
    """Biases, norm scales and the embedding table are the same on both sides."""

    def torch_shape(self, shape: Shape, vision: VisionConfig) -> Shape:
        return shape

    def to_jax(self, x: Any) -> Any:
        return x

    def to_torch(self, x: Any, vision: VisionConfig) -> Any:
        return x


@dataclass(frozen=True)
class Linear:
    """torch.nn.Linear keeps [out, in]; kernels are [in, out]."""

    def torch_shape(self, shape: Shape, vision: VisionConfig) -> Shape:
        return shape[::-1]

    def to_jax(self, x: Any) -> Any:
        return x.T

    def to_torch(self, x: Any, vision: VisionConfig) -> Any:
        return x.T


@dataclass(frozen=True)
class Conv3d:
    """The patch embedding: its stride is its kernel, so [out, channel, frame, y, x] is a matrix [patch_dim, out]."""

    def torch_shape(self, shape: Shape, vision: VisionConfig) -> Shape:
        return (shape[1], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)

    def to_jax(self, x: Any) -> Any:
        return x.reshape(x.shape[0], -1).T

    def to_torch(self, x: Any, vision: VisionConfig) -> Any:
        return x.T.reshape(self.torch_shape(x.shape, vision))


def copy(target: np.ndarray, source: np.ndarray, block: int = 256) -> None:
    """target[...] = source, in blocks that fit the cache: a transposed matrix costs half the time."""
    if source.ndim != 2:
        target[...] = source
        return
    for i in range(0, source.shape[0], block):
        for j in range(0, source.shape[1], block):
            target[i : i + block, j : j + block] = source[i : i + block, j : j + block]
