"""The configuration of a whole run: all sections."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wallx_jax.config.schema.data import DataConfig
from wallx_jax.config.schema.devices import DistributedConfig, MeshConfig, Platform
from wallx_jax.config.schema.loop import LoopConfig
from wallx_jax.config.schema.model import ModelSource
from wallx_jax.config.schema.optim import OptimConfig
from wallx_jax.config.schema.robot import RobotConfig
from wallx_jax.utils.settings import section, setting


@dataclass(frozen=True)
class MixedDataset:
    """An additional dataset of a mixture.

    Attributes:
        name: name of the dataset in this run.
        weight: sampling ratio relative to the first dataset (2.0: twice as many samples).
        data: the dataset and how to read it.
        robot: its robot.
    """

    name: str
    weight: float
    data: DataConfig
    robot: RobotConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The validated configuration of a training run.

    Attributes:
        model: source of the weights.
        robot: state and action dims of the first dataset.
        data: the first dataset.
        mixed: the datasets after the first.
        optim: optimizer.
        platform: None: JAX's choice.
        compile_cache: see `wallx_jax.utils.compile_cache.enable`.
        mesh: device mesh.
        distributed: processes of the run.
        loop: length, intervals and outputs.
    """

    model: ModelSource = section(ModelSource, prefix=False)
    robot: RobotConfig = section(RobotConfig, prefix=False)
    data: DataConfig = section(DataConfig, prefix=False)
    mixed: tuple[MixedDataset, ...] = setting(
        {},
        'additional datasets, {name: {"repo_id": "...", "weight": 1.0, ...}}; weight is the sampling ratio relative to '
        "the first dataset",
        key="datasets",
        derived=True,
        inherited=False,
        after="norm_stats_path",
    )
    optim: OptimConfig = section(OptimConfig, prefix=False)
    platform: Platform | None = setting(
        None, "devices to compute on; None: JAX's choice, but not the CPU of a GPU machine"
    )
    compile_cache: str = setting(
        "auto",
        'directory for compiled programs, "auto" (JAX_COMPILATION_CACHE_DIR, else wallx_jax/xla in the user\'s cache '
        'directory) or "off"',
    )
    mesh: MeshConfig = section(MeshConfig)
    distributed: DistributedConfig = section(DistributedConfig)
    loop: LoopConfig = section(LoopConfig, prefix=False)

    @staticmethod
    def errors(v: Mapping[str, Any]) -> list[str]:
        """Check settings of different sections against each other, given all settings by key."""
        errors = [] if v["compile_cache"] else ["compile_cache = '': give a directory, 'auto' or 'off'"]
        if v["robot_name"] is not None and v["robot_name"] != v["repo_id"]:
            errors.append(
                f"robot_name = {v['robot_name']!r} is not repo_id = {v['repo_id']!r}: they must be the same, or "
                "robot_name unset"
            )
        if v["repo_id"] and dataset_name(v["repo_id"]) in v["datasets"]:
            errors.append(f"datasets.{dataset_name(v['repo_id'])}: the first dataset has this name; choose another")
        return errors + _objective_errors(v)

    def datasets(self) -> tuple[tuple[str, float, "RunConfig"], ...]:
        """Return (name, weight, the run as if this were its only dataset) for each dataset, in order."""
        first = dataclasses.replace(self, mixed=())
        others = (
            (part.name, part.weight, dataclasses.replace(first, data=part.data, robot=part.robot))
            for part in self.mixed
        )
        return ((dataset_name(self.data.repo_id), 1.0, first), *others)


def dataset_name(repo_id: str) -> str:
    """Return the last component of a repo id or path, which names the first dataset of a mixture."""
    return repo_id.rstrip("/").rsplit("/", 1)[-1]


def _objective_errors(v: Mapping[str, Any]) -> list[str]:
    """Check the settings of other sections against use_fast_tokenizer."""
    errors, is_fast = [], v["use_fast_tokenizer"]
    if is_fast and v["mask_padded_actions"]:
        errors.append(
            "mask_padded_actions = True has no meaning with use_fast_tokenizer, a FAST chunk is whole: switch one off"
        )
    frozen = [key for key in ("freeze_vlm", "train_action_expert_only") if v[key]]
    if frozen and is_fast:
        errors.append(
            f"{frozen[0]} = True leaves nothing to train with use_fast_tokenizer, FAST actions are text: switch one off"
        )
    actions = "max_fast_tokens" if is_fast else "action_horizon"
    if v[actions] >= v["max_length"]:
        errors.append(
            f"{actions} = {v[actions]} leaves no room for a prompt in max_length = {v['max_length']}: raise "
            f"max_length, or lower {actions}"
        )
    return errors
