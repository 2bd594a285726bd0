"""Numerators and denominators of cross-entropy and token accuracy.

The caller divides sums by counts, so that accumulation over micro-batches is exact. With `per_sample` the functions
reduce to [B] instead of a scalar.

Legend: B batch, W labels, V vocabulary.
"""

import jax
import jax.numpy as jnp

from wallx_jax.models.config import IGNORE


def cross_entropy_sum(logits: jax.Array, labels: jax.Array, per_sample: bool = False) -> jax.Array:
    """Sum the negative log-likelihood of labels [B, W] under logits [B, W, V], in float32, skipping IGNORE labels."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return reduce_sum(jnp.where(labels == IGNORE, 0.0, jax.nn.logsumexp(logits, axis=-1) - chosen), per_sample)


def label_count(labels: jax.Array, per_sample: bool = False) -> jax.Array:
    """Count the labels [B, W] that are not IGNORE; float32."""
    return reduce_sum(labels != IGNORE, per_sample).astype(jnp.float32)


def token_range_mask(labels: jax.Array, ids: tuple[int, int]) -> jax.Array:
    """Return bool [B, W], True where a label is a token id in the range ids[0] .. ids[1] - 1."""
    return (labels >= ids[0]) & (labels < ids[1])


def token_range_count(labels: jax.Array, ids: tuple[int, int], per_sample: bool = False) -> jax.Array:
    """Count the labels [B, W] in the token id range ids[0] .. ids[1] - 1; float32."""
    return reduce_sum(token_range_mask(labels, ids), per_sample).astype(jnp.float32)


def correct_count(logits: jax.Array, labels: jax.Array, ids: tuple[int, int], per_sample: bool = False) -> jax.Array:
    """Count the labels [B, W] in the token id range that equal the argmax of the logits [B, W, V]; float32."""
    correct = token_range_mask(labels, ids) & (jnp.argmax(logits, axis=-1) == labels)
    return reduce_sum(correct, per_sample).astype(jnp.float32)


def reduce_sum(x: jax.Array, per_sample: bool) -> jax.Array:
    """Sum x [B, ...] to a scalar, or over all but the first axis to [B] if `per_sample`."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)) if per_sample else None)
