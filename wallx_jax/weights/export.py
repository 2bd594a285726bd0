"""Export parameters to the weight files and config.json of a PyTorch model directory."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wallx_jax.models.config import WallXConfig
from wallx_jax.utils import tree
from wallx_jax.utils.files import atomic_file
from wallx_jax.weights import names, ops
from wallx_jax.weights.safetensors_io import INDEX, SINGLE, WeightsError, is_finite, safetensors_file

THREADS = 4  # tensors of one parameter that are cast and written in parallel


def save_directory(directory: str | Path, config: WallXConfig, params: tree.Tree) -> None:
    """Write config.json and model.safetensors with upstream's names (Qwen2.5-VL's for a model without action expert).

    A tied head is not written. Each tensor keeps the dtype of its parameter, so the export is lossless; the file mixes
    dtypes if `Numerics.float32_islands` does. `load_params` reads the same bits back.

    Args:
        directory: created if missing.
        config: config of the model.
        params: nested dict of arrays.
    """
    directory, flat = Path(directory), tree.flatten(params)
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, config, lambda path: np.asarray(flat[path]), tensor_specs(config, flat))
    write_json(directory / "config.json", config.to_hf())


def tensor_specs(config: WallXConfig, params: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {tensor name: shape in PyTorch and dtype} for the parameters `params`, {path: array or spec}."""
    return {
        name: jax.ShapeDtypeStruct(slot.shape, params[slot.row.path].dtype)
        for name, slot in names.expand(config).items()
    }


def write_weights(
    directory: Path,
    config: WallXConfig,
    read: Callable[[str], np.ndarray],
    specs: Mapping[str, Any],
    extra: Mapping[str, np.ndarray] | None = None,
    shard_bytes: int | None = None,
    done: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write a model's tensors to model.safetensors, or to shards and their index, one parameter in memory at a time.

    Args:
        directory: existing directory to write to.
        config: config of the model.
        read: returns the parameter at a path.
        specs: {tensor name: shape and dtype to write}, see `tensor_specs`; a dtype may differ from the parameter's. A
            tied head is written if it is included.
        extra: {name: array} of tensors that are not parameters.
        shard_bytes: maximum size of a shard, in bytes, unless a single tensor exceeds it; None: one file.
        done: callback that receives the size in bytes of each tensor written.

    Raises:
        WeightsError: if a tensor contains NaN or infinity, or values beyond the range of its dtype.
    """
    extra = extra or {}
    slots = names.expand(config)
    sources: dict[str, list[tuple[str, names.TensorSpec]]] = {}
    for name, slot in slots.items():
        sources.setdefault(slot.row.path, []).append((name, slot))
    if names.HEAD in specs and names.HEAD not in slots:
        sources["embed/embedding"].append((names.HEAD, slots[names.EMBEDDING]))

    shards = _shards({**specs, **extra}, shard_bytes)
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        total = sum(_bytes(spec) for tensors in shards.values() for spec in tensors.values())
        write_json(
            directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
    with contextlib.ExitStack() as files, ThreadPoolExecutor(THREADS) as pool:
        write = {
            name: writer
            for file, tensors in shards.items()
            for writer in [files.enter_context(safetensors_file(directory / file, tensors))]
            for name in tensors
        }

        def put(name: str, slot: names.TensorSpec, parameter: np.ndarray) -> None:
            leaf = parameter if slot.layer is None else parameter[slot.layer]
            write[name](name, _cast(name, slot.row.op.to_torch(leaf, config.vision), specs[name].dtype))
            done(_bytes(specs[name]))

        for path in sources:
            parameter = read(path)
            for future in [pool.submit(put, name, slot, parameter) for name, slot in sources[path]]:
                future.result()
            del parameter, future
        for name, array in extra.items():
            write[name](name, array)


def write_json(file: Path, content: Any) -> None:
    with atomic_file(file) as out:
        out.write(json.dumps(content, indent=2).encode() + b"\n")


def _cast(name: str, source: np.ndarray, dtype: Any) -> np.ndarray:
    out = np.empty(source.shape, dtype)
    with np.errstate(over="ignore"):  # checked below
        ops.copy(out, source)
    if not is_finite(out):
        if is_finite(np.ascontiguousarray(source)):
            raise WeightsError(f"{name} has values beyond the range of {np.dtype(dtype).name}; choose a wider dtype")
        raise WeightsError(f"{name} contains NaN or infinity: export an earlier checkpoint")
    return out


def _bytes(spec: Any) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _shards(specs: Mapping[str, Any], shard_bytes: int | None) -> dict[str, dict[str, Any]]:
    """Distribute tensors over files, filled in order: {file name: {tensor name: spec}}."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and shard_bytes is not None and size + _bytes(spec) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += _bytes(spec)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}
