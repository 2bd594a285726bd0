"""Settings of the hardware: devices of the mesh, and processes of a multi-process run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wallx_jax.utils.settings import Choice, setting


class Platform(Choice):
    """What JAX computes on."""

    CPU = "cpu"
    GPU = "gpu"
    TPU = "tpu"


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1 on at most one axis takes the remaining devices."""

    data: int = setting(-1, "devices for data parallelism: copies of the model; -1: the remaining devices")
    fsdp: int = setting(1, "devices that parameters and optimizer state are sharded over; -1: the remaining devices")
    tensor: int = setting(
        1, "devices that attention heads and MLP width are sharded over (tensor parallelism); -1: the remaining devices"
    )

    @staticmethod
    def errors(v: Mapping[str, Any]) -> list[str]:
        """Check the section's settings, also against each other, given all settings by key."""
        axes = {name: v[f"mesh.{name}"] for name in ("data", "fsdp", "tensor")}
        if list(axes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in axes.values()):
            return [f"mesh = {axes}: give each axis a size of at least 1, or -1 (the rest) on one of them"]
        return []


@dataclass(frozen=True)
class DistributedConfig:
    """A multi-process run: all three, the same in every process but process_id.

    All None: from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, SLURM or Open MPI, else a single
    process.
    """

    coordinator: str | None = setting(None, '"HOST:PORT" of process 0; None: from the environment')
    num_processes: int | None = setting(None, "number of processes of the run; None: from the environment")
    process_id: int | None = setting(None, "index of this process, from 0; None: from the environment")

    @staticmethod
    def errors(v: Mapping[str, Any]) -> list[str]:
        """Check the section's settings, also against each other, given all settings by key."""
        keys = [f"distributed.{name}" for name in ("coordinator", "num_processes", "process_id")]
        missing = [key for key in keys if v[key] is None]
        if len(missing) == len(keys):
            return []
        if missing:
            return [f"{' and '.join(missing)}: required as well, when one setting of distributed is given"]
        address, count, index = (v[key] for key in keys)
        errors = []
        if not re.fullmatch(r".+:\d+", address):
            errors.append(f"distributed.coordinator = {address!r}: expected HOST:PORT of process 0")
        if not 0 <= index < count:
            errors.append(
                f"distributed.process_id = {index} of distributed.num_processes = {count}: must be 0 or more, and "
                "below it"
            )
        return errors
