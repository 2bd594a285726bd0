"""Find checkpoint directories, tell complete ones from incomplete ones, and read their metadata.

A run keeps {save_path}/checkpoints/{step}/, which `checkpoints.checkpointer` writes:

    params/    parameters (their moving average, if one is kept)  } arrays in Orbax's format,
    state/     the rest of the train state: optimizer, step, ...  } can be restored onto any mesh
    data/      position.json: position in the data
    metadata/  metadata.json: run config, model config, token ids, numerics, data order, package versions, loss
    assets/    processor directory: tokenizer, normalization statistics, image sizes

A `path` is a run directory, its checkpoints/ folder, a step directory (which may have been moved and renamed), or the
string "latest" for the newest checkpoint of `save_path`. To read several items of a run that is still training, call
`find_checkpoints` once and use the step directory it returns, so that all items come from the same checkpoint.
"""

import asyncio
import dataclasses
import itertools
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from wallx_jax.models.config import Numerics, TokenIds, WallXConfig
from wallx_jax.utils.errors import UserError, causes, root_cause
from wallx_jax.utils.files import read_json_object
from wallx_jax.utils.json_fields import mismatch

logger = logging.getLogger(__name__)
T = TypeVar("T")

FOLDER = "checkpoints"
METADATA_FILE = "metadata.json"
POSITION_FILE = "position.json"
COMMITTED = "commit_success.txt"  # Orbax writes it last
# Required entries of metadata.json and their types, followed by the optional ones.
METADATA = {"step": int, "time": str, "config": dict, "model": dict, "tokens": dict, "numerics": dict,
            "versions": dict, "processes": int}  # fmt: skip
OPTIONAL_METADATA = {"loss": int | float | None, "data_order": dict | None, "source": dict | None}
_TEMPORARY = re.compile(r"\d+\.orbax-checkpoint-tmp.*")


class CheckpointError(UserError, RuntimeError):
    """Raised if a checkpoint cannot be found, read or written; the message is meant for the user."""


def find_checkpoints(path: str | Path, save_path: str | Path | None = None) -> list[Path]:
    """Return the complete step directories that `path` refers to, newest first.

    Args:
        path: checkpoint or run, see the module docstring.
        save_path: run directory that `path="latest"` refers to.

    Returns:
        At least one directory.

    Raises:
        CheckpointError: `path` does not exist, is not a checkpoint, or contains only incomplete ones.
    """
    if path == "latest":
        if save_path is None:
            raise CheckpointError("'latest' means the newest checkpoint of save_path, and save_path is not set")
        path = save_path
    path = Path(path).expanduser().absolute()
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: there is no such directory")
    if (path / "params").is_dir() or _TEMPORARY.fullmatch(path.name):
        if not _is_complete(path):
            raise CheckpointError(
                f"the checkpoint {path} is incomplete: its save or copy was interrupted; use another step, or the run "
                f"directory for its newest complete one"
            )
        return [path]
    for folder in (path / FOLDER, path):
        if steps := complete_steps(folder):
            return [folder / str(step) for step in reversed(steps)]
    raise CheckpointError(
        f"no complete checkpoint in {path}: looked for {FOLDER}/STEP/params, STEP/params and params; nor is it a "
        "PyTorch model directory, which has a config.json"
    )


def latest_step(save_path: str | Path) -> int | None:
    """Return the newest complete step of a run directory; None if there is none."""
    return max(complete_steps(Path(save_path).expanduser() / FOLDER), default=None)


def complete_steps(folder: Path) -> list[int]:
    """Return the complete steps in a checkpoints/ folder, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(step.name) for step in folder.iterdir() if step.name.isdigit() and _is_complete(step))


def _is_complete(step: Path) -> bool:
    return (step / COMMITTED).is_file() and all((step / item).is_dir() for item in ("params", "metadata", "assets"))


def refuse_overwrite(save_path: str | Path) -> None:
    """Check that a new run does not overwrite another one.

    Raises:
        CheckpointError: `save_path` already contains checkpoints.
    """
    step = latest_step(save_path)
    if step is not None:
        raise CheckpointError(
            f"save_path {save_path} already contains checkpoints (the newest is step {step}): continue that run with "
            f"resume.ckpt=latest, or choose another save_path"
        )


def prepare(folder: Path, resumed_step: int | None) -> None:
    """Prepare a checkpoints/ folder for writing.

    Remove leftovers of interrupted saves. Rename complete checkpoints later than `resumed_step` (damaged ones, or those
    of an abandoned continuation) to "STEP.abandoned-N": otherwise they would be taken for the newest.
    """
    if not folder.is_dir():
        return
    for leftover in partial_saves(folder):
        logger.warning("removing %s, left by an interrupted save", leftover)
        shutil.rmtree(leftover)
    if resumed_step is None:
        return
    for step in [step for step in complete_steps(folder) if step > resumed_step]:
        names = (folder / f"{step}.abandoned-{n}" for n in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        logger.warning("continuing from step %d: the later checkpoint %d is kept as %s", resumed_step, step, aside)
        (folder / str(step)).rename(aside)


def partial_saves(folder: Path) -> list[Path]:
    """Return the leftovers of interrupted or failed saves in a checkpoints/ folder."""
    return [child for child in folder.iterdir() if _TEMPORARY.fullmatch(child.name)]


def read_metadata(path: str | Path, save_path: str | Path | None = None) -> dict[str, Any]:
    """Read metadata.json of the (newest) checkpoint: step, time, loss, config, model, tokens, numerics, versions."""
    return first_readable(path, save_path, metadata_of)


def metadata_of(step: Path) -> dict[str, Any]:
    """Read metadata.json of a step directory, and check that required entries are present and types are right.

    Raises:
        FileNotFoundError, ValueError: naming the file, and the entries that are missing or have the wrong type.
    """
    file = metadata_file(step)
    metadata = read_json_object(file)
    if missing := sorted(METADATA.keys() - metadata.keys()):
        raise ValueError(f"{file} lacks {', '.join(missing)}; copy it again")
    for name, kind in (METADATA | OPTIONAL_METADATA).items():
        value = metadata.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{file}: {name} is {value!r}; copy it again")
    return metadata


def metadata_file(step: Path) -> Path:
    """Return the path of metadata.json in a step directory."""
    return step / "metadata" / METADATA_FILE


def read_model_config(path: str | Path, save_path: str | Path | None = None) -> WallXConfig:
    """Read the model config (shapes, token ids and numerics) of the (newest) checkpoint."""
    return first_readable(path, save_path, model_config_of)


def model_config_of(step: Path) -> WallXConfig:
    """Read the model config from the metadata of a step directory.

    Raises:
        FileNotFoundError, ValueError: naming the file and the invalid entries.
    """
    file, metadata = metadata_file(step), metadata_of(step)
    tokens, numerics = metadata["tokens"], metadata["numerics"]
    ids, options = ({field.name for field in dataclasses.fields(kind)} for kind in (TokenIds, Numerics))
    errors = [f"tokens lacks {name}" for name in sorted(ids - tokens.keys())]
    errors += [f"tokens.{name} is unknown" for name in sorted(tokens.keys() - ids)]
    errors += [f"numerics.{name} is unknown" for name in sorted(numerics.keys() - options)]
    errors += [
        f"tokens.{name} is {value!r}; expected {expected}"
        for name, value in tokens.items()
        if (expected := mismatch(value, int, least=-1))
    ]
    try:
        if not errors:
            return WallXConfig.from_hf(metadata["model"]).replace(tokens=tokens, numerics=numerics)
    except ValueError as error:
        errors.append(str(error).replace("config.json", "model", 1))
    raise ValueError(f"{file}: {'; '.join(errors)}; copy it again")


def assets_dir(path: str | Path, save_path: str | Path | None = None) -> Path:
    """Return the processor directory inside the (newest) checkpoint."""
    return find_checkpoints(path, save_path)[0] / "assets"


def first_readable(
    path: str | Path,
    save_path: str | Path | None,
    load: Callable[[Path], T],
    agree: Callable[[bool], bool] = lambda success: success,
) -> T:
    """Load the newest checkpoint that is not damaged; warn about each damaged one that is skipped.

    Args:
        path: checkpoint or run, see the module docstring.
        save_path: run directory that `path="latest"` refers to.
        load: loads a step directory; any exception except those below means that it is damaged.
        agree: called after each attempt with whether this process has succeeded; returns whether all processes have.

    Returns:
        The result of `load`.

    Raises:
        CheckpointError: all checkpoints are damaged, or `load` raised it: a checkpoint of a different model is not
            damaged.
        MemoryError, JaxRuntimeError: raised by `load`; not caused by the files.
        KeyboardInterrupt: Ctrl-C, even where a library wrapped it in an exception of its own.
    """
    failures = []
    for step in find_checkpoints(path, save_path):
        loaded: list[T] = []  # empty if this process cannot read it
        why = "another process of the run cannot read it"
        try:
            loaded.append(load(step))
        except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # out-of-memory and device errors are not caused by the files
        except Exception as error:  # Orbax and TensorStore report damage as many exception types
            if any(isinstance(cause, KeyboardInterrupt | asyncio.CancelledError) for cause in causes(error)):
                raise KeyboardInterrupt from error
            why = root_cause(error)
        if agree(bool(loaded)):
            return loaded[0]
        failures.append(f"{step}: {why}")
        logger.warning("the checkpoint %s is damaged and passed over (%s)", step, why)
    raise CheckpointError(f"no readable checkpoint: {'; '.join(failures)}")
