"""Every mesh of 8 devices trains as one device does. As a script: trains on all of them and prints what came out."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import xla_flags
from helpers.tiny_step import OPTIM, SMALL, random_batch

from wallx_jax.config.schema import MeshConfig
from wallx_jax.models.params import init_params
from wallx_jax.training import sharding
from wallx_jax.training.loop import put_batch
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.training.state import create_state
from wallx_jax.training.step import Objective, make_train_step
from wallx_jax.utils import tree

MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8]
STEPS, BATCH = 5, 8


def trained(params: tree.Tree, sizes: tuple[int, int, int]) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, and parameters after STEPS updates, on a mesh (data, fsdp, tensor)."""
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    optimizer = make_optimizer(OPTIM, 10)
    lie = sharding.shardings(jax.eval_shape(lambda p: create_state(p, optimizer), params), mesh)
    state = jax.jit(lambda p: create_state(p, optimizer), out_shardings=lie)(params)
    train_step = make_train_step(SMALL, optimizer, Objective(), seed=0)
    step = jax.jit(train_step, out_shardings=(lie, None), donate_argnums=0)
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, put_batch(random_batch((BATCH,), seed=i, labels=6), mesh, 1))
        losses.append(float(metrics["loss"]))
    return losses, tree.flatten(jax.device_get(state.params))


def main() -> None:
    """Prints {mesh: [losses, largest difference of a parameter from one device]}, and how far parameters moved."""
    params = jax.device_get(init_params(SMALL, 0))
    first = tree.flatten(params)
    losses, one = trained(params, (1, 1, 1))
    results = {"one": [losses, max(float(np.abs(one[path] - first[path]).max()) for path in one)]}
    for sizes in MESHES:
        losses, there = trained(params, sizes)
        results[str(sizes)] = [losses, max(float(np.abs(there[path] - one[path]).max()) for path in one)]
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results():
    environment = os.environ | {
        "XLA_FLAGS": f"{xla_flags.QUICK_COMPILE} --xla_force_host_platform_device_count=8",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_trains_as_one_device(results, sizes):
    losses, moved = results["one"]
    assert moved > 1e-3, "five updates move parameters far more than the tolerance"
    there, difference = results[str(sizes)]
    np.testing.assert_allclose(there, losses, rtol=1e-5)
    assert difference < 2e-5


def devices_of(*processes: int):
    return [SimpleNamespace(process_index=process) for process in processes]


def mesh_of(sizes: tuple[int, int, int], *processes: int):
    shape = dict(zip(sharding.AXES, sizes, strict=True))
    return SimpleNamespace(devices=np.array(devices_of(*processes)).reshape(sizes), shape=shape)


@pytest.mark.parametrize(
    "sizes, processes, share",
    [
        ((1, 1, 1), (0,), (0, 1)),
        ((2, 1, 2), (0, 0, 1, 1), (0, 2)),  # each process has rows of its own
        ((2, 1, 2), (1, 1, 0, 0), (1, 2)),  # whose devices come first does not matter
        ((1, 2, 2), (0, 1, 0, 1), (0, 1)),  # cut along tensor alone: all load the same
        ((1, 1, 4), (0, 0, 1, 1), (0, 1)),
        ((2, 1, 4), (1, 1, 2, 2, 0, 0, 3, 3), (1, 2)),
    ],
)
def test_which_rows_a_process_loads(sizes, processes, share):
    assert sharding.data_shard(mesh_of(sizes, *processes)) == share


def test_rows_that_overlap_in_part_are_refused():
    with pytest.raises(ValueError, match="mesh.tensor=2 cuts a batch within and across processes"):
        sharding.data_shard(mesh_of((3, 1, 2), 0, 0, 0, 1, 1, 1))


if __name__ == "__main__":
    main()
