"""Validate a configuration into a RunConfig. No code below train.py sees a ConfigDict."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from wallx_jax.config.defaults import PER_DATASET, SETTINGS, flatten
from wallx_jax.config.robots import KEY_MAPPINGS
from wallx_jax.config.schema import (
    AugmentConfig,
    Camera,
    DataConfig,
    DistributedConfig,
    LoopConfig,
    MeshConfig,
    MixedDataset,
    ModelSource,
    OptimConfig,
    RobotConfig,
    RunConfig,
)
from wallx_jax.config.schema.data import camera_views, view_name_errors
from wallx_jax.config.schema.optim import is_vlm_frozen, pattern_and_rate
from wallx_jax.config.validate import read_types, value_errors
from wallx_jax.models.config import Numerics
from wallx_jax.utils.errors import ConfigError
from wallx_jax.utils.settings import build, settings_of

SECTIONS = (ModelSource, RobotConfig, DataConfig, OptimConfig, MeshConfig, DistributedConfig, LoopConfig, RunConfig)


def resolve(config: ConfigDict) -> RunConfig:
    """Validate a configuration.

    Args:
        config: a modified `default_config`.

    Returns:
        The configuration as frozen dataclasses.

    Raises:
        ConfigError: settings are invalid; the message lists all of them.
    """
    given = flatten(config)
    values, errors = _checked(given)
    not_inherited = {key: setting.default for key, setting in SETTINGS.items() if not setting.inherited}
    others = {}
    for name, entry in values["datasets"].items():
        own = {key: value for key, value in entry.items() if key in PER_DATASET}
        others[name], found = _checked(given | not_inherited | own)
        errors += [f"datasets.{name}.{error}" for error in found if error not in errors]
    errors += view_name_errors(values, *others.values())
    if errors:
        raise ConfigError(*errors)
    mixed = tuple(
        MixedDataset(name, float(values["datasets"][name].get("weight", 1.0)), _data(other), _robot(other))
        for name, other in others.items()
    )
    return _run_config(values, mixed)


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat values of a configuration stored as JSON in a checkpoint.

    Settings that did not exist when the checkpoint was written have their defaults.
    """
    return read_types({key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})[0]


def _checked(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return flat values, with invalid ones replaced by defaults where needed, and all their errors."""
    values, errors = read_types(given)
    errors += value_errors(values)
    for section in SECTIONS:
        errors += section.errors(values)
    return values, errors


def _run_config(v: Mapping[str, Any], mixed: tuple[MixedDataset, ...]) -> RunConfig:
    numerics = [setting.key for setting in settings_of(Numerics, "numerics.") if v[setting.key] is not None]
    return build(
        RunConfig,
        v,
        model=build(ModelSource, v, numerics=tuple((key.removeprefix("numerics."), v[key]) for key in numerics)),
        robot=_robot(v),
        data=_data(v),
        mixed=mixed,
        optim=build(
            OptimConfig,
            v,
            learning_rates=tuple(map(pattern_and_rate, v["learning_rates"])),
            freeze_vlm=is_vlm_frozen(v),
        ),
        loop=build(
            LoopConfig,
            v,
            log_name=v["log_name"] or v["save_path"].rstrip("/").rsplit("/", 1)[-1],
            profile_save_path=v["profile_save_path"] or f"{v['save_path']}/profile",
        ),
    )


def _robot(v: Mapping[str, Any]) -> RobotConfig:
    return build(RobotConfig, v, dof=tuple(v["dof_config"].items()), agent_pos=tuple(v["agent_pos_config"].items()))


def _data(v: Mapping[str, Any]) -> DataConfig:
    _, state_key, action_key = KEY_MAPPINGS.get(v["repo_id"], ({}, "observation.state", "action"))
    return build(
        DataConfig,
        v,
        cameras=tuple(Camera(view, key, v["resolution"][view]) for view, key in camera_views(v).items()),
        state_key=v["state_key"] or state_key,
        action_key=v["action_key"] or action_key,
        augment=build(AugmentConfig, v, "augment.") if v["augment.enabled"] else None,
        eval_batch_size=v["eval_batch_size_per_gpu"] or v["batch_size_per_gpu"],
    )
