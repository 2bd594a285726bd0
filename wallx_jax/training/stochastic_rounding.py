"""Round float32 to bfloat16 stochastically, so that the rounded value is right in expectation.

With rounding to nearest, an update smaller than half a step of the format (1/512 of the value) is lost, no matter how
often it is repeated: late in training that applies to most updates, and a second moment with decay 0.999 never
decreases. With stochastic rounding, updates are preserved in expectation (Zamirai et al., arXiv 2010.06192).
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")
_DROPPED = 16  # low bits of a float32 that bfloat16 drops


def to_float32(tree: T) -> T:
    """Cast bfloat16 leaves to float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def cast_like(tree: T, like: Any, key: jax.Array | None) -> T:
    """Cast leaves to the dtypes of `like`.

    Random bits depend on the key and the index of the leaf; with a partitionable generator they are the same on any
    mesh.

    Args:
        tree: tree to cast.
        like: tree with the same number of leaves, which have the wanted dtypes.
        key: key for stochastic rounding from float32 to bfloat16; None rounds to nearest.
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
    """Round float32 to bfloat16, up with probability (x - lower) / (upper - lower); NaN and infinity are preserved."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # Noise added to the dropped bits carries into the kept bits with the right probability. As this acts on the
    # magnitude, both signs round alike.
    kept = ((bits + noise) >> _DROPPED).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
