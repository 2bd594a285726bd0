"""Write and read checkpoints one parameter at a time, for models that do not fit into memory.

`new_checkpoint` lays out a step directory as `checkpoints.checkpointer` does, without optimizer state and data
position: such a checkpoint can be used for inference, exported and trained from, but not resumed. Orbax writes the
layout around placeholders of one element; each placeholder is then replaced by an array of the final shape in the same
format (zarr, one file per chunk), which TensorStore fills in pieces. Orbax reads the result like any other checkpoint.

Orbax's own API for this, `orbax.checkpoint.v1.partial`, adds whole parameters to one item called "state". Converting a
3B model in bfloat16, whose largest stacked parameter takes 1.51 GiB, on two cores (Orbax 0.12.8):

    this module, each piece read back        95 to 121 s, peak 0.95 GiB
    v1.partial, OCDBT, NumPy arrays, no copy      158 s, 188 s read back, peak 4.76 GiB
    v1.partial, zarr, JAX arrays                  106 s, 157 s read back, peak 3.80 GiB

That is more than 2 GiB above the largest parameter, and `finalize` loses the data without an error if the name of the
directory begins with a dot. As the layout is Orbax's own affair, only versions for which it is known are written.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp
from packaging.specifiers import SpecifierSet

from wallx_jax.checkpoints import failed_save
from wallx_jax.checkpoints.checkpointer import Files, stored
from wallx_jax.checkpoints.layout import COMMITTED, METADATA_FILE, CheckpointError, read_model_config
from wallx_jax.models import lora
from wallx_jax.models.config import LoraConfig
from wallx_jax.utils import tree
from wallx_jax.utils.files import new_directory, sync

ORBAX = SpecifierSet(">=0.12.3,<0.13")  # versions whose layout is known, as in pyproject.toml
CHUNK_BYTES = 64 << 20  # maximum chunk size; a chunk holds as many whole layers or rows as fit


class ParamWriter:
    """Write the parameters of a new checkpoint piece by piece; different pieces may be written by several threads.

    Args:
        folder: params/ of the step directory.
        specs: {path: shape and dtype}.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Any]):
        self._specs = specs
        self._stores = {path: _open(folder / path.replace("/", "."), spec) for path, spec in specs.items()}

    def pieces(self, path: str) -> Iterator[slice]:
        """Return consecutive ranges of the first axis that match the chunks, the most efficient pieces to write."""
        rows = self._specs[path].shape[0]
        step = _chunk_rows(self._specs[path])
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def write(self, path: str, rows: slice, array: np.ndarray) -> None:
        """Write a piece, read it back and compare.

        Args:
            path: parameter path.
            rows: range of the first axis.
            array: values of these rows.

        Raises:
            CheckpointError: the data read back differ.
        """
        piece = self._stores[path][rows]
        piece.write(array).result()
        if not _same_bytes(piece.read().result(), array):
            raise CheckpointError(f"{path} reads back otherwise than it was written; check the disk")


@contextlib.contextmanager
def new_checkpoint(
    output: Path, specs: Mapping[str, Any], metadata: bytes, assets: Mapping[str, bytes]
) -> Iterator[ParamWriter]:
    """Create a checkpoint: `with new_checkpoint(...) as writer: writer.write(...)` for every piece of every parameter.

    The step directory `output` appears once the block has succeeded (see `files.new_directory`); leftovers of an
    interrupted block are not taken for a checkpoint.

    Args:
        output: step directory to create.
        specs: {path: shape and dtype}.
        metadata: content of metadata.json.
        assets: {file name: content}.

    Yields:
        The writer of the parameters.

    Raises:
        FileExistsError: `output` already exists.
        CheckpointError: the installed Orbax is of another version, or uses another layout, than is known here; or it
            does not read back the shapes and dtypes in `specs`.
    """
    _check_version()
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False  # as in `checkpoints.checkpointer`
    context.array.saving.use_compression = False
    context.array.saving.use_ocdbt = False  # so that each chunk is a file that can be written on its own
    context.array.saving.use_zarr3 = False  # the format in which Orbax recognizes such files
    placeholders = {path: np.zeros((1,) * len(spec.shape), spec.dtype) for path, spec in specs.items()}
    items = {
        "params": tree.unflatten(placeholders),
        "metadata": Files({METADATA_FILE: metadata}),
        "assets": Files(assets),
    }
    with new_directory(output) as partial:
        try:
            with context:
                ocp.save_checkpointables(partial, items)
        except BaseException:
            failed_save.wait_for_writers()
            raise
        _check_placeholders(partial, specs)
        seal = (partial / COMMITTED).read_bytes()
        (partial / COMMITTED).unlink()
        yield ParamWriter(partial / "params", specs)
        _check_layout(partial, specs)
        for file in (partial / "params").rglob("*"):
            sync(file)
        (partial / COMMITTED).write_bytes(seal)


def _open(folder: Path, spec: Any) -> ts.TensorStore:
    """Replace a placeholder by a new array of the final shape."""
    shutil.rmtree(folder)
    settings = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}{os.sep}"},
        "context": {"file_io_sync": False},  # all files are synced at the end
        "metadata": {"compressor": None, "chunks": [_chunk_rows(spec), *spec.shape[1:]]},
    }
    return ts.open(settings, dtype=np.dtype(spec.dtype), shape=spec.shape, create=True).result()


def _check_version() -> None:
    version = importlib.metadata.version("orbax-checkpoint")
    if version not in ORBAX:
        raise CheckpointError(
            f"orbax-checkpoint {version} is installed, conversion writes the layout of {ORBAX}; install such a version"
        )


def _check_placeholders(step: Path, specs: Mapping[str, Any]) -> None:
    """Check that Orbax has laid out the step as one zarr array per parameter, and a file that it writes last."""
    expected = [COMMITTED, *(f"params/{path.replace('/', '.')}/.zarray" for path in specs)]
    if missing := [name for name in expected if not (step / name).is_file()]:
        version = importlib.metadata.version("orbax-checkpoint")
        raise CheckpointError(
            f"orbax-checkpoint {version} lays out a checkpoint otherwise than is known: there is no {missing[0]}; "
            f"install another version of {ORBAX}"
        )


def _chunk_rows(spec: Any) -> int:
    row = np.dtype(spec.dtype).itemsize * int(np.prod(spec.shape[1:]))
    return max(1, min(spec.shape[0], CHUNK_BYTES // row))


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    word = next(dtype for dtype in (np.uint64, np.uint16, np.uint8) if a.nbytes % np.dtype(dtype).itemsize == 0)
    return np.array_equal(a.reshape(-1).view(word), b.reshape(-1).view(word))


def _check_layout(step: Path, specs: Mapping[str, Any]) -> None:
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in stored(step).items()}
    wanted = {path: (tuple(spec.shape), np.dtype(spec.dtype)) for path, spec in specs.items()}
    if found != wanted:
        differing = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
        raise CheckpointError(f"Orbax reads other shapes or types than were written: {', '.join(differing[:5])}")


class ModelReader:
    """Read the model of a complete step directory, with LoRA adapters merged into their layers.

    Attributes:
        config: model config without adapters.
        specs: {path: shape and dtype} of the parameters without adapters.
    """

    def __init__(self, step: Path):
        stored_config = read_model_config(step)
        self.config = dataclasses.replace(stored_config, lora=LoraConfig())
        self._lora, self._params = stored_config.lora, ParamsReader(step)
        self.specs = {path: spec for path, spec in self._params.specs.items() if not lora.is_adapter(path)}

    def read(self, path: str, dtype: Any = None) -> np.ndarray:
        """Read one parameter into host memory.

        Args:
            path: parameter path.
            dtype: dtype of the result, in which adapters are merged; None for the stored dtype.
        """
        dtype = dtype or self.specs[path].dtype
        pair = lora.adapter_paths(path)
        if pair is None or pair[0] not in self._params.specs:
            return self._params.read(path).astype(dtype, copy=False)
        kernel, a, b = np.array(self._params.read(path), dtype), *map(self._params.read, pair)
        for layer in range(len(kernel)) if kernel.ndim == 3 else [slice(None)]:
            kernel[layer] = lora.merge(kernel[layer], a[layer], b[layer], self._lora.scale)
        return kernel


class ParamsReader:
    """Read the parameters of a complete step directory one by one, as they are stored.

    Attributes:
        specs: {path: shape and dtype}.
    """

    def __init__(self, step: Path):
        self._step = step
        self.specs = stored(step)

    def read(self, path: str) -> np.ndarray:
        """Read one parameter into host memory."""
        sharding = jax.sharding.SingleDeviceSharding(_host())
        spec = jax.ShapeDtypeStruct(self.specs[path].shape, self.specs[path].dtype, sharding=sharding)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            params = ocp.load_checkpointables(self._step, {"params": tree.unflatten({path: spec})})["params"]
        return np.asarray(tree.flatten(params)[path])


def _host() -> jax.Device:
    """Return the CPU device, or the first local device if JAX_PLATFORMS excludes the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
