"""AdamW or Adafactor with learning-rate groups and freezing; the schedule counts optimizer updates.

Upstream's scheduler ticks once per process and per update, so its 100 warm-up "steps" are 100 / processes updates
here; and with groups it divides min_lr by 1e-3 instead of the base rate. Neither is reproduced.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from wallx_jax import tree
from wallx_jax.models.lora import is_adapter
from wallx_jax.models.stack import stacked_path
from wallx_jax.run_config import OptimConfig

ACTION_EXPERT = "decoder/layers/mlp/action/"
ACTION_HEADS = "action/"


def group_of(path: str, config: OptimConfig) -> str:
    """ "vlm", "action_expert" or "frozen" for a parameter path.

    Upstream's `freeze_vlm` freezes the action heads too; `train_action_heads=False` does the same here. With adapters,
    those are trained, and of the rest the action side where it has none.
    """
    path = stacked_path(path)
    module = path.rpartition("/")[0]
    if config.lora.adapts(module) and not is_adapter(path):
        return "frozen"
    if path.startswith(ACTION_EXPERT):
        return "action_expert"
    if is_adapter(path):
        return "frozen" if config.freeze_vlm or config.train_action_expert_only else "vlm"
    if config.freeze_vlm or config.train_action_expert_only or config.lora.rank:
        return "vlm" if path.startswith(ACTION_HEADS) and config.train_action_heads else "frozen"
    return "vlm"


def peak_rate(path: str, config: OptimConfig) -> float:
    """The peak learning rate of a parameter that is trained."""
    for pattern, rate in config.learning_rates:
        if re.search(pattern, stacked_path(path)):
            return rate
    if group_of(path, config) == "action_expert":
        return config.action_expert_learning_rate or config.learning_rate
    return config.learning_rate


def is_trainable(config: OptimConfig) -> Callable[[str], bool]:
    return lambda path: group_of(path, config) != "frozen"


def schedule(peak: float, config: OptimConfig, decay_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then a cosine that ends at update `decay_steps`, at the fraction
    min_lr / learning_rate of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=config.warmup_steps,
        decay_steps=max(decay_steps, config.warmup_steps + 1),
        end_value=peak * config.min_lr / config.learning_rate,
    )


def make_optimizer(config: OptimConfig, decay_steps: int) -> optax.GradientTransformation:
    """Decay on every parameter, as upstream; for the trainable part of the tree. AdamW: (0.9, 0.999, eps 1e-8).
    Adafactor (arXiv 1804.04235) in AdamW's place: factored second moments, no first, updates clipped to RMS 1, and
    learning rate and decay as AdamW's.

    Clipping gradients is not part of it: the step clips once per update with the norm that it logs.
    """

    def at_rate(peak: float) -> optax.GradientTransformation:
        rate = schedule(peak, config, decay_steps)
        if config.optimizer == "adamw":
            return optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=config.weight_decay)
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )

    rates = {config.learning_rate, config.action_expert_learning_rate or config.learning_rate}
    rates |= {rate for _, rate in config.learning_rates}
    return optax.partition(
        {str(rate): at_rate(rate) for rate in sorted(rates)},
        lambda params: tree.map_with_path(lambda path, _: str(peak_rate(path, config)), params),
    )


def global_norm(grads) -> jax.Array:
    """Root of the summed squares of all gradients, summed in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))


def clip(grads, norm: jax.Array, max_norm: float):
    """Scales gradients down to `max_norm` when their norm exceeds it."""
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
