"""Define the train step (one optimizer update) and the eval step as pure functions to be jitted.

Legend: N micro-batches, B batch, A horizon, C channels.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wallx_jax.data.batch import Batch, EvalBatch
from wallx_jax.models import flow, losses
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.params import from_params
from wallx_jax.models.wallx import FlowTarget, LossTotals
from wallx_jax.training.optimizer import Optimizer, clip
from wallx_jax.training.state import TrainState, update_if
from wallx_jax.training.stochastic_rounding import cast_like, to_float32
from wallx_jax.utils import jax_flags, tree

EVAL_SEED = 20_251_123  # noise and flow times of held-out frames: the same in every run, so that runs compare


@dataclass(frozen=True)
class Objective:
    """Losses and metrics to compute.

    Attributes:
        use_flow: train the action tokens by flow matching (False in FAST mode, where actions are text).
        flow_loss_weight: weight of the flow loss relative to the cross-entropy loss.
        mask_padded_actions: exclude actions past the end of the episode from the flow loss.
        action_ids: range [first, last + 1) of the FAST token ids whose accuracy is measured; None for no accuracy.
        datasets: names of the datasets whose losses are also measured individually, with `Batch.dataset` as index;
            empty in a run with only one.
    """

    use_flow: bool = True
    flow_loss_weight: float = 1.0
    mask_padded_actions: bool = False
    action_ids: tuple[int, int] | None = None
    datasets: tuple[str, ...] = ()

    def left_out(self, batch: Batch) -> jax.Array | None:
        """Return the mask of actions that are excluded from the flow loss, bool [..., A]; None if none are."""
        return batch.action_is_pad if self.mask_padded_actions else None


def loss_counts(batch: Batch, model: WallXConfig, objective: Objective, per_sample: bool = False) -> LossTotals:
    """Return the denominators of the two losses over a batch (any leading axes), and its number of action tokens.

    Returns:
        Scalars; if `per_sample`, [B], which requires a single leading axis.
    """
    flow_count = tokens = None
    if objective.use_flow:
        left_out = objective.left_out(batch)
        flow_count = flow.flow_count(batch.action_mask, model.numerics.flow_loss, left_out, per_sample)
    if objective.action_ids is not None:
        tokens = losses.token_range_count(batch.labels, objective.action_ids, per_sample)
    labels = losses.label_count(batch.labels, per_sample)
    return LossTotals(labels, jnp.zeros_like(labels) if flow_count is None else flow_count, tokens)


def counts_by_dataset(batch: Batch, model: WallXConfig, objective: Objective) -> LossTotals:
    """Return `loss_counts` of a batch (any leading axes) per dataset.

    Returns:
        [datasets], where any count may be 0; scalars if `objective.datasets` is empty.
    """
    if not objective.datasets:
        return loss_counts(batch, model, objective)
    size, leading = batch.dataset.size, batch.dataset.ndim
    rows = jax.tree.map(lambda x: x.reshape(size, *x.shape[leading:]), dataclasses.replace(batch, images=()))
    return by_dataset(loss_counts(rows, model, objective, per_sample=True), rows, objective)


def by_dataset(sums: LossTotals, batch: Batch, objective: Objective) -> LossTotals:
    """Sum per-sample values [B] by dataset, to [datasets]."""
    own = batch.dataset[:, None] == jnp.arange(len(objective.datasets))
    # A where rather than a product, so that non-finite values of one dataset do not affect the others.
    return jax.tree.map(lambda x: jnp.sum(jnp.where(own, x[:, None], 0), axis=0), sums)


def overall(counts: LossTotals) -> LossTotals:
    """Return the denominators of the losses over all datasets, at least 1, and the number of action tokens."""
    labels, flow_count, tokens = jax.tree.map(jnp.sum, counts)
    return LossTotals(jnp.maximum(labels, 1), jnp.maximum(flow_count, 1), tokens)


def batch_sums(
    params: tree.Tree,
    batch: Batch,
    noise: jax.Array,
    time: jax.Array,
    model: WallXConfig,
    objective: Objective,
    per_sample: bool = False,
) -> LossTotals:
    """Return the loss numerators of a batch.

    Args:
        params: all parameters.
        batch: batch [B].
        noise: noise of flow matching, [B, A, C].
        time: flow times, [B].
        model: model config.
        objective: losses and metrics to compute.
        per_sample: return sums per sample instead of over the batch.

    Returns:
        Scalars; [B] if `per_sample`.
    """
    net, target = from_params(model, params), None
    if objective.use_flow:
        target = FlowTarget(batch.actions, batch.action_mask, noise, time, objective.left_out(batch))
    return net.loss_sums(net.embed_batch(batch), batch.labels, target, objective.action_ids, per_sample)


def make_train_step(
    model: WallXConfig, optimizer: Optimizer, objective: Objective, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Create the train step.

    The N micro-batches run sequentially; sums are divided by the counts over all of them, so the update equals that of
    a single batch of N x B. Noise, time and rounding depend only on (seed, step). The update is computed in float32,
    whatever the dtypes of parameters and moments. If the loss or the gradient norm is not finite, parameters and
    optimizer state stay unchanged and the update is counted as skipped.

    Args:
        model: model config.
        optimizer: the run's optimizer.
        objective: losses and metrics to compute.
        seed: seed of noise, time and rounding.

    Returns:
        train_step(state, batch) -> (state, metrics), for batches with leading axes [N, B]. Metrics given as (sum,
        count) are averaged by the caller; count may be zero.
    """
    optim = optimizer.config

    def rounding_key(step: jax.Array) -> jax.Array | None:
        return jax.random.fold_in(jax.random.key(seed + 1), step) if optim.stochastic_rounding else None

    @jax_flags.ours()
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        params, frozen = tree.split(state.params, optimizer.is_trainable)
        dataset_counts = counts_by_dataset(batch, model, objective)
        counts = overall(dataset_counts)
        noise, time = _noise_and_time(jax.random.fold_in(jax.random.key(seed), state.step), batch, model)

        def micro_loss(
            params: tree.Tree, micro: Batch, noise: jax.Array, time: jax.Array
        ) -> tuple[jax.Array, tuple[LossTotals, LossTotals]]:
            several = bool(objective.datasets)
            dataset_sums = batch_sums(tree.merge(params, frozen), micro, noise, time, model, objective, several)
            if several:
                dataset_sums = by_dataset(dataset_sums, micro, objective)
            sums = jax.tree.map(jnp.sum, dataset_sums)
            means = LossTotals(sums.cross_entropy / counts.cross_entropy, sums.flow / counts.flow, sums.action_correct)
            return means.cross_entropy + objective.flow_loss_weight * means.flow, (means, dataset_sums)

        loss_and_grads = jax.value_and_grad(micro_loss, has_aux=True)
        micro_batches = (batch, noise, time)
        if noise.shape[0] == 1:
            (loss, aux), grads = loss_and_grads(params, *jax.tree.map(lambda x: x[0], micro_batches))
        else:
            (loss, aux), grads = _accumulate(loss_and_grads, params, micro_batches)
        means, dataset_sums = aux

        norm = optax.tree.norm(to_float32(grads))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(before: Any) -> Any:
            wide, moments, ema = to_float32(before)
            updates, moments = optimizer.tx.update(clip(to_float32(grads), norm, optim.max_grad_norm), moments, wide)
            wide = optax.apply_updates(wide, updates)
            if optim.ema_decay is not None:
                ema = optax.incremental_update(wide, ema, 1 - optim.ema_decay)
            return cast_like((wide, moments, ema), before, rounding_key(state.step))

        before = (params, state.opt_state, state.ema)
        after_params, opt_state, ema = update_if(finite, update, before)
        metrics = {"loss": loss, "grad_norm": norm, "finite": finite}
        metrics |= learning_rates(optimizer, params, state.updates)
        if objective.action_ids is not None:
            metrics["action_accuracy"] = (means.action_correct, counts.action_correct)
        # A loss that the run does not have is left out: 0 would read as a perfect one.
        for name, measured in (("cross_entropy", batch.labels.shape[-1] > 0), ("flow", objective.use_flow)):
            if measured:
                metrics[f"{name}_loss"] = getattr(means, name)
                for i, dataset in enumerate(objective.datasets):
                    sum_and_count = (getattr(dataset_sums, name)[i], getattr(dataset_counts, name)[i])
                    metrics[f"{name}_loss/{dataset}"] = sum_and_count
        new_state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            params=tree.merge(after_params, frozen),
            opt_state=opt_state,
            ema=ema,
            gradients=None if state.gradients is None else grads,
        )
        return new_state, metrics

    return train_step


def learning_rates(optimizer: Optimizer, trained: tree.Tree, updates: jax.Array) -> dict[str, jax.Array]:
    """Return the rates of an update: "learning_rate" of the first group, "learning_rate/GROUP" of each other one.

    The first is "vlm", unless all of its parameters are frozen or have rules.

    Args:
        optimizer: the run's optimizer.
        trained: the trainable parameters.
        updates: int32 [], updates before this one.
    """
    groups = optimizer.groups(trained)
    return {
        "learning_rate" if group == groups[0] else f"learning_rate/{group}": optimizer.schedules[group](updates)
        for group in groups
    }


def compile_train_step(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]], state: TrainState, batch: Batch
) -> jax.stages.Compiled:
    """Compile the train step for the shapes and shardings of `state` and `batch`; it donates the state it is given.

    Args:
        train_step: see `make_train_step`.
        state: training state with arrays or jax.ShapeDtypeStruct as leaves.
        batch: batch [N, B] with arrays or jax.ShapeDtypeStruct as leaves.
    """
    out = (jax.tree.map(lambda x: x.sharding, state), None)
    # keep_unused: only the memory of the last gradients is used.
    return jax.jit(train_step, donate_argnums=0, keep_unused=True, out_shardings=out).lower(state, batch).compile()


def make_eval_step(
    model: WallXConfig, objective: Objective, seed: int
) -> Callable[[tree.Tree, EvalBatch], tuple[LossTotals, LossTotals]]:
    """Create the eval step, which measures the losses of a batch of held-out frames.

    Args:
        model: model config.
        objective: losses and metrics to compute.
        seed: seed of noise and time.

    Returns:
        eval_step(params, batch [B]) -> (sums, counts) over the samples with `counted`: scalars, or [datasets] if
        `objective.datasets` is not empty. A frame's contribution depends only on the frame, not on its batch.
    """

    @jax_flags.ours()
    def eval_step(params: tree.Tree, held_out: EvalBatch) -> tuple[LossTotals, LossTotals]:
        batch = held_out.batch
        noise, time = frame_noise_and_time(held_out, model, seed)
        sums = batch_sums(params, batch, noise, time, model, objective, per_sample=True)
        counts = loss_counts(batch, model, objective, per_sample=True)
        sums, counts = jax.tree.map(lambda x: jnp.where(held_out.counted, x, 0), (sums, counts))
        if objective.datasets:
            return by_dataset(sums, batch, objective), by_dataset(counts, batch, objective)
        return jax.tree.map(jnp.sum, sums), jax.tree.map(jnp.sum, counts)

    return eval_step


def frame_noise_and_time(held_out: EvalBatch, model: WallXConfig, seed: int) -> tuple[jax.Array, jax.Array]:
    """Sample noise [B, A, C] and times [B] of held-out frames, depending only on seed, dataset and frame number."""
    batch = held_out.batch
    dataset = jnp.zeros_like(held_out.frame) if batch.dataset is None else batch.dataset

    def of_frame(dataset: jax.Array, frame: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), dataset), frame)
        noise, time = flow.sample_noise_and_time(key, (1, *batch.actions.shape[1:]), model.action)
        return noise[0], time[0]

    return jax.vmap(of_frame)(dataset, held_out.frame)


def _noise_and_time(key: jax.Array, batch: Batch, model: WallXConfig) -> tuple[jax.Array, jax.Array]:
    """Sample noise with the shape of batch.actions [..., A, C], and times [...]."""
    shape = batch.actions.shape
    noise, time = flow.sample_noise_and_time(key, (math.prod(shape[:-2]), *shape[-2:]), model.action)
    return noise.reshape(shape), time.reshape(shape[:-2])


def _accumulate(loss_and_grads: Callable[..., Any], params: tree.Tree, micro_batches: Any) -> Any:
    """Sum losses and gradients over the leading axis of `micro_batches`, in float32."""

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, loss_and_grads(params, *micro)), None

    shapes = jax.eval_shape(loss_and_grads, params, *jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    (totals, grads), _ = jax.lax.scan(add, zeros, micro_batches)
    return totals, grads
