"""Run a stack of layers, scanned over stacked parameters or unrolled over a list of layers.

A scan compiles one layer whatever the depth, but each iteration copies the layer's weights out of the stack and, in
training, its gradients back into one. Inference uses every weight for only a few tokens, so that copy costs as much
as the arithmetic; with `unstack_layers` the program is unrolled, reads each layer's weights in place, and XLA removes
unused results, such as the last layer's output when only keys and values are needed. Training scans unless
`scan_layers` is False. Checkpoints always contain stacked parameters.

Legend: L layers.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wallx_jax.utils import jax_flags, tree

STACKS = ("decoder/layers", "vision/blocks")  # parameters whose leading axis is the layer


def build(make: Callable[[nnx.Rngs], nnx.Module], count: int, stacked: bool, rngs: nnx.Rngs) -> nnx.Module:
    """Build `count` layers with `make`: one module with stacked parameters, or an nnx.List of modules."""
    if stacked:
        return nnx.vmap(make)(rngs.split(count))
    return nnx.List([make(rngs) for _ in range(count)])


def is_stacked(layers: nnx.Module) -> bool:
    """Return whether `layers`, from `build`, have stacked parameters."""
    return not isinstance(layers, nnx.List)


def run(
    body: Callable[[Any, tuple[Any, Any]], tuple[Any, Any]], x: Any, layers: Any, remat: str, extra: Any
) -> tuple[Any, Any]:
    """Apply `body` to all layers in order.

    Args:
        body: body(x, (layer, its entry of `extra`)) -> (x, output).
        x: input of the first layer.
        layers: from `build`.
        remat: rematerialisation policy, see `Numerics`.
        extra: input per layer: with a leading axis L if layers are stacked, a list of length L if unrolled.

    Returns:
        x after the last layer, and the outputs, in the layout of `extra`.
    """
    if is_stacked(layers):
        return jax.lax.scan(rematted(body, remat, in_scan=True), x, (layers, extra))
    outputs = []
    for layer, part in zip(layers, extra, strict=True):
        one = rematted(lambda x, layer, part=part: body(x, (layer, part)), remat, in_scan=False)
        x, output = one(x, layer)
        outputs.append(output)
    return x, outputs


@jax_flags.ours()
def unstack_layers(params: tree.Tree, free: bool = False) -> tree.Tree:
    """Split stacked layers into one subtree per layer, on the default device.

    "decoder/layers/q/kernel" [L, ...] becomes "decoder/layers/0/q/kernel" and so on. Layers that are already unrolled
    are only moved to the device.

    Args:
        params: nested dict of parameters.
        free: delete each device array as soon as it is split; `params` cannot be used afterwards.
    """
    unrolled = {}
    for path, leaf in tree.flatten(params).items():
        stack = next((name for name in STACKS if path.startswith(f"{name}/")), None)
        inside = path.removeprefix(f"{stack}/")
        if stack is None or inside.split("/")[0].isdigit():
            unrolled[path] = jax.device_put(leaf)
            continue
        for layer in range(len(leaf)):
            unrolled[f"{stack}/{layer}/{inside}"] = jax.device_put(leaf[layer])
        if free and isinstance(leaf, jax.Array):
            jax.block_until_ready(unrolled[f"{stack}/{len(leaf) - 1}/{inside}"])
            leaf.delete()
    return tree.unflatten(unrolled)


def is_unrolled(params: tree.Tree) -> bool:
    """Return whether the layers in `params` are unrolled, as `unstack_layers` returns them."""
    return "0" in params["decoder"]["layers"]


def stacked_path(path: str) -> str:
    """Return a parameter's path in the stacked layout: "decoder/layers/3/q/kernel" -> "decoder/layers/q/kernel"."""
    return _LAYER.sub(r"\1", path)


_LAYER = re.compile(rf"\b({'|'.join(STACKS)})/(\d+)(?=/)")


def restack_like(state: Any, like: Any) -> Any:
    """Stack or unstack the layers in `state`, a pytree of parameters such as a training state, to match `like`."""
    have = tree.leaves_by_path(state)
    layers: dict[str, dict[int, Any]] = {}
    for path, leaf in have.items():
        if match := _LAYER.search(path):
            layers.setdefault(stacked_path(path), {})[int(match[2])] = leaf

    def wanted(path: str) -> Any:
        if path in have:
            return have[path]
        if path in layers:
            return jnp.stack([layers[path][layer] for layer in range(len(layers[path]))])
        if match := _LAYER.search(path):
            return have[stacked_path(path)][int(match[2])]
        raise KeyError(path)

    return jax.tree.unflatten(jax.tree.structure(like), map(wanted, tree.leaves_by_path(like)))


def rematted(body: Callable, remat: str, in_scan: bool) -> Callable:
    """Wrap `body` in the rematerialisation policy "full", "dots" or "none" (see `Numerics`)."""
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # The body of a scan is compiled once and cannot be merged with its recomputation, so it needs no barrier.
    return jax.checkpoint(body, policy=policy, prevent_cse=not in_scan)
