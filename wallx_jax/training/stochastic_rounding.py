"""Stochastic rounding: what is kept in bfloat16 is rounded up or down so that it is right on average.

To the nearest, an update smaller than half a step of the format (1/512 of the value) is lost, however often it is
repeated: late in training that is most of them, and a second moment with decay 0.999 never falls. At random, updates
arrive in expectation (Zamirai et al., arXiv 2010.06192).
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")
_DROPPED = 16  # bits of a float32 that bfloat16 leaves out


def to_float32(tree: T) -> T:
    """bfloat16 leaves as float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def cast_like(tree: T, like: Any, key: jax.Array | None) -> T:
    """Leaves in the dtypes of `like`; float32 becomes bfloat16 by stochastic rounding, or to the nearest without a key.

    Each leaf draws its own bits from key and place; a generator that is cut over a mesh draws the same on any mesh.
    """
    leaves, structure = jax.tree.flatten(tree)
    dtypes = [x.dtype for x in jax.tree.leaves(like)]
    out = []
    for index, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        if key is not None and leaf.dtype == jnp.float32 and dtype == jnp.bfloat16:
            out.append(stochastic(jax.random.fold_in(key, index), leaf))
        else:
            out.append(leaf.astype(dtype))
    return jax.tree.unflatten(structure, out)


def stochastic(key: jax.Array, x: jax.Array) -> jax.Array:
    """float32 -> bfloat16, up with probability (x - lower) / (upper - lower); NaN and infinity stay what they are."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # Adding noise below the cut carries into the kept bits just as often as it should; magnitudes round alike.
    kept = ((bits + noise) >> _DROPPED).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
