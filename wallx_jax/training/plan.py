"""Summarize a run (data, memory, schedule and compute) from shapes, headers and tables, before loading weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from wallx_jax.data.build import DatasetRun, blank_sample
from wallx_jax.data.prompt import FAST_CLOSING_TOKENS
from wallx_jax.models import param_summary
from wallx_jax.models.param_summary import gib
from wallx_jax.models.vision import visual_grid
from wallx_jax.models.vision_plan import token_count
from wallx_jax.training import flops
from wallx_jax.training.init import ModelSource
from wallx_jax.training.loop import StepCounts
from wallx_jax.training.optimizer import FROZEN, VLM, Optimizer
from wallx_jax.training.sharding import batch_copies
from wallx_jax.training.state import TrainState
from wallx_jax.utils import tree


@dataclass(frozen=True)
class MemoryEstimate:
    """Persistent memory of an update in bytes per device, excluding activations.

    Attributes:
        parameters: all parameters.
        gradients: gradients of the trainable parameters.
        optimizer: optimizer state, including a moving average of the parameters (EMA).
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Plan:
    """Summary of a run; `str(plan)` formats it for display.

    Attributes:
        source: path that the model comes from.
        dataset: description of the datasets.
        cameras: description of the camera views and image sizes.
        sample: token counts, {"prompt": ..., "images": {view: tokens}, "fast": ..., "actions": ...}. The prompt count
            includes the image tokens and the maximum number of FAST tokens; action tokens follow the prompt.
        rows: parameter table.
        memory: persistent memory per device.
        device_limit: memory of a device in bytes; None if unknown.
        curve: (update, learning rate) at selected updates, for a peak of `learning_rate`.
        peaks: trained groups, each with its peak learning rate.
        batch: description of how the global batch is composed.
        length: length of the run.
        flops: model FLOPs of an update per sample.
        peak_flops: bfloat16 peak of all devices in FLOP/s; None if unknown.
    """

    source: str
    dataset: str
    cameras: str
    sample: Mapping[str, Any]
    rows: tuple[param_summary.Row, ...]
    memory: MemoryEstimate
    device_limit: int | None
    curve: tuple[tuple[int, float], ...]
    peaks: tuple[str, ...]
    batch: str
    length: StepCounts
    flops: int
    peak_flops: float | None

    def __str__(self) -> str:
        sample, length, memory = self.sample, self.length, self.memory
        views = ", ".join(f"{view} {tokens}" for view, tokens in sample["images"].items())
        fast = f", up to {sample['fast']} of FAST actions" if sample["fast"] else ""
        actions = f" and {sample['actions']} action tokens" if sample["actions"] else ""
        updates = f"{length.total_steps:,} updates of {length.global_batch:,} samples"
        curve = ", ".join(f"{rate:.3g} at {update:,}" for update, rate in self.curve)
        groups = "; ".join(self.peaks)
        return "\n".join(
            (
                f"model        {self.source}",
                f"dataset      {self.dataset}",
                f"cameras      {self.cameras}",
                f"sample       {sample['prompt']} prompt tokens "
                f"({sum(sample['images'].values())} of images: {views}{fast}){actions}",
                f"batch        {self.batch}",
                f"length       {updates}, {length.epoch / length.global_batch:.4g} per epoch: "
                f"{length.total_steps * length.global_batch / length.epoch:.3g} epochs",
                f"rate         {groups}; the curve of learning_rate: {curve}",
                "parameters",
                *(f"  {line}" for line in param_summary.table(self.rows)),
                f"memory       per device: parameters {gib(memory.parameters)}, gradients {gib(memory.gradients)}, "
                f"optimizer {gib(memory.optimizer)}; together {gib(memory.total)}, activations on top{self._room()}",
                f"compute      {self.flops * length.global_batch / 1e12:.4g} TFLOPs per update{self._duration()}",
            )
        )

    def _room(self) -> str:
        if self.device_limit is None:
            return ""
        fits = "" if self.memory.total < self.device_limit else ": IT DOES NOT FIT; use lora, freeze_vlm or mesh.fsdp"
        return f" (a device has {gib(self.device_limit)}{fits})"

    def _duration(self) -> str:
        if self.peak_flops is None:
            return ""
        update_s = self.flops * self.length.global_batch / self.peak_flops
        hours = update_s * self.length.total_steps / 3600
        return f": at the peak of these devices {update_s:.3g} s, and {hours:.3g} h for the run; no run gets that far"


def make_plan(
    datasets: Sequence[DatasetRun],
    source: ModelSource,
    optimizer: Optimizer,
    state: TrainState,
    mesh: Mesh,
    length: StepCounts,
) -> Plan:
    """Create the summary of a run.

    Args:
        datasets: the datasets of the run.
        source: model source.
        optimizer: the run's optimizer.
        state: shapes, dtypes and shardings of the training state (see `training.init.abstract_state`).
        mesh: device mesh.
        length: length of the run.
    """
    settings, info, layout = datasets[0].settings, datasets[0].info, datasets[0].processor.config
    model, optim, data = source.config, optimizer.config, settings.data
    sample, use_flow = blank_sample(layout), layout.objective == "flow"
    specs = tree.flatten(state.params)

    def label(path: str) -> str:
        group = optimizer.group_of(path)
        return group if group == FROZEN else f"{group}, peak {optimizer.peaks[group]:g}"

    rows = tuple(param_summary.rows(specs, label))
    points = {0, optim.warmup_steps, *(length.total_steps * quarter // 4 for quarter in range(1, 5))}
    curve = optimizer.schedules[VLM]
    device = mesh.local_devices[0]  # devices of other processes report no memory stats
    peak = flops.peak_tflops(device.device_kind)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    copies, micro_batches = batch_copies(mesh), settings.loop.gradient_accumulation_steps
    cameras = ", ".join(
        f"{view} = {key} {'x'.join(map(str, info.frame_size(key)))} read at {'x'.join(map(str, size))}"
        for view, key, size in zip(layout.views, layout.camera_keys, layout.image_sizes, strict=True)
    )

    def description(dataset: DatasetRun) -> str:
        info, total = dataset.info, sum(each.weight for each in datasets)
        proportion = f", {dataset.weight / total:.0%} of the samples" if len(datasets) > 1 else ""
        return (
            f"{dataset.settings.data.location}: {info.num_episodes:,} episodes, {info.num_frames:,} frames at "
            f"{info.fps:g} fps ({len(dataset.train):,} train, {len(dataset.held_out):,} held out){proportion}"
        )

    resumed = ", resumed with its optimizer and data order" if source.resumes else ""
    return Plan(
        source=f"{source.checkpoint or source.files}{resumed}",
        dataset="\n             ".join(map(description, datasets)),
        cameras=cameras,
        sample={
            "prompt": layout.prompt_length,
            "images": {
                view: token_count(visual_grid(np.empty((1, *size, 0)), model.vision), model.vision)
                for view, size in zip(layout.views, layout.image_sizes, strict=True)
            },
            "fast": max(layout.label_window - FAST_CLOSING_TOKENS, 0),  # the closing tokens end the completion
            "actions": layout.horizon if use_flow else 0,
        },
        rows=rows,
        memory=memory_of(state, optimizer, micro_batches),
        device_limit=(device.memory_stats() or {}).get("bytes_limit"),
        curve=tuple((update, float(curve(update))) for update in sorted(points) if update <= length.total_steps),
        peaks=tuple(dict.fromkeys(row.label for row in rows if row.label != FROZEN)),
        batch=f"{length.global_batch} = {data.batch_size} samples x {copies} copies x {micro_batches} micro-batches; "
        f"{mesh.size} x {device.device_kind}, mesh {axes}",
        length=length,
        flops=flops.update_flops(model, sample, optimizer.is_trainable, use_flow),
        peak_flops=None if peak is None else 1e12 * peak * mesh.size,
    )


def memory_of(state: TrainState, optimizer: Optimizer, micro_batches: int) -> MemoryEstimate:
    """Return the memory per device of a state with shardings.

    With micro-batches, the gradients include their float32 sum.
    """

    def local(leaf: Any, itemsize: int | None = None) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize)

    parameters = tree.flatten(state.params)
    trained = [leaf for path, leaf in parameters.items() if optimizer.is_trainable(path)]
    return MemoryEstimate(
        parameters=sum(map(local, parameters.values())),
        gradients=sum(local(leaf) + (local(leaf, 4) if micro_batches > 1 else 0) for leaf in trained),
        optimizer=sum(map(local, jax.tree.leaves((state.opt_state, state.ema)))),
    )
