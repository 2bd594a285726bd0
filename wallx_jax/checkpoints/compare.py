"""Compare two models, each a PyTorch directory or a checkpoint, by tensor names, shapes, dtypes and values."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from wallx_jax.checkpoints.source import open_source
from wallx_jax.checkpoints.stream import ModelReader
from wallx_jax.weights import names
from wallx_jax.weights.safetensors_io import DTYPE_NAMES, Tensors, open_tensors

BLOCK = 1 << 24  # values compared at a time


@dataclass
class Comparison:
    """Differences between two models, with tensors under Wall-X's names.

    Attributes:
        only_a: names that only model A has.
        only_b: names that only model B has.
        shapes: {name: (shape in A, shape in B)} where they differ; the values of these tensors are not compared.
        dtypes: {name: (dtype in A, dtype in B)} where they differ; the values are compared nevertheless.
        values: {name: (largest absolute difference, number of differing values)}; NaN equals NaN.
        compared: number of tensors that both models have with the same shape.
    """

    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple] = field(default_factory=dict)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: dict[str, tuple[float, int]] = field(default_factory=dict)
    compared: int = 0

    @property
    def same_values(self) -> bool:
        """Whether both models have the same tensors with the same values, possibly in different dtypes."""
        return not (self.only_a or self.only_b or self.shapes or self.values)

    @property
    def identical(self) -> bool:
        return self.same_values and not self.dtypes

    def __str__(self) -> str:
        lines = [f"{self.compared} tensors compared, {self.compared - len(self.values)} with equal values"]
        for title, found in (("only in A", self.only_a), ("only in B", self.only_b)):
            if found:
                lines += [f"{len(found)} {title}:", *(f"  {entry}" for entry in names.group(found))]
        for title, pairs in (("differ in shape", self.shapes), ("differ in dtype", self.dtypes)):
            if pairs:
                entries = names.group(f"{name} {a} | {b}" for name, (a, b) in pairs.items())
                lines += [f"{len(pairs)} {title} (A | B):", *(f"  {entry}" for entry in entries)]
        if self.values:
            lines += [f"{len(self.values)} differ in value (largest absolute difference, number of values):"]
            lines += [f"  {name} {largest:.3g}, {count}" for name, (largest, count) in self.values.items()]
        return "\n".join(lines)


def compare(a: str | Path, b: str | Path, only: Iterable[str] | None = None, round_a: bool = False) -> Comparison:
    """Compare two models tensor by tensor; neither needs to fit into memory.

    Args:
        a: PyTorch model directory, wallx_jax checkpoint or run (adapters are merged), or hub repo id.
        b: the same for the other model.
        only: names of the tensors to compare; None compares all.
        round_a: cast A's values to B's dtypes before comparing.

    Raises:
        FileNotFoundError, CheckpointError, WeightsError: one of the models cannot be read.
    """
    first, second = _open(a), _open(b)
    wanted = {_spelling(name) for name in only} if only is not None else first.info.keys() | second.info.keys()
    found = Comparison(
        only_a=sorted(wanted & (first.info.keys() - second.info.keys())),
        only_b=sorted(wanted & (second.info.keys() - first.info.keys())),
    )
    # A checkpoint is read one whole (stacked) parameter at a time: its order avoids rereading it for every layer.
    order = first if isinstance(first, _Checkpoint) else second
    for name in order.info:
        if name not in wanted or name not in first.info or name not in second.info:
            continue
        (shape_a, dtype_a), (shape_b, dtype_b) = first.info[name], second.info[name]
        if dtype_a != dtype_b:
            found.dtypes[name] = (dtype_a, dtype_b)
        if shape_a != shape_b:
            found.shapes[name] = (list(shape_a), list(shape_b))
            continue
        found.compared += 1
        largest, count = _difference(first.blocks(name), second.blocks(name), round_a)
        if count:
            found.values[name] = (largest, count)
    return found


def _difference(a: Iterator[np.ndarray], b: Iterator[np.ndarray], round_a: bool) -> tuple[float, int]:
    """Return (largest absolute difference, number of differing values)."""
    largest, count = 0.0, 0
    for x, y in zip(a, b, strict=True):
        x = x.astype(y.dtype) if round_a else x
        if x.dtype == y.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8)):
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        with np.errstate(invalid="ignore"):
            difference = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        count += int(np.count_nonzero(difference))
        largest = max(largest, float(np.nan_to_num(difference, nan=math.inf).max(initial=0.0)))
    return largest, count


class _Side(Protocol):
    """One of the two models.

    Attributes:
        info: {name: (shape, dtype)} in PyTorch's layout.
    """

    info: dict[str, tuple[tuple[int, ...], str]]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor's values in order, as flat contiguous blocks."""
        ...


def _open(path: str | Path) -> _Side:
    source = open_source(path)
    return _Checkpoint(source.folder) if source.is_checkpoint else _Directory(open_tensors(source.folder))


class _Directory:
    def __init__(self, tensors: Tensors):
        self._tensors = tensors
        self._stored = {_spelling(name): name for name in tensors}
        self.info = {
            name: (tensors.info[stored].shape, DTYPE_NAMES[tensors.info[stored].dtype])
            for name, stored in self._stored.items()
        }

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        yield from _blocks(self._tensors[self._stored[name]])
        self._tensors.release(self._stored[name])


class _Checkpoint:
    def __init__(self, step: Path):
        self._model = ModelReader(step)
        self._slots = {_spelling(name): slot for name, slot in names.expand(self._model.config).items()}
        specs = self._model.specs
        self.info = {
            name: (slot.shape, DTYPE_NAMES[np.dtype(specs[slot.row.path].dtype)]) for name, slot in self._slots.items()
        }
        # The last parameter read: the table lists all layers of a parameter consecutively.
        self._read: tuple[str, np.ndarray] | None = None

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        slot = self._slots[name]
        if self._read is None or self._read[0] != slot.row.path:
            self._read = None
            self._read = (slot.row.path, self._model.read(slot.row.path))
        parameter = self._read[1]
        leaf = parameter if slot.layer is None else parameter[slot.layer]
        yield from _blocks(slot.row.op.to_torch(leaf, self._model.config.vision))


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    if array.ndim < 2:
        array = array.reshape(1, -1)
    rows = max(1, BLOCK // max(1, array[:1].size))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1)


def _spelling(name: str) -> str:
    """Return Wall-X's name of a tensor in the name table; other names are returned unchanged."""
    parsed = names.parse(name)
    return name if parsed is None else parsed[0].name(parsed[1], qwen=False)
