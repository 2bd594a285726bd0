"""Where a process learns who the others are."""

import jax
import pytest

from wallx_jax.config.schema import DistributedConfig
from wallx_jax.training import distributed
from wallx_jax.utils.errors import ConfigError

NONE = DistributedConfig(None, None, None)
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"}


@pytest.fixture
def joined(monkeypatch):
    """Calls of jax.distributed.initialize."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


def explicit(address, count, index):
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    "config, environ, calls",
    [
        (NONE, {}, []),
        (DistributedConfig("a:1", 2, 1), {}, [explicit("a:1", 2, 1)]),
        (DistributedConfig("a:1", 2, 0), VARIABLES | SLURM, [explicit("a:1", 2, 0)]),
        (NONE, VARIABLES | SLURM, [explicit("b:2", 4, 3)]),
        (NONE, SLURM, [{}]),
        (NONE, SLURM | {"JAX_COORDINATOR_ADDRESS": "b:2"}, [{}]),
        (NONE, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, [{}]),
        (NONE, {"SLURM_NTASKS": "2"}, []),  # the batch script itself
        (NONE, SLURM | {"SLURM_NTASKS": "1"}, []),
    ],
)
def test_settings_then_variables_then_launcher(joined, config, environ, calls):
    distributed.initialize(config, environ)
    assert joined == [call | {"heartbeat_timeout_seconds": distributed.HEARTBEAT_S} for call in calls]


def test_half_of_it_is_an_error(joined):
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES = 4, but JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID are"):
        distributed.initialize(NONE, {"JAX_NUM_PROCESSES": "4"})
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID = 'x': expected a number"):
        distributed.initialize(NONE, VARIABLES | {"JAX_PROCESS_ID": "x"})
    assert not joined
