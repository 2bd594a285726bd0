"""The one attention function: grouped queries, float32 softmax, boolean masks.

Legend: B batch, T query tokens, S key tokens, N query heads, K key heads, H head dim.
"""

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """q [B, T, N, H], k and v [B, S, K, H], mask bool [B, T, S] (True: look) -> [B, T, N*H] in q's dtype.

    Query head n reads key head n // (N/K). A query row with nothing to look at gets a finite, meaningless result.
    """
    out = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None])
    return out.reshape(*q.shape[:2], -1)


def prefix_mask(token_mask: jax.Array) -> jax.Array:
    """Causal mask of the prefix: bool [B, T] -> [B, T, T]; padding is never looked at."""
    length = token_mask.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & token_mask[:, None, :]


def suffix_mask(token_mask: jax.Array, horizon: int, action_attention: str) -> jax.Array:
    """What the A action tokens look at: the whole prefix, and each other; bool [B, T] -> [B, A, T + A]."""
    batch = token_mask.shape[0]
    actions = jnp.ones((horizon, horizon), bool)
    if action_attention == "causal":
        actions = jnp.tril(actions)
    prefix = jnp.broadcast_to(token_mask[:, None, :], (batch, horizon, token_mask.shape[1]))
    return jnp.concatenate([prefix, jnp.broadcast_to(actions, (batch, horizon, horizon))], axis=-1)


def sequence_mask(token_mask: jax.Array, horizon: int, action_attention: str) -> jax.Array:
    """Mask of prefix and action tokens in one pass: bool [B, T] -> [B, T + A, T + A]. The prefix sees no action."""
    prefix = jnp.pad(prefix_mask(token_mask), ((0, 0), (0, 0), (0, horizon)))
    return jnp.concatenate([prefix, suffix_mask(token_mask, horizon, action_attention)], axis=1)
