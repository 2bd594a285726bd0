"""Checkpoint directories: where they are, which are complete, and what they say of themselves.

A run keeps {save_path}/checkpoints/{step}/, which `checkpoints.checkpointer` writes:

    params/    the parameters (their moving average, if one is kept) } arrays in Orbax's format,
    state/     the rest of the train state: optimizer, step, ...     } restored onto any mesh
    data/      position.json: the place in the data
    metadata/  metadata.json: run config, model config, token ids, numerics, order of the data, package versions, loss
    assets/    the processor directory: tokenizer, normalisation statistics, image sizes

A `path` is a run directory, its checkpoints/ folder, one step directory (which may have been moved and renamed), or
the word "latest": the newest checkpoint of `save_path`. Who reads several things of a run that is still training asks
`find_checkpoints` once and goes on with the step directory it gives.
"""

import asyncio
import dataclasses
import itertools
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from wallx_jax.models.config import Numerics, TokenIds, WallXConfig
from wallx_jax.utils import hub
from wallx_jax.utils.files import read_json_object
from wallx_jax.utils.json_fields import mismatch

logger = logging.getLogger(__name__)
T = TypeVar("T")

FOLDER = "checkpoints"
METADATA_FILE = "metadata.json"
POSITION_FILE = "position.json"
COMMITTED = "commit_success.txt"  # Orbax writes it last
# Entries of metadata.json and their types; and those that not every checkpoint has.
METADATA = {"step": int, "time": str, "config": dict, "model": dict, "tokens": dict, "numerics": dict,
            "versions": dict, "processes": int}  # fmt: skip
OPTIONAL_METADATA = {"loss": int | float | None, "data_order": dict | None, "source": dict | None}
_TEMPORARY = re.compile(r"\d+\.orbax-checkpoint-tmp.*")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be found, read or written; the message is for the user."""


def find_checkpoints(path: str | Path, save_path: str | Path | None = None) -> list[Path]:
    """The complete step directories that `path` means, newest first; never empty.

    Raises:
        CheckpointError: nothing there, not a checkpoint, or only incomplete ones.
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


def find_model(path_or_repo: str | Path, revision: str | None = None) -> tuple[Path, bool]:
    """(folder, whether it is a PyTorch model directory) of a checkpoint, run, model directory or hub repo id.

    Raises:
        FileNotFoundError: it is nowhere to be found.
        CheckpointError: a folder that holds neither a model nor a complete checkpoint.
    """
    folder = hub.resolve(path_or_repo, kind="model", revision=revision)
    if (folder / "config.json").is_file():
        return folder, True
    return find_checkpoints(folder)[0], False


def latest_step(save_path: str | Path) -> int | None:
    """The newest complete step of a run directory; None when it has none."""
    return max(complete_steps(Path(save_path) / FOLDER), default=None)


def complete_steps(folder: Path) -> list[int]:
    """Steps in a checkpoints/ folder, ascending, without the incomplete ones."""
    if not folder.is_dir():
        return []
    return sorted(int(step.name) for step in folder.iterdir() if step.name.isdigit() and _is_complete(step))


def _is_complete(step: Path) -> bool:
    return (step / COMMITTED).is_file() and all((step / item).is_dir() for item in ("params", "metadata", "assets"))


def refuse_overwrite(save_path: str | Path) -> None:
    """For a run that starts anew: raises CheckpointError if `save_path` already holds checkpoints."""
    step = latest_step(save_path)
    if step is not None:
        raise CheckpointError(
            f"save_path {save_path} already holds checkpoints (the newest is step {step}): continue that run with "
            f"resume.ckpt=latest, or choose another save_path"
        )


def prepare(folder: Path, resumed_step: int | None) -> None:
    """Makes a checkpoints/ folder ready for writing.

    Leftovers of interrupted saves are removed. Complete checkpoints later than `resumed_step` (damaged, or of a
    continuation that is being abandoned) would pass for the newest: they are renamed "STEP.abandoned-N".
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
    """What saves that were interrupted or failed have left in a checkpoints/ folder."""
    return [child for child in folder.iterdir() if _TEMPORARY.fullmatch(child.name)]


def read_metadata(path: str | Path, save_path: str | Path | None = None) -> dict[str, Any]:
    """metadata.json of the (newest) checkpoint: step, time, loss, config, model, tokens, numerics, versions."""
    return first_readable(path, save_path, metadata_of)


def metadata_of(step: Path) -> dict[str, Any]:
    """metadata.json of a step directory, with the entries that are always there, each of its type.

    Raises:
        FileNotFoundError, ValueError: naming the file, and the entries that are missing or of another type.
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
    """metadata.json of a step directory."""
    return step / "metadata" / METADATA_FILE


def read_model_config(path: str | Path, save_path: str | Path | None = None) -> WallXConfig:
    """Shapes, token ids and numerics of the (newest) checkpoint's model."""
    return first_readable(path, save_path, model_config_of)


def model_config_of(step: Path) -> WallXConfig:
    """The model that a step directory's metadata describe.

    Raises:
        FileNotFoundError, ValueError: naming the file and the entry that makes no sense.
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
    """The processor directory inside the (newest) checkpoint."""
    return find_checkpoints(path, save_path)[0] / "assets"


def first_readable(
    path: str | Path,
    save_path: str | Path | None,
    load: Callable[[Path], T],
    agree: Callable[[bool], bool] = lambda success: success,
) -> T:
    """Returns `load` of the newest checkpoint that is not damaged; passing over one is a warning.

    Args:
        agree: called after each attempt with whether this process has succeeded; tells whether all have.

    Raises:
        CheckpointError: all are damaged; or `load` says so: a checkpoint of another model is not damage.
        KeyboardInterrupt: Ctrl-C, which libraries wrap into errors of their own, is no damage either.
    """
    failures = []
    for step in find_checkpoints(path, save_path):
        why = "another process of the run cannot read it"
        try:
            loaded, success = load(step), True
        except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # out of memory and device errors say nothing about the files
        except Exception as error:  # Orbax and TensorStore report damage as many types
            if any(isinstance(cause, KeyboardInterrupt | asyncio.CancelledError) for cause in causes(error)):
                raise KeyboardInterrupt from error
            loaded, success, why = None, False, reason(error)
        if agree(success):
            return loaded
        failures.append(f"{step}: {why}")
        logger.warning("the checkpoint %s is damaged and passed over (%s)", step, why)
    raise CheckpointError(f"no readable checkpoint: {'; '.join(failures)}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it wraps."""
    if error is not None:
        yield error
        for inner in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())):
            yield from causes(inner)


def reason(error: BaseException) -> str:
    """One line from the innermost exception: Orbax wraps the cause in pages of its own."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
