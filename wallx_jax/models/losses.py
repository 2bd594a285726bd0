"""Sums behind the losses; the caller divides by counts, so that accumulation over micro-batches is exact.
`per_sample` keeps the samples apart: [B] instead of a scalar.

Legend: B batch, W labels, V vocabulary, A horizon, C channels.
"""

import jax
import jax.numpy as jnp

IGNORE = -100  # label of a position without a target


def cross_entropy_sum(logits: jax.Array, labels: jax.Array, per_sample: bool = False) -> jax.Array:
    """Summed negative log-likelihood of labels [B, W] (IGNORE: none) under logits [B, W, V]; computed in float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return reduce_sum(jnp.where(labels == IGNORE, 0.0, jax.nn.logsumexp(logits, axis=-1) - chosen), per_sample)


def label_count(labels: jax.Array, per_sample: bool = False) -> jax.Array:
    """How many positions of labels [B, W] have a target; float32."""
    return reduce_sum(labels != IGNORE, per_sample).astype(jnp.float32)


def in_token_range(labels: jax.Array, ids: tuple[int, int]) -> jax.Array:
    """bool [B, W]: which labels are tokens of the range ids[0] .. ids[1] - 1."""
    return (labels >= ids[0]) & (labels < ids[1])


def token_range_count(labels: jax.Array, ids: tuple[int, int], per_sample: bool = False) -> jax.Array:
    """How many labels [B, W] are tokens of a range; float32."""
    return reduce_sum(in_token_range(labels, ids), per_sample).astype(jnp.float32)


def correct_count(logits: jax.Array, labels: jax.Array, ids: tuple[int, int], per_sample: bool = False) -> jax.Array:
    """How many labels [B, W] of a range of tokens the largest logit [B, W, V] names; float32."""
    hits = in_token_range(labels, ids) & (jnp.argmax(logits, axis=-1) == labels)
    return reduce_sum(hits, per_sample).astype(jnp.float32)


def reduce_sum(x: jax.Array, per_sample: bool) -> jax.Array:
    """A scalar, or [B]."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)) if per_sample else None)
