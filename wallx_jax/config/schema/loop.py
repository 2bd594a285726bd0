"""Settings of the training loop: length, seed, intervals and outputs of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wallx_jax.utils.settings import setting


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, seed, intervals and outputs of the run. Steps are optimizer updates."""

    save_path: str = setting(None, "output directory, overridden by --workdir", required=True)
    save_interval: int = setting(1000, "steps between checkpoints; the last step is always saved", above=0)
    max_to_keep: int = setting(2, "number of newest checkpoints to keep", above=0)
    # A resumed run must keep the settings that determine its model, data and optimizer state, see training.resume.
    resume_ckpt: str | None = setting(
        None,
        'checkpoint to resume; "latest": the newest in save_path, or a new run if there is none',
        key="resume.ckpt",
    )
    load_ckpt_only: bool = setting(
        False, "load only the weights; step, optimizer state and data order start over", key="resume.load_ckpt_only"
    )
    eval_interval: int = setting(1000, "steps between validations; 0: never", minimum=0)
    eval_frames: int = setting(
        256, "held-out frames per dataset and validation, evenly spaced; all if there are fewer", above=0
    )
    eval_batches: int | None = setting(
        None,
        "maximum batches per dataset and validation, with which the frames and thus the loss depend on batch size and "
        "number of devices; None: only eval_frames limits it",
        above=0,
    )
    log_interval: int = setting(10, "steps between log lines", above=0)
    use_wandb: bool = setting(False, "also log to Weights & Biases")
    log_project: str = setting("wallx_jax", "W&B project")
    log_name: str = setting(None, "W&B run name; None: the last component of save_path", derived=True)
    profile: bool = setting(False, "record a JAX profiler trace")
    profile_save_path: str = setting(
        None, "trace directory; None: save_path/profile", derived=True, only_with="profile"
    )
    profile_wait_iters: int = setting(10, "steps before the warmup of the trace", minimum=0)
    profile_warmup_iters: int = setting(5, "steps between the wait and the trace; not recorded either", minimum=0)
    profile_active_iters: int = setting(2, "steps to record", above=0)
    gradient_accumulation_steps: int = setting(1, "micro-batches per update", above=0, after="batch_size_per_gpu")
    num_training_steps: int | None = setting(
        None,
        "steps of the run and of the cosine decay; None: from num_epoch",
        above=0,
        after="gradient_accumulation_steps",
    )
    num_epoch: int = setting(
        100,
        "epochs over the training frames of all datasets, if num_training_steps does not end first; 0: no limit",
        minimum=0,
        after="num_training_steps",
    )
    flow_loss_weight: float = setting(
        1.0, "weight of the flow loss relative to the cross-entropy", minimum=0, after="max_grad_norm"
    )
    mask_padded_actions: bool = setting(
        False,
        "exclude actions past the end of the episode from the flow loss; upstream does not",
        after="flow_loss_weight",
    )
    max_nonfinite_steps: int = setting(
        10, "stop the run after this many skipped (NaN or Inf) updates in total", above=0, after="lora.targets"
    )
    seed: int = setting(
        42, "for parameter initialization, sample order and noise", minimum=0, below=2**32, after="max_nonfinite_steps"
    )
    scan_layers: bool = setting(
        True,
        "scan over stacked layers; False: unroll them, which is faster on a CPU, but compile time grows with depth "
        "(prohibitive on a GPU at 3B), each save briefly holds a second copy of the state, and adafactor clips updates "
        "per layer",
        after="platform",
    )

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

    @staticmethod
    def errors(v: Mapping[str, Any]) -> list[str]:
        """Check the section's settings against each other, given all settings by key."""
        errors = []
        if v["num_training_steps"] is None and v["num_epoch"] == 0:
            errors.append("num_epoch = 0 needs num_training_steps, set it: without one of them the run has no end")
        if v["resume.load_ckpt_only"] and not v["resume.ckpt"]:
            errors.append("resume.load_ckpt_only = True needs resume.ckpt: name the checkpoint there")
        return errors
