"""Runs of many processes: each learns who the others are before it touches a device."""

import itertools
import logging
import os
import threading
from collections.abc import Mapping

import jax
from jax._src.distributed import global_state  # barriers outside of the devices have no public name

from wallx_jax.config.schema import DistributedConfig
from wallx_jax.utils.errors import ConfigError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 300  # a process that was stopped for a minute or two, as machines are when they move, is not dead
MEETING_S = 3600
SLOW_S = 10
_meetings = itertools.count()
# The same three settings as environment variables.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# How many processes a launcher started, and a variable that only those processes have: a batch script itself, and a
# shell in an allocation, know the count too. jax.distributed reads the rest.
LAUNCHERS = (("SLURM_NTASKS", "SLURM_STEP_NODELIST"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))


def initialize(config: DistributedConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of one run. Does nothing in a run of one process, or when that has been done already.

    Settings win over the environment variables in VARIABLES, those over what SLURM or Open MPI say.

    Raises:
        ConfigError: only some of the three are given, or a variable is no number.
        RuntimeError: devices are in use already, or the coordinator does not answer.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: getattr(config, name) for name in VARIABLES}
    source = {name: f"distributed.{name}" for name in VARIABLES}
    if all(value is None for value in given.values()):
        given, source = {name: environ.get(variable) for name, variable in VARIABLES.items()}, VARIABLES
    missing = [source[name] for name, value in given.items() if value is None]
    # An address alone may be there to change the one that the launcher would give.
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
    # JAX's own handling of SIGTERM would keep a process from ending before training starts; see interruption.py.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_S)


def meet() -> None:
    """Waits until all processes of the run have come here; to be called as often by each.

    Between CPUs the first collectives fail unless all processes come to them within 30 seconds (Gloo's, in JAX).
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
