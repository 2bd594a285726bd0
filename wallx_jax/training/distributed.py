"""Initialize multi-process runs, before any device is used."""

import itertools
import logging
import os
import threading
from collections.abc import Mapping

import jax
from jax._src.distributed import global_state  # no public API for barriers that do not use devices

from wallx_jax.config.schema import DistributedConfig
from wallx_jax.utils.errors import ConfigError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 300  # a process paused for a minute or two, e.g. while its VM migrates, is not dead
MEETING_S = 3600
SLOW_S = 10
_meetings = itertools.count()
# Environment variables for the three settings.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# For each launcher, the variable with the number of processes, and one that only those processes have: the count is
# also set in the batch script itself and in a shell inside an allocation. jax.distributed reads the rest.
LAUNCHERS = (("SLURM_NTASKS", "SLURM_STEP_NODELIST"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))


def initialize(config: DistributedConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Connect the processes of a run. Do nothing in a single-process run, or if they are already connected.

    The config takes precedence over the environment variables in VARIABLES, and those over SLURM or Open MPI.

    Args:
        config: coordinator address, number of processes and process id; each may be None.
        environ: environment variables.

    Raises:
        ConfigError: only some of the three settings are given, or one is not a number.
        RuntimeError: devices are already in use, or the coordinator does not respond.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: getattr(config, name) for name in VARIABLES}
    source = {name: f"distributed.{name}" for name in VARIABLES}
    if all(value is None for value in given.values()):
        given, source = {name: environ.get(variable) for name, variable in VARIABLES.items()}, VARIABLES
    missing = [source[name] for name, value in given.items() if value is None]
    # An address on its own may be meant to override the launcher's.
    launched = any(int(environ.get(count, 1)) > 1 and member in environ for count, member in LAUNCHERS)
    if not missing:
        arguments = {
            "coordinator_address": given["coordinator"],
            "num_processes": _integer(source["num_processes"], given["num_processes"]),
            "process_id": _integer(source["process_id"], given["process_id"]),
            "cluster_detection_method": "deactivate",
        }
    elif launched:
        arguments = {}
    elif len(missing) < len(given):
        there = [f"{source[name]} = {value}" for name, value in given.items() if value is not None]
        raise ConfigError(
            f"{', '.join(there)}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: many "
            "processes need all three of coordinator (HOST:PORT), num_processes and process_id, one needs none"
        )
    else:
        return
    # JAX's own SIGTERM handler would keep a process from exiting before training starts; see interruption.py.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_S)


def meet() -> None:
    """Wait until all processes of the run have called this function; each must call it equally often.

    On CPUs, the first collectives fail unless all processes reach them within 30 seconds (the timeout of Gloo in JAX).
    """
    client = global_state.client
    if client is None:
        return
    slow = threading.Timer(SLOW_S, logger.warning, ["waiting for the other processes of the run"])
    slow.daemon = True
    slow.start()
    try:
        client.wait_at_barrier(f"wallx_jax/meeting/{next(_meetings)}", 1000 * MEETING_S)
    finally:
        slow.cancel()


def _integer(name: str, value: int | str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} = {value!r}: expected a number") from None
