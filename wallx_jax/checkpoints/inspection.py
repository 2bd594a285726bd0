"""Validate a checkpoint and report what it can be used for, from its index and small files without loading arrays."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from wallx_jax.checkpoints.checkpointer import compare_params, stored
from wallx_jax.checkpoints.layout import (
    POSITION_FILE,
    CheckpointError,
    complete_steps,
    metadata_of,
    model_config_of,
)
from wallx_jax.checkpoints.source import ModelSource, open_source
from wallx_jax.data.processor import Processor
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.models import param_summary
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.params import abstract_params
from wallx_jax.utils.errors import root_cause
from wallx_jax.utils.files import read_json_object
from wallx_jax.utils.versions import package_version
from wallx_jax.weights.load import open_weights

T = TypeVar("T")


@dataclass
class CheckpointReport:
    """Result of inspecting a checkpoint.

    Attributes:
        findings: description of the checkpoint, one line each.
        problems: what is wrong with it; empty if the checkpoint can be loaded.
    """

    findings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, title: str, text: str) -> None:
        self.findings.append(f"{title:<13}{text}")

    def try_step(self, what: str, function: Callable[..., T], *arguments: Any) -> T | None:
        """Return `function(*arguments)`; if it raises, record the exception as a problem and return None."""
        try:
            return function(*arguments)
        except CheckpointError as error:
            self.problems.append(str(error))
        except Exception as error:  # damage raises many exception types, which vary with the version of Orbax
            self.problems.append(f"{what}: {root_cause(error)}")
        return None


def inspect_checkpoint(path: str | Path) -> CheckpointReport:
    """Inspect a checkpoint, a run (its newest complete checkpoint) or a PyTorch model directory; local paths only."""
    report, folder = CheckpointReport(), Path(path).expanduser().absolute()
    if not folder.is_dir():
        report.problems.append(f"there is no directory {folder}")
    elif source := report.try_step("it cannot be searched", open_source, folder):
        if source.is_run:
            siblings = source.folder.parent
            names = list(map(str, complete_steps(siblings)))
            incomplete = sorted({child.name for child in siblings.iterdir() if child.is_dir()} - {*names})
            aside = f"; incomplete or set aside: {', '.join(incomplete)}" if incomplete else ""
            report.add("run", f"complete steps: {', '.join(names)}{aside}")
        if source.is_checkpoint:
            _check_step(report, source)
        else:
            _check_pytorch(report, source)
    return report


def _check_pytorch(report: CheckpointReport, source: ModelSource) -> None:
    folder = source.folder
    report.add("model", f"{folder}, a PyTorch directory")
    weights = report.try_step("its weights cannot be read", open_weights, folder)
    if weights is not None:
        _describe_model(report, weights.config)
        report.findings += param_summary.table(param_summary.rows(weights.specs))
    _check_files(report, source)


def _check_step(report: CheckpointReport, source: ModelSource) -> None:
    step = source.folder
    report.add("checkpoint", f"{step}, complete")
    metadata = report.try_step("its metadata cannot be read", metadata_of, step)
    specs = report.try_step("its parameters cannot be read", stored, step)
    if metadata is not None:
        loss = "" if metadata.get("loss") is None else f", loss {metadata['loss']:.4g}"
        report.add("written", f"at step {metadata['step']}{loss}, {metadata['time']}, {_versions(metadata)}")
        model = report.try_step("its metadata describe no model", model_config_of, step)
        if model is not None:
            _describe_model(report, model)
            if specs is not None:
                report.try_step("its parameters do not fit its metadata", compare_params, step, abstract_params(model))
    if specs is not None:
        report.findings += param_summary.table(rows := param_summary.rows(specs))
        # Arrays are stored uncompressed, so missing data from an interrupted copy shows in the size.
        wanted, found = sum(row.size for row in rows), _bytes_of(step / "params")
        if found < wanted:
            report.problems.append(
                f"params/ has {param_summary.gib(found)} on disk, its arrays take {param_summary.gib(wanted)}: copy it "
                "again"
            )
    _check_files(report, source)
    _check_resumable(report, step)


def _describe_model(report: CheckpointReport, model: WallXConfig) -> None:
    has_actions = model.has_action_head
    side = f"{model.action.action_dim} action channels" if has_actions else "no action side (Qwen2.5-VL)"
    adapters = f", adapters of rank {model.lora.rank}" if model.lora.rank else ""
    report.add(
        "shapes",
        f"{model.text.num_hidden_layers} decoder layers of width {model.text.hidden_size}, {model.vision.depth} vision "
        f"layers of {model.vision.hidden_size}, vocabulary {model.text.vocab_size:,}, {side}{adapters}",
    )
    report.add("numerics", ", ".join(f"{name} {value}" for name, value in vars(model.numerics).items()))


def _versions(metadata: dict[str, Any]) -> str:
    """Describe the package versions that the checkpoint was written with, where they differ from those installed."""
    others = [
        f"{name} {then} (here {here})"
        for name, then in metadata["versions"].items()
        if then != (here := package_version(name))
    ]
    return f"with {', '.join(others)}" if others else "with the versions that are installed here"


def _check_files(report: CheckpointReport, source: ModelSource) -> None:
    """Check tokenizer, statistics and image sizes; a model without robot data has only a tokenizer."""
    folder = source.assets
    if source.has_processor:
        processor = report.try_step("its preprocessing cannot be read", Processor.from_dir, folder)
        if processor is not None:
            views = ", ".join(processor.config.views)
            report.add("assets", f"tokenizer, statistics and processor; {processor.config.objective}, {views}")
        return
    tokenizer = report.try_step("its tokenizer cannot be read", Tokenizer.from_dir, folder)
    if tokenizer is not None:
        has_stats = (folder / "norm_stats.json").is_file()
        report.add("assets", f"tokenizer of {len(tokenizer):,}; {'' if has_stats else 'no '}norm_stats.json")


def _check_resumable(report: CheckpointReport, step: Path) -> None:
    present = [item for item in ("state", "data") if (step / item).is_dir()]
    if len(present) < 2:
        has = f"has {present[0]}/ alone" if present else "contains only weights"
        report.add("resume", f"no, it {has}; runs can start from it (pretrained_wallx_path, resume.load_ckpt_only)")
        return
    state = report.try_step("its optimizer state cannot be read", stored, step, "state")
    position = report.try_step("its position in the data cannot be read", _read_position, step)
    if state is not None and position is not None:
        size = sum(row.size for row in param_summary.rows(state))
        report.add("resume", f"yes: optimizer state {param_summary.gib(size)}, {position:,} batches drawn")


def _read_position(step: Path) -> int:
    return operator.index(read_json_object(step / "data" / POSITION_FILE)["batches_drawn"])


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
