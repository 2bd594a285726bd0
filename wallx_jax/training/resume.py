"""Check the settings of a resumed run against its checkpoint.

A resumed run takes its model, preprocessing and optimizer state from the checkpoint. The settings that determined these
are compared here, and a configuration that differs in one of them is rejected. Changes of all other settings take
effect from the checkpoint on.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wallx_jax.checkpoints.layout import metadata_of
from wallx_jax.config import flatten, recorded
from wallx_jax.config.schema import RunConfig
from wallx_jax.config.schema.robot import sizes
from wallx_jax.data import processor as processors
from wallx_jax.data.build import dataset_stats, load_stats
from wallx_jax.data.datasets import DatasetSpec
from wallx_jax.data.fast import FastTokenizer
from wallx_jax.data.normalize import FILE_NAME as NORM_STATS
from wallx_jax.data.processor import Processor
from wallx_jax.data.prompt import FAST_CLOSING_TOKENS
from wallx_jax.data.validate import check_horizon
from wallx_jax.models.config import WallXConfig
from wallx_jax.utils.errors import ConfigError

logger = logging.getLogger(__name__)

FREE_NUMERICS = ("remat", "masked_dims", "kernels")  # updates differ by rounding at most: memory, sampling, speed
NEW_RUN = "or start a new run from its weights with resume.load_ckpt_only=True"
UNTOLD = ("resume.", "distributed.", "pretrained_")  # changes that are expected, or reported separately

Pairs = dict[str, tuple[Any, Any]]  # {setting: (configured value, value in the checkpoint's run)}


def check(
    parts: Sequence[DatasetSpec],
    stored: Sequence[Processor],
    model: WallXConfig,
    checkpoint: Path,
    fast: FastTokenizer | None,
) -> None:
    """Compare a configuration with the checkpoint that it resumes.

    Args:
        parts: the datasets, each with its settings as if it were the only one.
        stored: the checkpoint's processor of each dataset.
        model: the checkpoint's model config.
        checkpoint: the checkpoint's step directory.
        fast: the configured FAST action tokenizer; None if there is none.

    Raises:
        ConfigError: naming every setting that differs, with both values and the remedy.
        FileNotFoundError, ValueError: norm_stats_path is not a statistics file, or one of a different robot.
    """
    settings, before = parts[0].settings, recorded(metadata_of(checkpoint)["config"])
    pairs = _of_model(settings, model) | _of_training(settings, before) | _of_samples(settings, stored)
    errors = _differing(pairs)
    if fast is not None and stored[0].fast is not None and not fast.codes_like(stored[0].fast):
        errors.append(
            f"action_tokenizer_path = {settings.model.action_tokenizer_path!r} is another FAST tokenizer than the run "
            f"of resume.ckpt has: use that, {checkpoint / 'assets' / 'fast'}, {NEW_RUN}"
        )
    for number, (part, processor) in enumerate(zip(parts, stored, strict=True)):
        found = _differing(_of_dataset(part.settings, processor))
        if not errors and not found:
            found = _other_stats(part, processor, checkpoint, before["datasets"].get(part.name, before))
        errors += [f"datasets.{part.name}: {error}" if number else error for error in found]
    if errors:
        raise ConfigError(*errors)
    layout = stored[0].config
    check_horizon(settings, layout.prompt_length - layout.label_window)


def log_changes(config: ConfigDict, checkpoint: Path) -> None:
    """Warn about all settings that differ from those the checkpoint was trained with.

    Numerics that are no longer set do not count as changes: the checkpoint's values stay in effect.

    Args:
        config: configuration of this run.
        checkpoint: the checkpoint's step directory.
    """
    before = recorded(metadata_of(checkpoint)["config"])
    now = recorded(json.loads(json.dumps(flatten(config), default=str)))
    if changed := [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in now.items()
        if value != before[name]
        and not name.startswith(UNTOLD)
        and not (name.startswith("numerics.") and value is None)
    ]:
        logger.warning("the run continues with other settings: %s", "; ".join(changed))
    for name in ("pretrained_wallx_path", "pretrained_revision"):
        if now[name] != before[name]:
            logger.warning(
                "%s = %r is not used: the run of resume.ckpt continues, which started from %r",
                name,
                now[name],
                before[name],
            )


def _of_model(settings: RunConfig, model: WallXConfig) -> Pairs:
    """Compare numerics and LoRA; numerics that are not set keep the checkpoint's values."""
    pairs = {
        f"numerics.{name}": (value, getattr(model.numerics, name))
        for name, value in settings.model.numerics
        if name not in FREE_NUMERICS
    }
    now, then = settings.optim.lora, model.lora
    pairs["lora.rank"] = (now.rank, then.rank)
    if now.rank and then.rank:
        pairs["lora.alpha"] = (now.alpha, then.alpha)
        pairs["lora.targets"] = (tuple(sorted(now.targets)), tuple(sorted(then.targets)))
    return pairs


def _of_training(settings: RunConfig, before: Mapping[str, Any]) -> Pairs:
    """Compare the settings that determine the optimizer's arrays and the size of a new action expert."""
    model, optim = settings.model, settings.optim
    pairs = {
        "optimizer": (optim.optimizer, before["optimizer"]),
        "freeze_vlm (train_action_expert_only)": (
            optim.freeze_vlm,
            before["freeze_vlm"] or before["train_action_expert_only"],
        ),
        "train_action_heads": (optim.train_action_heads, before["train_action_heads"]),
        "action_expert_intermediate_size": (
            model.action_expert_intermediate_size,
            before["action_expert_intermediate_size"],
        ),
    }
    if None in (average := (optim.ema_decay, before["ema_decay"])):
        pairs["ema_decay"] = average
    return pairs


def _of_samples(settings: RunConfig, stored: Sequence[Processor]) -> Pairs:
    """Compare the preprocessing settings that are common to all datasets."""
    data, layout = settings.data, stored[0].config
    views = list(dict.fromkeys(view for processor in stored for view in processor.config.views))
    pairs = {
        "use_fast_tokenizer": (settings.model.use_fast_tokenizer, layout.objective == "fast"),
        "action_horizon": (data.action_horizon, layout.horizon),
        **{
            f"prompt.{name}": (getattr(data.prompt, name), getattr(layout.prompt, name))
            for name in ("system", "image", "action", "language")
        },
        "prompt.view_names": tuple(
            {view: template.view_label(view) for view in views} for template in (data.prompt, layout.prompt)
        ),
    }
    if settings.model.use_fast_tokenizer and layout.label_window:
        pairs["max_fast_tokens"] = (data.max_fast_tokens, layout.label_window - FAST_CLOSING_TOKENS)
    return pairs


def _of_dataset(settings: RunConfig, stored: Processor) -> Pairs:
    data, robot, layout = settings.data, settings.robot, stored.config
    resolutions = dict(zip(layout.views, layout.resolutions, strict=True))
    pairs: dict[str, tuple[Any, Any]] = {
        "camera_views": (
            tuple(f"{camera.view}: {camera.key}" for camera in data.cameras),
            tuple(f"{view}: {key}" for view, key in zip(layout.views, layout.camera_keys, strict=True)),
        ),
        "resolution": (
            {camera.view: camera.resolution for camera in data.cameras if camera.view in resolutions},
            {camera.view: resolutions[camera.view] for camera in data.cameras if camera.view in resolutions},
        ),
        "state (agent_pos_config, state_key)": (data.state_key, layout.state_key),
        "action (dof_config, action_key)": (data.action_key, layout.action_key),
        "relative_action_keys (action dim: state dim)": (
            _relative_dims(robot.relative_to()),
            _relative_dims(layout.relative_to),
        ),
    }
    for name, table, groups, now, then in (
        ("predict_action_keys", "dof_config", robot.dof, robot.predicted(), stored.predicted),
        ("obs_action_keys", "agent_pos_config", robot.agent_pos, robot.observed(), stored.observed),
    ):
        pairs[f"dims of {table}"] = (len(now), len(then))
        if len(now) == len(then):
            pairs[name] = (_names(sizes(groups), now), _names(sizes(groups), then))
    return pairs


def _relative_dims(relative_to: Sequence[int]) -> dict[int, int]:
    return {action: state for action, state in enumerate(relative_to) if state >= 0}


def _names(table: Sequence[tuple[str, int]], flags: Sequence[bool] | np.ndarray) -> tuple[str, ...]:
    """Return the enabled groups of dims, with indices where a group is partly enabled: ("arm", "gripper[0]")."""
    names, start = [], 0
    for name, dims in table:
        on = [place for place in range(dims) if flags[start + place]]
        names += [name] if len(on) == dims else [f"{name}[{place}]" for place in on]
        start += dims
    return tuple(names)


def _other_stats(part: DatasetSpec, stored: Processor, checkpoint: Path, before: Mapping[str, Any]) -> list[str]:
    """Return an error message if norm_stats_path gives statistics that differ from the checkpoint's.

    If neither run sets norm_stats_path, the statistics computed at the start of the original run stay in use, even if
    the dataset has grown since.
    """
    path = part.settings.data.norm_stats_path
    if path is None and before.get("norm_stats_path") is None:
        return []
    given = load_stats(part.settings, part.source) if path else dataset_stats(part.settings, part.source)
    if not (difference := given.difference(stored.stats)):
        return []
    own = checkpoint / "assets" / processors.ROBOTS / part.name / NORM_STATS
    own = own if own.is_file() else checkpoint / "assets" / NORM_STATS
    of = "are" if path else "are computed from the dataset, which gives"
    return [
        f"norm_stats_path = {path!r}: its statistics {of} others than the run of resume.ckpt has ({difference}): use "
        f"those, {own}, {NEW_RUN}"
    ]


def _differing(pairs: Pairs) -> list[str]:
    return [
        f"{name} = {now!r}, but the run of resume.ckpt has {then!r}: use that, {NEW_RUN}"
        for name, (now, then) in pairs.items()
        if now != then
    ]
