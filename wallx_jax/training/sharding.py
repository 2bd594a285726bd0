"""Create the device mesh and define how parameters and batches are sharded over it.

Axes: "data" (data parallelism: copies of the model), "fsdp" (parameters and optimizer state sharded along a width),
"tensor" (tensor parallelism: heads and MLP width). Batches are sharded over data and fsdp. Parameters are sharded by
role, which is derived from their path; the layer axis is never sharded.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wallx_jax.config.schema import MeshConfig

AXES = ("data", "fsdp", "tensor")

# First match wins. Specs apply to the last axes of a parameter; its leading (layer) axes are not sharded.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"/(scale|bias)$", ()),
    (r"(^|/)embed/embedding$", ("tensor", "fsdp")),
    (r"/(q|k|v|qkv|gate|up|fc1|patch_embed|propri_proj|w1|w2)/kernel$", ("fsdp", "tensor")),
    (r"/(o|proj|down|fc2|w3|proj_back)/kernel$", ("tensor", "fsdp")),
    (r"(^|/)lm_head/kernel$", ("fsdp", "tensor")),
    (r"/lora_a$", ("fsdp", None)),
    (r"/lora_b$", (None, "tensor")),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Create a mesh over all (or the given) devices.

    Raises:
        ValueError: the product of the mesh sizes is not the number of devices.
    """
    devices = devices or jax.devices()
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or known < 1 or len(devices) % known or (-1 not in sizes and known != len(devices)):
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"{named} does not fit {len(devices)} devices; at most one axis may be -1 (takes the rest)")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return how a parameter is sharded; a dimension not divisible by its mesh axis is not sharded.

    Raises:
        ValueError: no rule matches the path.
    """
    for pattern, last in RULES:
        if re.search(pattern, path):
            if len(shape) < len(last):  # a factored moment: small, so replicated
                return PartitionSpec()
            spec = (None,) * (len(shape) - len(last)) + last
            return PartitionSpec(
                *(
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(spec, shape, strict=True)
                )
            )
    raise ValueError(f"no sharding rule for parameter {path}; add one to training/sharding.py")


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """Return a tree with the NamedSharding of every leaf of a parameter tree, optimizer state or TrainState.

    Optimizer moments are sharded like their parameters: the rule is chosen by the parameter path at the end of a leaf's
    path.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return replicated(mesh)
        name = "/".join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, abstract)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Return the sharding of a batch over data and fsdp; the batch axis follows `leading` unsharded axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ("data", "fsdp")))


def batch_copies(mesh: Mesh) -> int:
    """Return the number of pieces that a batch is sharded into, each processed by its own copy of the model."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Return the shard of every batch that this process loads.

    Processes whose devices hold the same rows, because they differ only along "tensor", load the same shard.

    Returns:
        (shard index, number of shards).

    Raises:
        ValueError: two processes have some but not all of their rows in common.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    held: dict[int, set[int]] = {device.process_index: set() for device in mesh.devices.flat}
    for row, devices in enumerate(rows):
        for device in devices:
            held[device.process_index].add(row)
    shards = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, shards)) != len(rows) or len(set(map(len, shards))) > 1:
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"{named} cuts a batch within and across processes of {jax.local_device_count()} devices each: let "
            "mesh.tensor divide that number, or be a multiple of it"
        )
    return shards.index(tuple(sorted(held[jax.process_index()]))), len(shards)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
