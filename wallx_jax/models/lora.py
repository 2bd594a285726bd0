"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + (x A) B alpha / rank, with W as it was and A, B trained.

A starts uniform in +-1/sqrt(D) and B at zero, as the peft library starts them, so that a fresh adapter changes nothing.

Legend: D width in, O width out, R rank; stacked layers have a leading axis.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from wallx_jax.models.config import LoraConfig
from wallx_jax.models.layers import Linear
from wallx_jax.utils import tree

LEAVES = ("lora_a", "lora_b")


def attach(net: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives the linear layers that `config` adapts their A [..., D, R] and B [..., R, O]."""
    for keys, module in list(nnx.iter_modules(net)):
        path = "/".join(str(key) for key in keys if not isinstance(key, int))
        if isinstance(module, Linear) and config.adapts(path):
            *stack, d_in, d_out = module.kernel.shape
            a = jax.random.uniform(rngs.params(), (*stack, d_in, config.rank), minval=-1, maxval=1) * d_in**-0.5
            module.lora_a, module.lora_b = nnx.Param(a), nnx.Param(jnp.zeros((*stack, config.rank, d_out)))
            module.lora_scale = config.scale


def is_adapter(path: str) -> bool:
    """Whether a parameter path is an adapter's."""
    return path.endswith(LEAVES)


def adapter_paths(path: str) -> tuple[str, str] | None:
    """Where the adapter of a kernel is, if it has one: the paths of A and B."""
    module, _, leaf = path.rpartition("/")
    return (f"{module}/lora_a", f"{module}/lora_b") if leaf == "kernel" else None


def merge_params(params: tree.Tree, config: LoraConfig) -> tree.Tree:
    """Parameters without adapters that compute the same; for stacked layers on devices, one layer at a time."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path in merged:
        if (pair := adapter_paths(path)) and pair[0] in flat:
            adapter = (flat[path], flat[pair[0]], flat[pair[1]])
            merge_stack = functools.partial(jax.lax.map, lambda layer: merge(*layer, config.scale))
            merged[path] = jax.jit(merge_stack)(adapter) if adapter[0].ndim == 3 else merge(*adapter, config.scale)
    return tree.unflatten(merged)


def rescale(params: tree.Tree, stored: LoraConfig, wanted: LoraConfig) -> tree.Tree:
    """Parameters with the adapters of `stored` that compute the same with the scale of `wanted`, another alpha: B takes
    up the difference."""
    if not wanted.rank or stored.scale == wanted.scale:
        return params
    factor = stored.scale / wanted.scale

    def leaf(path: str, x: jax.Array) -> jax.Array:
        return (x.astype("float32") * factor).astype(x.dtype) if path.endswith("/lora_b") else x

    return tree.map_with_path(leaf, params)


def merge(kernel, a, b, scale: float):
    """The kernel [..., D, O] that computes what kernel and adapter do together (NumPy or JAX), in its dtype."""
    added = (a.astype("float32") @ b.astype("float32")) * scale
    return (kernel.astype("float32") + added).astype(kernel.dtype)
