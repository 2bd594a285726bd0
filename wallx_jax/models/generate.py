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


class _State(NamedTuple):
    """step: how many tokens are out; tokens [B, N] so far; kv: of S places; logits [B, V] for the next one; done [B]:
    the row has said its end token."""

    step: jax.Array
    tokens: jax.Array
    kv: Cache
    logits: jax.Array
    done: jax.Array
    key: jax.Array


def generate(
    net: WallX,
    prefix: Prefix,
    max_new_tokens: int,
    *,
    end_tokens: Sequence[int] = (),
    fill_token: int = 0,
    temperature: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """int32 [B, N] tokens that continue each row of the prefix.

    Args:
        max_new_tokens: N; the loop ends earlier when every row has said one of `end_tokens`.
        end_tokens: none: never stop.
        fill_token: stands behind a row's end token.
        temperature: None takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        key: for drawing.
    """
    batch, length = prefix.mask.shape
    cache, hidden = net.encode_prefix(prefix, room=max_new_tokens)
    seen = jnp.pad(prefix.mask, ((0, 0), (0, max_new_tokens)))
    places = jnp.arange(length + max_new_tokens)

    def pick(logits: jax.Array, key: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        if temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def one_token(state: _State) -> _State:
        key, draw = jax.random.split(state.key)
        token = jnp.where(state.done, fill_token, pick(state.logits, draw))
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        done = state.done | jnp.isin(token, jnp.array(end_tokens, jnp.int32))

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
        return _State(state.step + 1, tokens, out.kv, net.logits(out.hidden[:, 0]), done, key)

    start = _State(
        jnp.int32(0),
        jnp.full((batch, max_new_tokens), fill_token, jnp.int32),
        cache.kv,
        net.logits(hidden[:, -1]),
        jnp.zeros(batch, bool),
        jax.random.key(0) if key is None else key,
    )
    return jax.lax.while_loop(unfinished, one_token, start).tokens


def up_to(tokens: np.ndarray, end_tokens: Sequence[int]) -> np.ndarray | None:
    """What stands before the first end token in a row [N] of `generate`; None when the row has no end."""
    ends = np.flatnonzero(np.isin(tokens, end_tokens))
    return tokens[: ends[0]] if len(ends) else None
