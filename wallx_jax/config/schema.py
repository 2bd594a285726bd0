"""A checked configuration as frozen dataclasses: what `wallx_jax.config.resolve` returns and everything else reads."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.models.config import LoraConfig, Numerics


@dataclass(frozen=True)
class ModelSource:
    """Where the weights come from. `numerics`: the (field, value) pairs of models.config.Numerics that were set."""

    path: str
    revision: str | None
    action_expert_intermediate_size: int
    use_fast_tokenizer: bool
    action_tokenizer_path: str | None
    numerics: tuple[tuple[str, Any], ...]

    def apply_numerics(self, base: Numerics) -> Numerics:
        """The checkpoint's (or default) numerics with the configured fields replaced."""
        return dataclasses.replace(base, **dict(self.numerics))


@dataclass(frozen=True)
class RobotConfig:
    """Named groups of dimensions, (name, dims) in the vector's order. `wallx_jax.data.validate.check_dataset` makes one
    group of all dims of an empty table, and counts the dims where a table says places in the dataset, "action[0:6]"."""

    dof: tuple[tuple[str, int | str], ...]
    agent_pos: tuple[tuple[str, int | str], ...]
    predict_keys: tuple[str, ...]
    obs_keys: tuple[str, ...]
    relative_keys: tuple[str, ...] = ()

    def predicted(self) -> tuple[bool, ...]:
        """One flag per action dim: is it predicted (True) or masked?"""
        return _used(self.dof, self.predict_keys)

    def observed(self) -> tuple[bool, ...]:
        """One flag per state dim: does the policy see it?"""
        return _used(self.agent_pos, self.obs_keys)

    def relative_to(self) -> tuple[int, ...]:
        """Per action dim the state dim that it is relative to, or -1; empty where no action is relative."""
        if not self.relative_keys:
            return ()
        first_of, first = {}, 0
        for name, dims in self.agent_pos:
            first_of[name], first = first, first + dims
        return tuple(
            first_of[name] + dim if name in self.relative_keys else -1 for name, dims in self.dof for dim in range(dims)
        )


@dataclass(frozen=True)
class Camera:
    """`view` names it in the prompt, `key` in the dataset; `resolution` is the longer side in pixels, -1 keeps it."""

    view: str
    key: str
    resolution: int


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths of data.augment; see `default_config`."""

    crop: float
    rotate_deg: float
    brightness: float
    contrast: float
    saturation: float
    wrist_geometry: bool


@dataclass(frozen=True)
class DataConfig:
    """The dataset and how it is read; see `default_config`.

    Batch sizes are per device and micro-batch.

    Attributes:
        root: local directory; None for a dataset on the hub.
        state_key, action_key: feature slices, see `wallx_jax.config.feature_slices`.
        augment: None leaves images as they are.
    """

    repo_id: str
    root: str | None
    revision: str | None
    download_videos: bool
    episodes: str | None
    unreadable_frames: str
    cameras: tuple[Camera, ...]
    prompt: PromptTemplate
    state_key: str
    action_key: str
    norm_stats_path: str | None
    train_test_split: float
    split_mode: str
    split_seed: int
    action_horizon: int
    max_length: int
    max_fast_tokens: int
    augment: AugmentConfig | None
    frame_cache: str | None
    num_workers: int
    batch_size: int
    eval_batch_size: int

    @property
    def location(self) -> str:
        """What to open: the local directory if there is one, else the repo id."""
        return self.root or self.repo_id


@dataclass(frozen=True)
class MixedDataset:
    """One of several datasets; `weight` is how many of its samples there are for one of the first dataset's."""

    name: str
    weight: float
    data: DataConfig
    robot: RobotConfig


@dataclass(frozen=True)
class OptimConfig:
    """See `default_config`."""

    learning_rate: float
    min_lr: float
    warmup_steps: int
    action_expert_learning_rate: float | None
    weight_decay: float
    max_grad_norm: float
    freeze_vlm: bool
    train_action_expert_only: bool
    train_action_heads: bool
    optimizer: str = "adamw"
    learning_rates: tuple[tuple[str, float], ...] = ()
    stochastic_rounding: bool = True
    ema_decay: float | None = None
    lora: LoraConfig = LoraConfig()


@dataclass(frozen=True)
class LoopConfig:
    """Length, seeds, intervals (in optimizer updates) and outputs of the run. See `default_config`."""

    save_path: str
    seed: int
    gradient_accumulation_steps: int
    num_training_steps: int | None
    num_epoch: int
    flow_loss_weight: float
    mask_padded_actions: bool
    max_nonfinite_steps: int
    scan_layers: bool
    save_interval: int
    max_to_keep: int
    resume_ckpt: str | None
    load_ckpt_only: bool
    eval_interval: int
    eval_frames: int
    eval_batches: int | None
    log_interval: int
    use_wandb: bool
    log_project: str
    log_name: str
    profile: bool
    profile_save_path: str
    profile_wait_iters: int
    profile_warmup_iters: int
    profile_active_iters: int

    def total_steps(self, frames: int, global_batch: int) -> int:
        """Updates until the run ends: num_training_steps or num_epoch passes over the training frames, whichever comes
        first. The last pass is a whole one, so that up to an update more is made."""
        passes = -(-self.num_epoch * max(frames, 1) // global_batch)
        return min(limit for limit in (self.num_training_steps, passes) if limit)

    def decay_steps(self, frames: int, global_batch: int) -> int:
        """Updates over which the learning rate falls: num_training_steps, even where num_epoch ends the run earlier."""
        return self.num_training_steps or self.total_steps(frames, global_batch)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on one of them takes the rest."""

    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class DistributedConfig:
    """Who the processes of a run are. All None: one process, or as the environment says."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None


@dataclass(frozen=True)
class RunConfig:
    model: ModelSource
    robot: RobotConfig
    data: DataConfig
    optim: OptimConfig
    loop: LoopConfig
    mesh: MeshConfig
    platform: str | None
    compile_cache: str
    distributed: DistributedConfig
    mixed: tuple[MixedDataset, ...] = ()  # datasets after the first

    def datasets(self) -> tuple[tuple[str, float, "RunConfig"], ...]:
        """(name, weight, the run as if it had this dataset alone), the first one first."""
        first = dataclasses.replace(self, mixed=())
        others = (
            (part.name, part.weight, dataclasses.replace(first, data=part.data, robot=part.robot))
            for part in self.mixed
        )
        return ((dataset_name(self.data.repo_id), 1.0, first), *others)


def dataset_name(repo_id: str) -> str:
    """The last part of a repo id or path: what the first of several datasets is called."""
    return repo_id.rstrip("/").rsplit("/", 1)[-1]


def _used(table: tuple[tuple[str, int], ...], keys: tuple[str, ...]) -> tuple[bool, ...]:
    return tuple(not keys or name in keys for name, dims in table for _ in range(dims))
