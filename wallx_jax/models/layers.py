"""Linear, RMSNorm and SwiGLU layers, which compute in the dtype of their input and cast parameters to it at use.

RMSNorm computes in float32 and casts its output back.

Legend: D input width, O output width, F MLP width, R rows.
"""

import jax
import jax.numpy as jnp
from flax import nnx

INIT = nnx.initializers.normal(0.02)  # Qwen2.5-VL's initializer_range


def _rows(x: jax.Array) -> jax.Array:
    """Flatten the leading axes: [..., D] -> [R, D]."""
    return x.reshape(-1, x.shape[-1])


def _weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Return the sum over r of weights[r] * x[r]: [R], [R, D] -> [D].

    On a CPU this is a matrix product, since XLA's sum over rows takes four times as long; elsewhere it is a sum, which
    fuses with the producer of `x`.
    """
    return jax.lax.platform_dependent(
        weights, x, cpu=lambda w, x: w @ x, default=lambda w, x: jnp.sum(w[:, None] * x, axis=0)
    )


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x [..., D] @ kernel [D, O] -> [..., O].

    The gradients are two plain matrix products. JAX's own rule computes the kernel's gradient transposed and then
    transposes it back, for which XLA on a CPU copies `dy`: a tenth of the time of a training step.
    """
    return x @ kernel


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    return dy @ kernel.T, _rows(x).T @ _rows(dy)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _shifted(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x [..., O] + bias [O]."""
    return x + bias


def _shifted_backward(_, dy):
    dy_rows = _rows(dy)
    return dy, _weighted_sum(jnp.ones(len(dy_rows), dy.dtype), dy_rows)


_shifted.defvjp(lambda x, bias: (x + bias, None), _shifted_backward)


@jax.custom_vjp
def _normed(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Return x / sqrt(mean(x^2) + eps) * scale; x [..., D] and scale [D], float32."""
    return _normed_forward(x, scale, eps)[0]


def _normed_forward(x, scale, eps):
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * inverse * scale, (x, scale, inverse)


def _normed_backward(saved, dy):
    # d inverse / dx = -inverse^3 x / D. Both sums, over rows and within each row, share the array dy * x.
    x, scale, inverse = saved
    product = _rows(dy * x)
    along = _weighted_sum(scale, product.T).reshape(inverse.shape)
    dx = inverse * (dy * scale) - x * (inverse**3 * along / x.shape[-1])
    return dx, _weighted_sum(inverse.reshape(-1), product), None


_normed.defvjp(_normed_forward, _normed_backward)


class Linear(nnx.Module):
    """Linear layer y = x @ kernel + bias, [..., D] -> [..., O]; kernel [D, O], bias [O].

    `models.lora.attach` may add an adapter: lora_a [D, rank], lora_b [rank, O].
    """

    lora_a: nnx.Param | None = None

    def __init__(self, d_in: int, d_out: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(INIT(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _product(x, self.kernel[...].astype(x.dtype))
        if self.lora_a is not None:
            low = x @ self.lora_a[...].astype(x.dtype)
            y = y + (low @ self.lora_b[...].astype(x.dtype)) * self.lora_scale
        return y if self.bias is None else _shifted(y, self.bias[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    """Root mean square norm x / sqrt(mean(x^2) + eps) * scale, computed in float32 and returned in x's dtype.

    x is [..., D], scale [D]. Multiplying by the scale before the cast follows upstream since 2026; Qwen's original
    casts first. In float32 the two are the same.
    """

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normed(x.astype(jnp.float32), self.scale[...].astype(jnp.float32), self.eps).astype(x.dtype)


class SwiGLU(nnx.Module):
    """Gated MLP down(silu(gate(x)) * up(x)), [..., D] -> [..., F] -> [..., D]."""

    def __init__(self, width: int, mlp_width: int, *, bias: bool, rngs: nnx.Rngs):
        self.gate = Linear(width, mlp_width, bias=bias, rngs=rngs)
        self.up = Linear(width, mlp_width, bias=bias, rngs=rngs)
        self.down = Linear(mlp_width, width, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
