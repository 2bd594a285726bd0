"""Linear, RMSNorm and SwiGLU layers, which compute in the dtype of their input and cast parameters to it at use.

RMSNorm computes in float32 and casts its output back.

Legend: D input width, O output width, F MLP width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

INIT = nnx.initializers.normal(0.02)  # Qwen2.5-VL's initializer_range


class Linear(nnx.Module):
    """Linear layer y = x @ kernel + bias, [..., D] -> [..., O]; kernel [D, O], bias [O].

    `models.lora.attach` may add an adapter: lora_a [D, rank], lora_b [rank, O].
    """

    lora_a: nnx.Param | None = None
    lora_b: nnx.Param
    lora_scale: float

    def __init__(self, d_in: int, d_out: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(INIT(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.lora_a is not None:
            y = y + self.adapter(x)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def adapter(self, x: jax.Array) -> jax.Array:
        """Return the output of the adapter, [..., D] -> [..., O]."""
        assert self.lora_a is not None, "no adapter is attached"
        return (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype) * self.lora_scale


class RMSNorm(nnx.Module):
    """Root mean square norm x / sqrt(mean(x^2) + eps) * scale, computed in float32 and returned in x's dtype.

    x is [..., D], scale [D]. Multiplying by the scale before the cast follows upstream since 2026; Qwen's original
    casts first. In float32 the two are the same.
    """

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """Gated MLP down(silu(gate(x)) * up(x)), [..., D] -> [..., F] -> [..., D]."""

    def __init__(self, width: int, mlp_width: int, *, bias: bool, rngs: nnx.Rngs):
        self.gate = Linear(width, mlp_width, bias=bias, rngs=rngs)
        self.up = Linear(width, mlp_width, bias=bias, rngs=rngs)
        self.down = Linear(mlp_width, width, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
