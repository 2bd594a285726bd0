"""Layers one after another: stacked and scanned for training, apart and unrolled for acting.

A scan compiles one layer whatever the depth, which is what training wants. But each of its iterations first copies the
layer's weights out of the stack. Acting touches every weight for a few tokens only, so the copy costs as much as the
arithmetic; with `unstack`ed parameters the layers are written out in the program and read their weights where they
are. What nobody asks for, as the last layer's output when only keys and values are wanted, is then left out.

Legend: L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from wallx_jax import tree

STACKS = ("decoder/layers", "vision/blocks")  # parameters whose leading axis is the layer


def build(make: Callable[[nnx.Rngs], nnx.Module], count: int, stacked: bool, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers: one module with stacked parameters, or a list of modules."""
    if stacked:
        return nnx.vmap(make)(rngs.split(count))
    return nnx.List([make(rngs) for _ in range(count)])


def is_stacked(layers: nnx.Module) -> bool:
    return not isinstance(layers, nnx.List)


def run(body: Callable[[Any, tuple[Any, Any]], tuple[Any, Any]], x: Any, layers: nnx.Module, extra: Any = None):
    """body(x, (layer, its part of `extra`)) -> (x, output), over all layers.

    Stacked: `extra` and the outputs have a leading axis L. Apart: both are lists of length L (`extra` may be None).
    """
    if is_stacked(layers):
        return jax.lax.scan(body, x, (layers, extra))
    outputs = []
    for layer, part in zip(layers, extra or [None] * len(layers), strict=True):
        x, output = body(x, (layer, part))
        outputs.append(output)
    return x, outputs


def unstack(params: tree.Tree, free: bool = False) -> tree.Tree:
    """Parameters with the layers apart, on the default device: "decoder/layers/q/kernel" [L, ...] becomes
    "decoder/layers/0/q/kernel" and so on. Those that are apart already only move.

    Args:
        free: gives the memory of each device array back as soon as it is taken apart; `params` cannot be used again.
    """
    apart = {}
    for path, leaf in tree.flatten(params).items():
        stack = next((name for name in STACKS if path.startswith(f"{name}/")), None)
        inside = path.removeprefix(f"{stack}/")
        if stack is None or inside.split("/")[0].isdigit():
            apart[path] = jax.device_put(leaf)
            continue
        for layer in range(len(leaf)):
            apart[f"{stack}/{layer}/{inside}"] = jax.device_put(leaf[layer])
        if free and isinstance(leaf, jax.Array):
            jax.block_until_ready(apart[f"{stack}/{len(leaf) - 1}/{inside}"])
            leaf.delete()
    return tree.unflatten(apart)


def is_apart(params: tree.Tree) -> bool:
    """Whether parameters are those that `unstack` gives."""
    return "0" in params["decoder"]["layers"]
