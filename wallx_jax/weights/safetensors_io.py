"""Read and write safetensors files, with strict header checks, lazy tensors and atomic writes.

The format: 8 bytes with the header's length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, and
the data, which the offsets must cover without gaps or overlaps. Tensors are read through a memory map, so that they are
not duplicated in memory, and in their own dtype (files mix bfloat16 and float32).
"""

import contextlib
import functools
import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from wallx_jax.utils.errors import UserError
from wallx_jax.utils.files import atomic_file, read_json_object, unique_keys

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORMALIZERS = "normalizers.safetensors"  # statistics that upstream stores among the weights
WEIGHTS = ("*.safetensors", INDEX, "pytorch_model*.bin", "pytorch_model.bin.index.json")


class WeightsError(UserError, ValueError):
    """Raised for a model directory or weight file that cannot be used; the message gives path, reason and remedy."""


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor.

    Attributes:
        file: file that contains it.
        dtype: dtype of its elements.
        shape: shape of the tensor.
        start: offset of its first byte in the file.
        stop: offset after its last byte.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check a file's header.

    Returns:
        {tensor name: TensorInfo}.

    Raises:
        WeightsError: if the header violates the format, or the file's length does not match it.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if prefix == b"version ":
            raise WeightsError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
        if len(prefix) < 8:
            raise WeightsError(f"{path} is truncated: {size} bytes, too short for a safetensors header; fetch it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise WeightsError(f"{path} is not a safetensors file: its first 8 bytes give a header of {length} bytes")
        if length > size - 8:
            raise WeightsError(
                f"{path} is truncated: the header has {length} bytes, only {size - 8} follow; fetch it again"
            )
        text = file.read(length)
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a malformed header: {error or 'nested too deeply'}") from None

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path} has a malformed header: __metadata__ must map strings to strings")
    base = 8 + length
    tensors = {name: _tensor_info(path, name, entry, base) for name, entry in header.items()}
    end = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = (
                "overlaps the tensor before it"
                if info.start < end
                else f"leaves a hole of {info.start - end} bytes before it"
            )
            raise WeightsError(f"{path} has a malformed header: {name} {what}")
        end = info.stop
    if end > size:
        raise WeightsError(f"{path} is truncated: {size} bytes where its header promises {end}; fetch it again")
    if end < size:
        raise WeightsError(f"{path} is malformed: {size - end} bytes after the last tensor belong to none")
    return tensors


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    def bad(why: str) -> WeightsError:
        return WeightsError(f"{path} has a malformed header: {name}: {why}")

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not sizes(shape):
        raise bad(f"shape {shape} is not a list of sizes")
    if not sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {offsets} are not [start, stop]")
    start, stop = offsets
    expected = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if stop - start != expected:
        raise bad(f"{dtype} of shape {shape} takes {expected} bytes, data_offsets {offsets} give {stop - start}")
    return TensorInfo(path, np.dtype(DTYPES[dtype]), tuple(shape), base + start, base + stop)


class Tensors(Mapping[str, np.ndarray]):
    """Lazy mapping of tensor names to arrays, which are read-only views of the memory-mapped files.

    Attributes:
        info: {tensor name: TensorInfo}, from the headers.
    """

    def __init__(self, info: Mapping[str, TensorInfo]):
        self.info = dict(info)
        self._map = functools.cache(_map_file)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.info[name]
        if info.start == info.stop:
            return np.zeros(info.shape, info.dtype)
        data = np.frombuffer(self._map(info.file), np.uint8, info.stop - info.start, info.start)
        return data.view(info.dtype).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def release(self, name: str) -> None:
        """Release a tensor's memory pages, which otherwise keep counting towards the memory of this process."""
        info = self.info[name]
        start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        if info.stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map(info.file).madvise(mmap.MADV_DONTNEED, start, info.stop - start)


def _map_file(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def open_tensors(directory: Path) -> Tensors:
    """Open `model.safetensors`, or else the shards listed in `model.safetensors.index.json`, as transformers does.

    Any other weight files in the directory are ignored, with a warning.

    Raises:
        WeightsError: if there is neither, or a header or the index is malformed, or they are inconsistent.
    """
    directory = Path(directory)
    if (directory / SINGLE).is_file():
        tensors, read = read_header(directory / SINGLE), SINGLE
    elif (directory / INDEX).is_file():
        tensors, read = _read_shards(directory), f"{INDEX} with its files"
    else:
        raise WeightsError(_nothing_to_read(directory))
    if others := _other_weights(directory, {SINGLE, *(info.file.name for info in tensors.values())}):
        warnings.warn(
            f"{directory} contains several sets of weights: {read} is read, as transformers does, and "
            f"{', '.join(others)} are not; remove what does not belong to the model",
            stacklevel=2,
        )
    return Tensors(tensors)


def _other_weights(directory: Path, read: set[str]) -> list[str]:
    """List the weight files that are not read; an index is one of them if there is also a `model.safetensors`."""
    kept = {*read, NORMALIZERS, *([] if (directory / SINGLE).is_file() else [INDEX])}
    found = {file.name for pattern in WEIGHTS for file in directory.glob(pattern)}
    return sorted(found - kept)


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ValueError as error:
        raise WeightsError(str(error)) from None
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise WeightsError(f"{index} is malformed: its weight_map must name a file for each tensor; copy it again")
    shards = sorted(set(weight_map.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise WeightsError(f"{index} names files outside its folder: {', '.join(outside)}")
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise WeightsError(f"{directory} is incomplete: {INDEX} names shards that are not there: {', '.join(missing)}")
    found: dict[str, TensorInfo] = {}
    problems = []
    for shard in shards:
        for name, info in read_header(directory / shard).items():
            if name in found:
                problems.append(f"{name} is in both {found[name].file.name} and {shard}")
            elif weight_map.get(name) != shard:
                problems.append(f"{name} is in {shard}, the index has {weight_map.get(name, 'no entry')}")
            found[name] = info
    problems += [f"{name} is not in {shard}" for name, shard in weight_map.items() if name not in found]
    if problems:
        raise WeightsError(f"{index} and its shards contradict each other: {'; '.join(problems)}")
    return found


def _nothing_to_read(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a folder"
    files = sorted(file.name for file in directory.iterdir() if file.is_file())
    if "adapter_model.safetensors" in files:
        return (
            f"{directory} contains a LoRA adapter, not a model; merge it into its base model first (merge_and_unload)"
        )
    if pickles := [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]:
        return (
            f"{directory} contains pickled weights only ({', '.join(pickles)}); they are not read, since a pickle can "
            "run any code. If you trust them, load and re-save them in PyTorch: "
            "model.save_pretrained(dir, safe_serialization=True)"
        )
    if shards := [name for name in files if name.endswith(".safetensors")]:
        return f"{directory} has {', '.join(shards)} but neither {SINGLE} nor {INDEX}; fetch the index too"
    return f"{directory} contains no weights: expected {SINGLE}, or {INDEX} and its shards"


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays (NumPy or JAX, any strides) to a file, see `safetensors_file`."""
    with safetensors_file(path, tensors, metadata) as write:
        for name in tensors:
            write(name, tensors[name])


@contextlib.contextmanager
def safetensors_file(
    path: Path, specs: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Any], None]]:
    """Open a safetensors file for writing tensor by tensor.

    Usage: `with safetensors_file(path, specs) as write: write(name, array)`, once for each name, in any order and from
    any thread. The file is written under a temporary name, synced, and renamed when the block succeeds, so it appears
    complete or not at all. Tensors are ordered by decreasing dtype size, then by name, as in the reference
    implementation, which keeps them aligned.

    Args:
        path: file to write.
        specs: {name: anything with the `shape` and `dtype` of the array to be written}.
        metadata: defaults to {"format": "pt"}, which transformers requires.

    Yields:
        write(name, array).

    Raises:
        ValueError: if an array does not match its spec, or not all tensors have been written.
    """
    order = sorted(specs, key=lambda name: (-np.dtype(specs[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
    end = 0
    for name in order:
        dtype, shape = np.dtype(specs[name].dtype), list(specs[name].shape)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    missing = set(specs)

    with atomic_file(Path(path)) as file:
        file.write(struct.pack("<Q", len(text)) + text)

        def write(name: str, array: Any) -> None:
            array, spec = np.asarray(array), specs[name]
            if (array.shape, array.dtype) != (tuple(spec.shape), np.dtype(spec.dtype)):
                raise ValueError(f"{name} is {array.dtype}{array.shape}, announced was {spec.dtype}{spec.shape}")
            missing.remove(name)
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            start = 8 + len(text) + header[name]["data_offsets"][0]
            written = 0
            while written < len(data):  # the system writes at most 2 GiB per call
                written += os.pwrite(file.fileno(), data[written:], start + written)

        file.flush()
        yield write
        if missing:
            raise ValueError(f"{path}: {len(missing)} announced tensors were not written, such as {min(missing)}")


def is_finite(array: np.ndarray) -> bool:
    """Return whether a contiguous array contains neither NaN nor infinity."""
    if array.dtype == ml_dtypes.bfloat16:  # its isfinite takes ten times as long as this test of the exponent bits
        return array.size == 0 or bool((array.view(np.uint16) & 0x7FFF).max() < 0x7F80)
    return bool(np.isfinite(array).all())
