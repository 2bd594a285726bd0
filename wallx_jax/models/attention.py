"""The one attention function: grouped queries, float32 softmax, boolean masks.

Legend: B batch, T query tokens, S key tokens, N query heads, K key heads, H head dim.
"""

import jax
import jax.numpy as jnp

MASK_VALUE = -1e30  # score of a key that is not to be looked at


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """q [B, T, N, H], k and v [B, K, S, H], mask bool [B, T, S] (True: look) -> [B, T, N*H] in q's dtype.

    Query head n reads key head n // (N/K). A query row with nothing to look at gets a finite, meaningless result.

    The queries of one key head are rows of one matrix, and sums are divided after the second product: on a CPU this
    takes half to two thirds of the time of jax.nn.dot_product_attention.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    q = q.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, groups * length, head_dim)
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores += jnp.tile(jnp.where(mask, 0.0, MASK_VALUE), (1, groups, 1))[:, None]
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp((scores - highest) * head_dim**-0.5)
    out = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    out = out.reshape(batch, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads * head_dim)


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
