"""Which dtype each parameter is kept in."""

import jax.numpy as jnp

from wallx_jax.models.config import Numerics
from wallx_jax.models.lora import is_adapter

ISLANDS = ("decoder/norm/", "decoder/layers/input_norm/", "decoder/layers/post_norm/", "action/")


def param_dtype(path: str, numerics: Numerics) -> jnp.dtype:
    """float32 for decoder norms and action heads when `float32_islands` (lerobot's list), else `param_dtype`. Adapters
    are always float32: small, and all that is trained."""
    if is_adapter(path):
        return jnp.dtype("float32")
    if numerics.float32_islands and path.startswith(ISLANDS):
        return jnp.dtype("float32")
    return jnp.dtype(numerics.param_dtype)
