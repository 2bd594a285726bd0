"""Convert a PyTorch model directory to a checkpoint, bit for bit and with only a few layers in memory at a time."""

import dataclasses
import itertools
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from wallx_jax.checkpoints import failed_save
from wallx_jax.checkpoints.checkpointer import metadata_json
from wallx_jax.checkpoints.layout import CheckpointError
from wallx_jax.checkpoints.stream import ParamWriter, new_checkpoint
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.models.config import WallXConfig
from wallx_jax.utils import hub
from wallx_jax.weights.load import Weights, open_weights
from wallx_jax.weights.safetensors_io import DTYPE_NAMES, INDEX, NORMALIZERS, WeightsError

THREADS = 4
SMALL_FILE = 64 << 20  # bytes; tokenizer, configuration and template files are smaller


def convert_model(
    path_or_repo: str | Path, output: str | Path, *, has_action_head: bool, revision: str | None = None
) -> Path:
    """Write the weights of a model directory and the small files next to them as a checkpoint.

    Nothing is rounded: if any tensor is wider than bfloat16, all parameters are kept in float32, as those that always
    stay in float32 are. Every piece is read back and compared. Normalizer statistics that upstream stores among the
    weights go into the assets.

    Args:
        path_or_repo: folder with config.json and safetensors files, or a hub repo id.
        output: step directory to create; it appears once it is complete.
        has_action_head: whether a Wall-X model (True) or a Qwen2.5-VL (False) is expected.
        revision: git revision on the hub.

    Returns:
        `output`.

    Raises:
        WeightsError: the model directory does not match, is damaged, contains NaN, or links outside itself.
        FileNotFoundError: the model directory does not exist.
        FileExistsError: `output` exists.
        CheckpointError: `output` cannot be written, or the disk is too small.
    """
    output = Path(output).expanduser().absolute()
    folder = hub.resolve(path_or_repo, kind="model", revision=revision)
    files = _small_files(folder)
    weights = _open_exact(folder)
    config = _with_tokens(_expected(weights, has_action_head), folder)
    if normalizers := weights.normalizers():
        files[NORMALIZERS] = save(normalizers, metadata={"format": "pt"})
    source = {
        "model": str(path_or_repo),
        "revision": revision,
        "tensors": {name: DTYPE_NAMES[info.dtype] for name, info in weights.stored.items()},
    }
    metadata = metadata_json(0, {}, config, source=source)
    size = sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in weights.specs.values())
    _check_space(output, size + sum(map(len, files.values())))
    try:
        with (
            new_checkpoint(output, weights.specs, metadata, files) as writer,
            tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc=f"to {output.name}") as progress,
        ):
            _copy(weights, writer, progress.update)
    except (CheckpointError, WeightsError, FileExistsError):
        raise
    except Exception as error:  # TensorStore and Orbax report a full disk as several exception types
        why, remedy = failed_save.cause(error)
        raise CheckpointError(f"writing {output} failed, nothing was left there: {why}. Remedy: {remedy}") from error
    return output


def _copy(weights: Weights, writer: ParamWriter, done: Callable[[int], Any]) -> None:
    """Copy several pieces at a time, to overlap disk and CPU work."""
    pieces = ((path, rows) for path in weights.specs for rows in writer.pieces(path))

    def copy(path: str, rows: slice) -> int:
        piece = weights.read(path, rows)
        writer.write(path, rows, piece)
        return piece.nbytes

    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(copy, *piece) for piece in itertools.islice(pieces, THREADS)]
        try:
            while running:
                done(running.pop(0).result())
                running += [pool.submit(copy, *piece) for piece in itertools.islice(pieces, 1)]
        except BaseException:
            for future in running:
                future.cancel()
            raise


def _open_exact(folder: Path) -> Weights:
    """Open the weights with a param_dtype that represents every tensor exactly, whatever config.json specifies."""
    for numerics in (None, {"param_dtype": "float32"}):
        weights = open_weights(folder, numerics)
        rounded = [name for name, (stored, kept) in weights.dtypes().items() if np.promote_types(stored, kept) != kept]
        if not rounded:
            return weights
    raise WeightsError(f"{folder}: no parameter can hold float64 as it is; save these as float32: {rounded[:5]}")


def _expected(weights: Weights, has_action_head: bool) -> WallXConfig:
    if has_action_head == weights.config.has_action_head:
        return weights.config
    if has_action_head:
        raise WeightsError(
            f"{weights.directory} is a Qwen2.5-VL without an action side: use convert/qwen2_5_vl.py for it"
        )
    raise WeightsError(f"{weights.directory} has an action side, it is a Wall-X: use convert/wall_oss.py for it")


def _with_tokens(config: WallXConfig, folder: Path) -> WallXConfig:
    """Return the config with the token ids of the folder's tokenizer; warn if there is no tokenizer."""
    try:
        return config.replace(tokens=dataclasses.asdict(Tokenizer.from_dir(folder).token_ids()))
    except FileNotFoundError as error:
        warnings.warn(
            f"{error}; the checkpoint can be exported, but neither trained nor acted with. Copy the tokenizer files "
            "from where the weights came from, and convert again",
            stacklevel=3,
        )
        return config


def _small_files(folder: Path) -> dict[str, bytes]:
    """Read the tokenizer, processor and configuration files of a model directory.

    Returns:
        {path relative to the folder: content}.

    Raises:
        WeightsError: one of the files, weights included, is a link that points outside the folder.
    """
    found: dict[str, Any] = {}
    for file in sorted({file for pattern in hub.MODEL_PATTERNS for file in folder.glob(pattern)}):
        _refuse_outside(folder, file)
        if file.suffix != ".safetensors" and file.name != INDEX and file.stat().st_size <= SMALL_FILE:
            found[file.name] = file.read_bytes()
    for part in ("fast", "robots"):  # present in directories exported by wallx_jax
        for file in sorted((folder / part).rglob("*.json")):
            _refuse_outside(folder, file)
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def _refuse_outside(folder: Path, file: Path) -> None:
    """Raise a WeightsError if `file` is a link that points outside `folder`.

    Links from snapshots/REVISION to blobs/ of the same repository in the hub cache are allowed.
    """
    target, home = file.resolve(), folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(root) for root in allowed):
        raise WeightsError(f"{file} is a link out of its folder, to {target}; put the file itself there")


def _check_space(output: Path, needed: int) -> None:
    existing = next(parent for parent in output.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{output} needs {needed / 2**30:.1f} GiB, but {existing} has {free / 2**30:.1f} GiB free; make room, or "
            "choose another output"
        )
