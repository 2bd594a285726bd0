"""Linear, RMSNorm and SwiGLU. Activations keep the dtype they come in; parameters are cast to it at use.

Legend: D width in, O width out, F mlp width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

INIT = nnx.initializers.normal(0.02)  # Qwen2.5-VL's initializer_range


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] @ kernel [D, O] -> [..., O].

    Its gradients are two plain matrix products. JAX's own rule works the kernel's gradient out transposed and turns it
    around, for which XLA on a CPU copies `dy`: a tenth of a train step.
    """
    return x @ kernel


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ kernel.T, rows.T @ dy_rows


_product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    """y = x @ kernel + bias; kernel [D, O], bias [O]. `models.lora.attach` may add an adapter."""

    lora_a: nnx.Param | None = None

    def __init__(self, d_in: int, d_out: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(INIT(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _product(x, self.kernel[...].astype(x.dtype))
        if self.lora_a is not None:
            low = x @ self.lora_a[...].astype(x.dtype)
            y = y + (low @ self.lora_b[...].astype(x.dtype)) * self.lora_scale
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, all in float32, returned in x's dtype.

    Multiplying by the scale before the cast is what upstream does since 2026; Qwen's original casts first.
    In float32 the two are the same.
    """

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), D -> F -> D."""

    def __init__(self, width: int, mlp_width: int, *, bias: bool, rngs: nnx.Rngs):
        self.gate = Linear(width, mlp_width, bias=bias, rngs=rngs)
        self.up = Linear(width, mlp_width, bias=bias, rngs=rngs)
        self.down = Linear(mlp_width, width, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
