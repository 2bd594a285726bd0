"""Sums behind the losses; the caller divides by counts, so that accumulation over micro-batches is exact.

Legend: B batch, W labels, V vocabulary, A horizon, C channels.
"""

import jax
import jax.numpy as jnp

IGNORE = -100  # label of a position without a target


def cross_entropy_sum(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Summed negative log-likelihood of labels [B, W] (IGNORE: none) under logits [B, W, V]; computed in float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(labels == IGNORE, 0.0, jax.nn.logsumexp(logits, axis=-1) - chosen))


def label_count(labels: jax.Array) -> jax.Array:
    """How many positions of labels [B, W] have a target; float32."""
    return jnp.sum(labels != IGNORE).astype(jnp.float32)


def flow_error_sum(velocity: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Summed squared velocity error over the channels in mask, all [B, A, C] float32."""
    return jnp.sum(jnp.square(velocity - target) * mask)


def flow_count(mask: jax.Array, reduction: str) -> jax.Array:
    """What the sum is divided by: "all" channels of mask [B, A, C], as upstream, or the "valid" ones."""
    return jnp.float32(mask.size) if reduction == "all" else jnp.sum(mask)
