"""The plan's figures against what a run really has."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny_run

from wallx_jax import tree
from wallx_jax.config import resolve
from wallx_jax.models.config import PRESETS
from wallx_jax.models.wallx import abstract_params
from wallx_jax.run_config import MeshConfig
from wallx_jax.training import parts, plan, sharding, start
from wallx_jax.training.optimizer import is_trainable
from wallx_jax.training.state import create_state

TINY = PRESETS["tiny"]


def optim_of(**changes):
    return resolve(tiny_run.run_config("model", "dataset", "out", **changes)).optim


def mesh_of(**axes):
    size = MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | axes)
    return sharding.make_mesh(size, jax.devices()[: size.data * size.fsdp * size.tensor])


def test_every_parameter_belongs_to_a_part_and_counts_once():
    model = dataclasses.replace(TINY, lora=optim_of(lora__rank=2).lora).replace(text={"tie_word_embeddings": False})
    specs = tree.flatten(abstract_params(model))
    rows = parts.rows(specs, lambda path: "x")
    assert [row.part for row in rows] == [part for part, _ in parts.PARTS]
    assert sum(row.count for row in rows) == sum(x.size for x in specs.values())
    assert sum(row.size for row in rows) == sum(x.size * x.dtype.itemsize for x in specs.values())
    table = parts.table(rows)
    assert len(table) == len(rows) + 1 and f"{sum(row.count for row in rows):,}" in table[-1]


@pytest.mark.parametrize("axes", [{}, {"data": 2}, {"fsdp": 2}, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("changes", [{}, {"freeze_vlm": True}, {"lora__rank": 2}])
def test_memory_is_what_a_placed_state_takes(axes, changes):
    optim, mesh = optim_of(**changes), mesh_of(**axes)
    model = dataclasses.replace(TINY, lora=optim.lora)
    memory = plan.memory_of(start.abstract_state(model, optim, 10, mesh), optim, 1)

    zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), abstract_params(model))
    state = create_state(zeros, optim, 10)
    state = jax.device_put(state, sharding.shardings(state, mesh))

    def on_first_device(arrays) -> int:
        shards = [shard for array in jax.tree.leaves(arrays) for shard in array.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])

    trained = tree.split(state.params, is_trainable(optim))[0]
    assert memory == plan.Memory(*map(on_first_device, (state.params, trained, state.opt_state)))
    summed = plan.memory_of(start.abstract_state(model, optim, 10, mesh), optim, 4)
    assert summed.gradients == 2 * memory.gradients, "float32 gradients and their float32 sum"
