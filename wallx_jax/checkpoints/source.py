"""Find out what a path or hub repository contains: a PyTorch model directory or a checkpoint, and its robots."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from wallx_jax.checkpoints.layout import find_checkpoints, metadata_of, read_model_config
from wallx_jax.data import processor as processors
from wallx_jax.models.config import WallXConfig
from wallx_jax.utils import hub
from wallx_jax.weights.load import read_config


class SourceKind(StrEnum):
    """What a folder contains."""

    PYTORCH = "PyTorch model directory"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class ModelSource:
    """A model on disk, of which nothing has been read yet.

    Attributes:
        kind: PyTorch model directory or checkpoint.
        folder: the model directory, or the checkpoint's step directory.
        is_run: whether the given path was a run, whose newest complete checkpoint is `folder`.
    """

    kind: SourceKind
    folder: Path
    is_run: bool = False

    @property
    def is_checkpoint(self) -> bool:
        return self.kind == SourceKind.CHECKPOINT

    @property
    def assets(self) -> Path:
        """Directory of the tokenizer and, if there are any, of the processor and image-processor files."""
        return self.folder / "assets" if self.is_checkpoint else self.folder

    @property
    def has_processor(self) -> bool:
        """Whether the preprocessing for its robot, or robots, is stored with the model."""
        return has_processor(self.assets)

    @property
    def robots(self) -> list[str]:
        """Names of the datasets that it was trained on; empty for a single, unnamed one."""
        return processors.robots(self.assets)

    @property
    def run_config(self) -> dict[str, Any]:
        """Settings of the training run as recorded in the checkpoint; empty for a PyTorch model directory."""
        return metadata_of(self.folder)["config"] if self.is_checkpoint else {}

    def read_config(self, numerics: Mapping[str, Any] | None = None) -> WallXConfig:
        """Read shapes, token ids and numerics from headers and small files.

        Args:
            numerics: fields of models.config.Numerics to override.

        Raises:
            CheckpointError, WeightsError: the files are damaged or contradict each other.
        """
        if self.is_checkpoint:
            return read_model_config(self.folder).replace(numerics=numerics or {})
        return read_config(self.folder, numerics)


def open_source(path_or_repo: str | Path, revision: str | None = None) -> ModelSource:
    """Find a model given as a checkpoint, run, PyTorch model directory or hub repo id.

    Args:
        path_or_repo: path or hub repo id.
        revision: git revision on the hub.

    Raises:
        FileNotFoundError: there is no such path or repository.
        CheckpointError: the folder contains neither a model nor a complete checkpoint.
    """
    folder = hub.resolve(path_or_repo, kind="model", revision=revision)
    if (folder / "config.json").is_file():
        return ModelSource(SourceKind.PYTORCH, folder)
    step = find_checkpoints(folder)[0]
    return ModelSource(SourceKind.CHECKPOINT, step, is_run=step != folder.expanduser().absolute())


def has_processor(assets: Path) -> bool:
    """Return whether an assets folder stores the preprocessing of a robot."""
    return (assets / processors.FILE_NAME).is_file()
