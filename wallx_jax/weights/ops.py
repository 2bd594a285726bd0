"""Convert a tensor between the layouts of PyTorch and of our parameters; all operations are exactly invertible.

They return views of NumPy arrays (and also accept JAX arrays), so a tensor is copied only once, from the file to its
destination, by `copy`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from wallx_jax.models.config import VisionConfig

Shape = tuple[int, ...]


class Op(Protocol):
    """Change of layout between a PyTorch tensor and a parameter, or one layer of a stacked one.

    `torch_shape` returns the shape in the file for a parameter of shape `shape`; `to_jax` and `to_torch` are inverses,
    bit for bit.
    """

    def torch_shape(self, shape: Shape, vision: VisionConfig) -> Shape: ...
    def to_jax(self, x: Any) -> Any: ...
    def to_torch(self, x: Any, vision: VisionConfig) -> Any: ...


@dataclass(frozen=True)
class Identity:
    """Same layout on both sides: biases, norm scales and the embedding table."""

    def torch_shape(self, shape: Shape, vision: VisionConfig) -> Shape:
        return shape

    def to_jax(self, x: Any) -> Any:
        return x

    def to_torch(self, x: Any, vision: VisionConfig) -> Any:
        return x


@dataclass(frozen=True)
class Linear:
    """Transpose between torch.nn.Linear's weight [out, in] and our kernel [in, out]."""

    def torch_shape(self, shape: Shape, vision: VisionConfig) -> Shape:
        return shape[::-1]

    def to_jax(self, x: Any) -> Any:
        return x.T

    def to_torch(self, x: Any, vision: VisionConfig) -> Any:
        return x.T


@dataclass(frozen=True)
class Conv3d:
    """Reshape between the patch embedding's weight [out, channel, frame, y, x] and our kernel [patch_dim, out].

    The stride of the convolution equals its kernel size, so it is a matrix product over flattened patches.
    """

    def torch_shape(self, shape: Shape, vision: VisionConfig) -> Shape:
        return (shape[1], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)

    def to_jax(self, x: Any) -> Any:
        return x.reshape(x.shape[0], -1).T

    def to_torch(self, x: Any, vision: VisionConfig) -> Any:
        return x.T.reshape(self.torch_shape(x.shape, vision))


def copy(target: np.ndarray, source: np.ndarray, block: int = 256) -> None:
    """Copy source to target, a matrix in blocks that fit the CPU cache: half the time for a transposed source."""
    if source.ndim != 2:
        target[...] = source
        return
    for i in range(0, source.shape[0], block):
        for j in range(0, source.shape[1], block):
            target[i : i + block, j : j + block] = source[i : i + block, j : j + block]
