"""Text from a prefix, token by token, in one compiled loop over a key/value cache of fixed size.

Legend: B batch, T prefix tokens, N new tokens, L layers, S = T + N cache places, K key heads, H head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wallx_jax.models.decoder import Cache
from wallx_jax.models.wallx import Prefix, WallX

NOT_FINITE = -1
"""Stands for a token where logits are not finite, and ends its row."""


class _State(NamedTuple):
    """step: how many tokens are out; tokens [B, N] so far; kv: of S places; logits [B, V] for the next one; done [B]:
    the row has said its end token; keys [B]: for drawing, where tokens are drawn."""

    step: jax.Array
    tokens: jax.Array
    kv: Cache
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
    """int32 [B, N] tokens that continue each row of the prefix; NOT_FINITE where the model has no answer.

    Args:
        max_new_tokens: N; the loop ends earlier when every row has said one of `end_tokens`.
        end_tokens: none: never stop.
        fill_token: stands behind a row's end token.
        temperature: None takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        keys: for drawing, [B]: what a row draws does not depend on those beside it.
    """
    batch, length = prefix.mask.shape
    cache, hidden = net.encode_prefix(prefix, room=max_new_tokens)
    seen = jnp.pad(prefix.mask, ((0, 0), (0, max_new_tokens)))
    places = jnp.arange(length + max_new_tokens)

    def pick(logits: jax.Array, draws: jax.Array | None) -> jax.Array:
        logits = logits.astype(jnp.float32)
        if temperature is None:
            token = jnp.argmax(logits, axis=-1)
        else:  # the largest taken off, so that no temperature makes them infinite
            likely = (logits - logits.max(axis=-1, keepdims=True)) / temperature
            token = jax.vmap(jax.random.categorical)(draws, likely)
        return jnp.where(jnp.isfinite(logits).all(axis=-1), token, NOT_FINITE).astype(jnp.int32)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def one_token(state: _State) -> _State:
        keys = draws = None
        if temperature is not None:
            keys, draws = jnp.moveaxis(jax.vmap(jax.random.split)(state.keys), 1, 0)
        token = jnp.where(state.done, fill_token, pick(state.logits, draws))
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        done = state.done | jnp.isin(token, jnp.array([*end_tokens, NOT_FINITE], jnp.int32))

        place = length + state.step
        ids = (cache.next_position + state.step)[None, :, None]
        out = net.decoder(
            net.embed_tokens(token[:, None]),
            jnp.broadcast_to(ids, (3, batch, 1)),
            (seen | ((places >= length) & (places <= place)))[:, None],
            cache=state.kv,
            start=place,
            keep_kv=True,
        )
        return _State(state.step + 1, tokens, out.kv, net.logits(out.hidden[:, 0]), done, keys)

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
    """What stands before the first end token in a row [N] of `generate`; None when the row has no end."""
    ends = np.flatnonzero(np.isin(tokens, end_tokens))
    return tokens[: ends[0]] if len(ends) else None
