"""One optimizer update and one evaluation batch, as pure functions to be jitted.

Legend: N micro-batches, B batch, A horizon, C channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from wallx_jax import tree
from wallx_jax.data.batch import Batch
from wallx_jax.models import flow, losses
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.wallx import FlowTarget, LossSums, bind
from wallx_jax.run_config import OptimConfig
from wallx_jax.training.optimizer import clip, global_norm, is_trainable, make_optimizer, schedule
from wallx_jax.training.rounding import narrow, widen
from wallx_jax.training.state import TrainState


@dataclass(frozen=True)
class Objective:
    """use_flow: train the action tokens by flow matching (False in FAST mode, where actions are text)."""

    use_flow: bool = True
    flow_loss_weight: float = 1.0


def loss_counts(batch: Batch, model: WallXConfig, objective: Objective) -> LossSums:
    """Denominators of the two losses over a whole global batch (any leading axes)."""
    flow_count = (
        losses.flow_count(batch.action_mask, model.numerics.flow_loss) if objective.use_flow else jnp.float32(1)
    )
    return LossSums(jnp.maximum(losses.label_count(batch.labels), 1), jnp.maximum(flow_count, 1))


def batch_sums(
    params: tree.Tree, batch: Batch, noise: jax.Array, time: jax.Array, model: WallXConfig, objective: Objective
) -> LossSums:
    """Loss numerators of one batch."""
    net = bind(model, params)
    target = FlowTarget(batch.actions, batch.action_mask, noise, time) if objective.use_flow else None
    return net.loss_sums(net.embed_batch(batch), batch.labels, target)


def make_train_step(
    model: WallXConfig, optim: OptimConfig, decay_steps: int, objective: Objective, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """train_step(state, batch) -> (state, metrics), for batches with leading axes [N, B].

    The N micro-batches run one after another; sums are divided by the counts of all of them, so the update equals that
    of one batch of N x B. Noise, time and rounding come from (seed, step) alone. The update itself is float32, whatever
    parameters and moments are kept in. An update whose loss or gradient norm is not
    finite leaves parameters and optimizer as they were, and is counted.
    """
    optimizer = make_optimizer(optim, decay_steps)
    trainable = is_trainable(optim)
    rate = schedule(optim.learning_rate, optim, decay_steps)

    def rounding_key(step: jax.Array) -> jax.Array | None:
        return jax.random.fold_in(jax.random.key(seed + 1), step) if optim.stochastic_rounding else None

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        params, frozen = tree.split(state.params, trainable)
        counts = loss_counts(batch, model, objective)
        noise, time = _noise_and_time(jax.random.fold_in(jax.random.key(seed), state.step), batch, model)

        def micro_loss(params, micro: Batch, noise, time) -> tuple[jax.Array, LossSums]:
            sums = batch_sums(tree.merge(params, frozen), micro, noise, time, model, objective)
            parts = LossSums(sums.cross_entropy / counts.cross_entropy, sums.flow / counts.flow)
            return parts.cross_entropy + objective.flow_loss_weight * parts.flow, parts

        loss_and_grads = jax.value_and_grad(micro_loss, has_aux=True)
        micro_batches = (batch, noise, time)
        if noise.shape[0] == 1:
            (loss, parts), grads = loss_and_grads(params, *jax.tree.map(lambda x: x[0], micro_batches))
        else:
            (loss, parts), grads = _accumulate(loss_and_grads, params, micro_batches)

        norm = global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        before = (params, state.opt_state, state.ema)
        wide, moments, ema = widen(before)
        updates, moments = optimizer.update(clip(widen(grads), norm, optim.max_grad_norm), moments, wide)
        wide = optax.apply_updates(wide, updates)
        if optim.ema_decay is not None:
            ema = optax.incremental_update(wide, ema, 1 - optim.ema_decay)
        after = narrow((wide, moments, ema), before, rounding_key(state.step))
        params, opt_state, ema = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        metrics = {
            "loss": loss,
            "cross_entropy_loss": parts.cross_entropy,
            "flow_loss": parts.flow,
            "grad_norm": norm,
            "learning_rate": rate(state.step - state.skipped),
            "finite": finite,
        }
        new_state = TrainState(state.step + 1, state.skipped + ~finite, tree.merge(params, frozen), opt_state, ema)
        return new_state, metrics

    return train_step


def make_eval_step(
    model: WallXConfig, objective: Objective, seed: int
) -> Callable[[tree.Tree, Batch, jax.Array], tuple[LossSums, LossSums]]:
    """eval_step(params, batch [B], index) -> (sums, counts). Batch `index` always meets the same noise and times."""

    def eval_step(params: tree.Tree, batch: Batch, index: jax.Array) -> tuple[LossSums, LossSums]:
        noise, time = _noise_and_time(jax.random.fold_in(jax.random.key(seed), index), batch, model)
        return batch_sums(params, batch, noise, time, model, objective), loss_counts(batch, model, objective)

    return eval_step


def _noise_and_time(key: jax.Array, batch: Batch, model: WallXConfig) -> tuple[jax.Array, jax.Array]:
    """Noise like batch.actions [..., A, C] and times [...]."""
    shape = batch.actions.shape
    noise, time = flow.sample_noise_and_time(key, (math.prod(shape[:-2]), *shape[-2:]), model.action)
    return noise.reshape(shape), time.reshape(shape[:-2])


def _accumulate(loss_and_grads, params, micro_batches):
    """Sums losses and float32 gradients over the leading axis of `micro_batches`."""

    def add(total, micro):
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, loss_and_grads(params, *micro)), None

    shapes = jax.eval_shape(loss_and_grads, params, *jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    (totals, grads), _ = jax.lax.scan(add, zeros, micro_batches)
    return totals, grads
