"""Define the validated configuration: the frozen dataclasses that `wallx_jax.config.resolve` returns."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.models.config import LoraConfig, Numerics


@dataclass(frozen=True)
class ModelSettings:
    """The source of the model's weights and its tokenizer; see `default_config`.

    Attributes:
        path: local directory or Hub repo id.
        revision: branch, tag or commit on the Hub; None: the default branch.
        action_expert_intermediate_size: MLP channels of a new action expert.
        use_fast_tokenizer: whether actions are FAST tokens instead of flow-matching targets.
        action_tokenizer_path: FAST tokenizer, local directory or Hub repo id.
        numerics: (field, value) pairs of models.config.Numerics that the configuration sets.
    """

    path: str
    revision: str | None
    action_expert_intermediate_size: int
    use_fast_tokenizer: bool
    action_tokenizer_path: str | None
    numerics: tuple[tuple[str, Any], ...]

    def apply_numerics(self, base: Numerics) -> Numerics:
        """Return `base`, the numerics of the checkpoint or the defaults, with the configured fields replaced."""
        return dataclasses.replace(base, **dict(self.numerics))


@dataclass(frozen=True)
class RobotConfig:
    """Named groups of state and action dims, in vector order.

    `wallx_jax.data.validate.check_dataset` replaces an empty table by one group of all dims, and feature slices such as
    "action[0:6]" by their number of dims.

    Attributes:
        dof: (name, number of dims or feature slice) of each action group.
        agent_pos: the same for the state.
        predict_keys: action groups that are predicted; the others are masked. Empty: all.
        obs_keys: state groups that the policy observes; the others are masked. Empty: all.
        relative_keys: action groups trained as the difference from the state; each is also a state group.
    """

    dof: tuple[tuple[str, int | str], ...]
    agent_pos: tuple[tuple[str, int | str], ...]
    predict_keys: tuple[str, ...]
    obs_keys: tuple[str, ...]
    relative_keys: tuple[str, ...] = ()

    def predicted(self) -> tuple[bool, ...]:
        """Return one flag per action dim: True if it is predicted, False if it is masked."""
        return _used(self.dof, self.predict_keys)

    def observed(self) -> tuple[bool, ...]:
        """Return one flag per state dim: True if the policy observes it, False if it is masked."""
        return _used(self.agent_pos, self.obs_keys)

    def relative_to(self) -> tuple[int, ...]:
        """Return, per action dim, the state dim that it is relative to, or -1; empty if no action is relative."""
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
    """One camera of the robot.

    Attributes:
        view: name of the view, such as "face_view"; the prompt has its text in `PromptTemplate.view_names`.
        key: the camera's feature in the dataset.
        resolution: longer side of the resized image in pixels; -1 keeps the recorded size.
    """

    view: str
    key: str
    resolution: int


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths of the training image augmentations (data.augment); see `default_config`."""

    crop: float
    rotate_deg: float
    brightness: float
    contrast: float
    saturation: float
    wrist_geometry: bool


@dataclass(frozen=True)
class DataConfig:
    """The dataset and how to read it; see `default_config` for the fields that are not listed here.

    Attributes:
        repo_id: Hub repo id or local directory.
        root: local directory; None for a dataset on the Hub.
        cameras: in prompt order.
        prompt: prompt texts.
        state_key: feature slices of the state, see `wallx_jax.config.feature_slices`.
        action_key: feature slices of the action.
        action_horizon: A, future actions per sample.
        augment: None: no augmentation.
        batch_size: training samples per device and micro-batch.
        eval_batch_size: validation samples per device.
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
        """Where to open the dataset: the local directory if given, else the repo id."""
        return self.root or self.repo_id


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


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning rates, trainable parameters and adapters; see `default_config`.

    Attributes:
        learning_rates: (regular expression for parameter paths, peak learning rate); the first match applies.
    """

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
    """Length, seed, intervals (in optimizer updates) and outputs of the run; see `default_config`."""

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
        """Return the number of updates of the run: num_training_steps or num_epoch epochs, whichever ends first.

        Epochs are rounded up to whole updates, so every frame of the last epoch is trained on.

        Args:
            frames: training frames per epoch.
            global_batch: samples per update, over all devices and micro-batches.
        """
        passes = -(-self.num_epoch * max(frames, 1) // global_batch)
        return min(limit for limit in (self.num_training_steps, passes) if limit)

    def decay_steps(self, frames: int, global_batch: int) -> int:
        """Return the updates over which the learning rate decays: num_training_steps, even if num_epoch ends first."""
        return self.num_training_steps or self.total_steps(frames, global_batch)


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1 on at most one axis takes the remaining devices.

    Attributes:
        data: data parallelism: copies of the model.
        fsdp: parameters and optimizer state sharded, see `wallx_jax.training.sharding`.
        tensor: tensor parallelism: attention heads and MLP width sharded.
    """

    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class DistributedConfig:
    """Settings of a multi-process run; all None: taken from the environment, else a single process.

    Attributes:
        coordinator: "HOST:PORT" of process 0.
        num_processes: number of processes of the run.
        process_id: index of this process, from 0.
    """

    coordinator: str | None
    num_processes: int | None
    process_id: int | None


@dataclass(frozen=True)
class RunConfig:
    """The validated configuration of a training run.

    Attributes:
        model: source of the weights.
        robot: state and action dims of the first dataset.
        data: the first dataset.
        optim: optimizer.
        loop: length, intervals and outputs.
        mesh: device mesh.
        platform: "cpu", "gpu" or "tpu"; None: JAX's choice.
        compile_cache: directory, "auto" or "off", see `wallx_jax.utils.compile_cache.enable`.
        distributed: processes of the run.
        mixed: the datasets after the first.
    """

    model: ModelSettings
    robot: RobotConfig
    data: DataConfig
    optim: OptimConfig
    loop: LoopConfig
    mesh: MeshConfig
    platform: str | None
    compile_cache: str
    distributed: DistributedConfig
    mixed: tuple[MixedDataset, ...] = ()

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


def _used(table: tuple[tuple[str, int], ...], keys: tuple[str, ...]) -> tuple[bool, ...]:
    return tuple(not keys or name in keys for name, dims in table for _ in range(dims))
