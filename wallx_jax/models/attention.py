"""Grouped-query attention with a float32 softmax, and the boolean masks of Wall-X's sequences.

Legend: B batch, T query tokens, S key tokens, N query heads, K key heads, H head dim.
"""

import jax
import jax.numpy as jnp

from wallx_jax.models import cpu_ops
from wallx_jax.models.config import Kernels


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, kernels: Kernels = Kernels.XLA
) -> jax.Array:
    """Compute grouped-query attention; query head n attends to key head n // (N/K).

    Args:
        q: queries [B, T, N, H].
        k: keys [B, K, S, H].
        v: values [B, K, S, H].
        mask: bool [B, T, S], True where the query may attend to the key; None for no mask.
        kernels: implementation, see `Numerics`; not "auto".

    Returns:
        [B, T, N*H] in the dtype of v. A fully masked query row is the mean of all values.

    Raises:
        ValueError: cuDNN does not support these shapes.
    """
    if kernels == Kernels.CPU:
        return cpu_ops.dot_product_attention(q, k, v, mask)
    batch, length = q.shape[:2]
    if kernels == Kernels.CUDNN and mask is not None:
        q, k, v, mask = _pad_to_even(q, k, v, mask)
    try:
        out = jax.nn.dot_product_attention(
            q,
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
            mask=None if mask is None else mask[:, None],
            implementation="cudnn" if kernels == Kernels.CUDNN else "xla",
        )
    except NotImplementedError as error:
        raise ValueError(f"numerics.kernels is 'cudnn', but cuDNN reports: {error} Set 'xla'") from error
    return out[:, :length].reshape(batch, length, -1)


def _pad_to_even(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
    """Pad T and S with masked tokens to multiples of 2, as the gradient of cuDNN's masked attention requires."""
    queries, keys = (0, q.shape[1] % 2), (0, k.shape[2] % 2)
    q = jnp.pad(q, ((0, 0), queries, (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), keys, (0, 0))) for x in (k, v))
    return q, k, v, jnp.pad(mask, ((0, 0), queries, keys))


def prefix_mask(token_mask: jax.Array) -> jax.Array:
    """Return the causal mask [B, T, T] of a prefix with token mask bool [B, T]; padding is never attended to."""
    length = token_mask.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & token_mask[:, None, :]


def suffix_mask(token_mask: jax.Array, horizon: int, action_attention: str) -> jax.Array:
    """Return the mask of the A action tokens, which attend to the whole prefix and to each other.

    Args:
        token_mask: bool [B, T], False at padding.
        horizon: A.
        action_attention: "causal" or "bidirectional" among the action tokens, see `Numerics`.

    Returns:
        bool [B, A, T + A].
    """
    batch = token_mask.shape[0]
    actions = jnp.ones((horizon, horizon), bool)
    if action_attention == "causal":
        actions = jnp.tril(actions)
    prefix = jnp.broadcast_to(token_mask[:, None, :], (batch, horizon, token_mask.shape[1]))
    return jnp.concatenate([prefix, jnp.broadcast_to(actions, (batch, horizon, horizon))], axis=-1)


def sequence_mask(token_mask: jax.Array, horizon: int, action_attention: str) -> jax.Array:
    """Return the mask [B, T + A, T + A] of prefix and action tokens in one pass; arguments as in `suffix_mask`.

    The prefix does not attend to the action tokens.
    """
    prefix = jnp.pad(prefix_mask(token_mask), ((0, 0), (0, 0), (0, horizon)))
    return jnp.concatenate([prefix, suffix_mask(token_mask, horizon, action_attention)], axis=1)
