"""Linear layers, norms and attention that are faster on a CPU than what XLA makes of the plain formulae.

The plain formulae are in models.layers and models.attention; these compute the same up to rounding. A model is built
of the plain ones, and `use_kernels` switches it as `Numerics.kernels` says. docs/performance.md compares their speed.

Legend: B batch, T query tokens, S key tokens, N query heads, K key heads, H head dim, D input width, O output width,
R rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wallx_jax.models.config import Dtype, Kernels, Numerics
from wallx_jax.models.layers import Linear, RMSNorm

MASK_VALUE = -1e30  # added to the score of a masked key


def resolve_kernels(numerics: Numerics, platform: str) -> Kernels:
    """Return the kernels to use on "cpu", "gpu" or "tpu", which are never "auto".

    Raises:
        ValueError: they are "cudnn", which cannot run on the platform or in the compute dtype.
    """
    if numerics.kernels == Kernels.AUTO:
        return Kernels.CPU if platform == "cpu" else Kernels.XLA
    if numerics.kernels == Kernels.CUDNN and platform != "gpu":
        raise ValueError(
            f"numerics.kernels is 'cudnn', which needs an NVIDIA GPU, but JAX uses the {platform.upper()}; set 'auto'"
        )
    if numerics.kernels == Kernels.CUDNN and numerics.compute_dtype != Dtype.BFLOAT16:
        raise ValueError(
            f"numerics.kernels is 'cudnn', which needs bfloat16, but numerics.compute_dtype is "
            f"{numerics.compute_dtype!r}; set one of the two"
        )
    return numerics.kernels


def use_kernels(net: nnx.Module, kernels: Kernels) -> None:
    """Switch the modules of `net` in place to the given kernels, which must not be "auto"."""
    for _, module in nnx.iter_modules(net):
        if hasattr(module, "kernels"):  # attention and decoder
            module.kernels = kernels
        if kernels == Kernels.CPU and type(module) in _CPU_CLASSES:
            module.__class__ = _CPU_CLASSES[type(module)]


class CpuLinear(Linear):
    """Linear layer with custom gradients."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel[...].astype(x.dtype))
        if self.lora_a is not None:
            y = y + self.adapter(x)
        return y if self.bias is None else add_bias(y, self.bias[...].astype(x.dtype))


class CpuRMSNorm(RMSNorm):
    """Root mean square norm with a custom gradient."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x.astype(jnp.float32), self.scale[...].astype(jnp.float32), self.eps).astype(x.dtype)


_CPU_CLASSES: dict[type, Any] = {Linear: CpuLinear, RMSNorm: CpuRMSNorm}


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x [..., D] @ kernel [D, O] -> [..., O].

    The gradients are two plain matrix products. JAX's own rule computes the kernel's gradient transposed and then
    transposes it back, for which XLA on a CPU copies `dy`: a tenth of the time of a training step.
    """
    return x @ kernel


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return dy @ kernel.T, _rows(x).T @ _rows(dy)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x [..., O] + bias [O].

    The bias' gradient is a product with a row of ones: XLA's sum over rows takes four times as long on a CPU.
    """
    return x + bias


def _add_bias_backward(_: None, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    dy_rows = _rows(dy)
    return dy, jnp.ones(len(dy_rows), dy.dtype) @ dy_rows


add_bias.defvjp(lambda x, bias: (x + bias, None), _add_bias_backward)


@jax.custom_vjp
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Return x / sqrt(mean(x^2) + eps) * scale; x [..., D] and scale [D], float32.

    The sums of its gradient are products, as in `add_bias`.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(
    x: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * inverse * scale, (x, scale, inverse)


def _rms_norm_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    # d inverse / dx = -inverse^3 x / D. Both sums, over rows and within each row, share the array dy * x.
    x, scale, inverse = saved
    product = _rows(dy * x)
    along = (scale @ product.T).reshape(inverse.shape)
    dx = inverse * (dy * scale) - x * (inverse**3 * along / x.shape[-1])
    return dx, inverse.reshape(-1) @ product, None


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def materialize(x: Any) -> Any:
    """Return the pytree x, computed once: XLA would recompute rotary tables for every head of every layer."""
    return jax.lax.optimization_barrier(x)


def _rows(x: jax.Array) -> jax.Array:
    """Flatten the leading axes: [..., D] -> [R, D]."""
    return x.reshape(-1, x.shape[-1])


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Compute grouped-query attention; arguments and result as in `models.attention.dot_product_attention`.

    All queries of a key head form one matrix, and the softmax is normalised after the product with the values: half to
    two thirds of the time of jax.nn.dot_product_attention.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    q = q.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, groups * length, head_dim)
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores += jnp.tile(jnp.where(mask, 0.0, MASK_VALUE), (1, groups, 1))[:, None]
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp((scores - highest) * head_dim**-0.5)
    out = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    out = out.reshape(batch, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads * head_dim)
