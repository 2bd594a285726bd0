"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + (x A) B alpha / rank, with W frozen and A, B trained.

A is initialised uniformly in +-1/sqrt(D) and B with zeros, as in the peft library, so that a new adapter does not
change the output.

Legend: D input width, O output width, R rank; stacked layers have a leading axis.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wallx_jax.models.config import LoraConfig
from wallx_jax.models.layers import Linear
from wallx_jax.utils import tree

LEAVES = ("lora_a", "lora_b")


def attach(net: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Add A [..., D, R] and B [..., R, O] in place to the linear layers of `net` that `config` adapts."""
    for keys, module in list(nnx.iter_modules(net)):
        path = "/".join(str(key) for key in keys if not isinstance(key, int))
        if isinstance(module, Linear) and config.adapts(path):
            *stack, d_in, d_out = module.kernel.shape
            a = jax.random.uniform(rngs.params(), (*stack, d_in, config.rank), minval=-1, maxval=1) * d_in**-0.5
            module.lora_a, module.lora_b = nnx.Param(a), nnx.Param(jnp.zeros((*stack, config.rank, d_out)))
            module.lora_scale = config.scale


def is_adapter(path: str) -> bool:
    """Return whether a parameter path belongs to an adapter."""
    return path.endswith(LEAVES)


def adapter_paths(path: str) -> tuple[str, str] | None:
    """Return the paths of A and B of a kernel's adapter, whether or not it has one; None if `path` is not a kernel."""
    module, _, leaf = path.rpartition("/")
    return (f"{module}/lora_a", f"{module}/lora_b") if leaf == "kernel" else None


def merge_params(params: tree.Tree, config: LoraConfig) -> tree.Tree:
    """Merge the adapters into their kernels and return parameters without adapters that compute the same.

    Stacked kernels are merged on the device, one layer at a time.
    """
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path in merged:
        if (pair := adapter_paths(path)) and pair[0] in flat:
            adapter = (flat[path], flat[pair[0]], flat[pair[1]])
            merge_stack = functools.partial(
                jax.lax.map, lambda layer: merge(layer[0], layer[1], layer[2], config.scale)
            )
            merged[path] = jax.jit(merge_stack)(adapter) if adapter[0].ndim == 3 else merge(*adapter, config.scale)
    return tree.unflatten(merged)


def rescale(params: tree.Tree, stored: LoraConfig, wanted: LoraConfig) -> tree.Tree:
    """Rescale B in `params` so that adapters trained with `stored` compute the same with the alpha of `wanted`."""
    if not wanted.rank or stored.scale == wanted.scale:
        return params
    factor = stored.scale / wanted.scale

    def leaf(path: str, x: jax.Array) -> jax.Array:
        return (x.astype("float32") * factor).astype(x.dtype) if path.endswith("/lora_b") else x

    return tree.map_with_path(leaf, params)


def merge(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """Return kernel + A B scale, [..., D, O], computed in float32 and returned in the kernel's dtype (NumPy or JAX)."""
    added = (a.astype("float32") @ b.astype("float32")) * scale
    return (kernel.astype("float32") + added).astype(kernel.dtype)
