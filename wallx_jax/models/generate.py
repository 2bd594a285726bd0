"""Generate text autoregressively from a prefix, in one compiled loop over a KV cache of fixed size.

Legend: B batch, T prefix tokens, N new tokens, L layers, S = T + N cache length, K key heads, H head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wallx_jax.models.decoder import AllKV, KVCache
from wallx_jax.models.positions import continue_positions
from wallx_jax.models.wallx import Prefix, WallX

NOT_FINITE = -1
"""Stands for a token where logits are not finite, and ends its row."""


class _State(NamedTuple):
    """Loop state.

    Attributes:
        step: number of tokens generated.
        tokens: int32 [B, N], generated so far.
        kv: cache of length S.
        logits: [B, V] of the next token.
        done: bool [B], True once a row has ended.
        keys: PRNG keys [B]; None for greedy decoding.
    """

    step: jax.Array
    tokens: jax.Array
    kv: AllKV
    logits: jax.Array
    done: jax.Array
    keys: jax.Array | None


def generate(
    net: WallX,
    prefix: Prefix,
    max_new_tokens: int,
    *,
    end_tokens: Sequence[int] = (),
    fill_token: int = 0,
    temperature: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Generate tokens that continue each row of the prefix.

    Args:
        net: the model.
        prefix: embedded prompt, left padded.
        max_new_tokens: N; the loop stops earlier once every row has generated one of `end_tokens`.
        end_tokens: token ids that end a row; empty: never stop.
        fill_token: id that follows the end token of a row.
        temperature: None decodes greedily; otherwise tokens are sampled from softmax(logits / temperature).
        keys: PRNG keys [B] for sampling, one per row, so that a row's sample does not depend on the rest of the batch.

    Returns:
        int32 [B, N]; NOT_FINITE where the logits are not finite, which also ends the row.
    """
    batch, length = prefix.mask.shape
    cache_length = length + max_new_tokens
    cache, hidden = net.encode_prefix(prefix, cache_length)
    prefix_mask = jnp.pad(prefix.mask, ((0, 0), (0, max_new_tokens)))
    indices = jnp.arange(cache_length)

    def next_token(logits: jax.Array, sample_keys: jax.Array | None) -> jax.Array:
        logits = logits.astype(jnp.float32)
        if temperature is None or sample_keys is None:
            token = jnp.argmax(logits, axis=-1)
        else:  # subtract the maximum, so that no temperature makes the logits infinite
            scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
            token = jax.vmap(jax.random.categorical)(sample_keys, scaled)
        return jnp.where(jnp.isfinite(logits).all(axis=-1), token, NOT_FINITE).astype(jnp.int32)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def one_token(state: _State) -> _State:
        keys = sample_keys = None
        if state.keys is not None:
            keys, sample_keys = jnp.moveaxis(jax.vmap(jax.random.split)(state.keys), 1, 0)
        token = jnp.where(state.done, fill_token, next_token(state.logits, sample_keys))
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        done = state.done | jnp.isin(token, jnp.array([*end_tokens, NOT_FINITE], jnp.int32))

        index = length + state.step
        out = net.decoder(
            net.embed_tokens(token[:, None]),
            continue_positions(index, 1, cache.rope_delta),
            (prefix_mask | ((indices >= length) & (indices <= index)))[:, None],
            cache=KVCache(state.kv, index),
        )
        return _State(state.step + 1, tokens, out.cached(), net.logits(out.hidden[:, 0]), done, keys)

    start = _State(
        jnp.int32(0),
        jnp.full((batch, max_new_tokens), fill_token, jnp.int32),
        cache.kv,
        net.logits(hidden[:, -1]),
        jnp.zeros(batch, bool),
        None if temperature is None else keys,
    )
    return jax.lax.while_loop(unfinished, one_token, start).tokens


def truncate_at_eos(tokens: np.ndarray, end_tokens: Sequence[int]) -> np.ndarray | None:
    """Return the tokens before the first end token in a row [N] of `generate`; None if the row has no end token."""
    ends = np.flatnonzero(np.isin(tokens, end_tokens))
    return tokens[: ends[0]] if len(ends) else None
