"""The plan's figures against what a run really has."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny_run

from wallx_jax.config import resolve
from wallx_jax.config.schema import MeshConfig
from wallx_jax.models import param_summary
from wallx_jax.models.config import PRESETS
from wallx_jax.models.params import abstract_params
from wallx_jax.training import init, plan, sharding
from wallx_jax.training.optimizer import check_patterns, make_optimizer
from wallx_jax.training.state import create_state
from wallx_jax.utils import tree
from wallx_jax.utils.errors import ConfigError

TINY = PRESETS["tiny"]


def optim_of(**changes):
    return resolve(tiny_run.run_config("model", "dataset", "out", **changes)).optim


def mesh_of(**axes):
    size = MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | axes)
    return sharding.make_mesh(size, jax.devices()[: size.data * size.fsdp * size.tensor])


def test_every_parameter_belongs_to_a_part_and_counts_once():
    model = dataclasses.replace(TINY, lora=optim_of(lora__rank=2).lora).replace(text={"tie_word_embeddings": False})
    specs = tree.flatten(abstract_params(model))
    rows = param_summary.rows(specs, lambda path: "x")
    assert [row.part for row in rows] == [part for part, _ in param_summary.COMPONENTS]
    assert sum(row.count for row in rows) == sum(x.size for x in specs.values())
    assert sum(row.size for row in rows) == sum(x.size * x.dtype.itemsize for x in specs.values())
    table = param_summary.table(rows)
    assert len(table) == len(rows) + 1 and f"{sum(row.count for row in rows):,}" in table[-1]


@pytest.mark.parametrize("axes", [{}, {"data": 2}, {"fsdp": 2}, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("changes", [{}, {"freeze_vlm": True}, {"lora__rank": 2}])
def test_memory_is_what_a_placed_state_takes(axes, changes):
    optimizer, mesh = make_optimizer(optim_of(**changes), 10), mesh_of(**axes)
    model = dataclasses.replace(TINY, lora=optimizer.config.lora)
    memory = plan.memory_of(init.abstract_state(model, optimizer, mesh), optimizer, 1)

    zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), abstract_params(model))
    state = create_state(zeros, optimizer)
    state = jax.device_put(state, sharding.shardings(state, mesh))

    def on_first_device(arrays) -> int:
        shards = [shard for array in jax.tree.leaves(arrays) for shard in array.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])

    trained = tree.split(state.params, optimizer.is_trainable)[0]
    assert memory == plan.MemoryEstimate(*map(on_first_device, (state.params, trained, state.opt_state)))
    summed = plan.memory_of(init.abstract_state(model, optimizer, mesh), optimizer, 4)
    assert summed.gradients == 2 * memory.gradients, "float32 gradients and their float32 sum"


def check(**changes):
    optim = optim_of(**changes)
    check_patterns(make_optimizer(optim, 10), abstract_params(dataclasses.replace(TINY, lora=optim.lora)))


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"learning_rates": ("^vison/=1e-5",)}, ["'^vison/' matches no parameter (did you mean \"vision\"?)"]),
        ({"learning_rates": ("decoder/layer/attn=1",)}, ['matches no parameter (did you mean "decoder/layers/attn"?)']),
        (
            {"learning_rates": ("^zzz/=1e-5", "^vision/=1e-5", "xx=1")},
            ["'^zzz/' matches no parameter; the first part of a path is one of ['action', 'decoder'", "'xx'"],
        ),
        (
            {"learning_rates": ("^vision/=1e-5",), "freeze_vlm": True},
            ["'^vision/' matches only frozen parameters, such as 'vision/"],
        ),
        (
            {"learning_rates": ("/attn/q/kernel=1e-5",), "lora__rank": 2},
            ["matches only frozen parameters, such as 'decoder/layers/attn/q/kernel'"],
        ),
        (
            {"learning_rates": ("^vision/=1e-5", "^decoder/=1e-5", "merger|decoder/norm=1e-6")},
            ["'merger|decoder/norm' matches only parameters that ['^decoder/', '^vision/'] match before it"],
        ),
        (
            {"lora__rank": 2, "lora__targets": ("decoder/layers/attn/", "visoin/blocks")},
            ["'visoin/blocks' matches no linear layer that gets an adapter (did you mean \"vision/blocks"],
        ),
        (
            {"lora__rank": 2, "lora__targets": ("decoder/layers/attn/", "^action/w1")},
            ["'^action/w1' matches no linear layer that gets an adapter; the action heads never get one"],
        ),
        ({"lora__rank": 2, "lora__targets": ("vision/", "one", "two")}, ["'one' matches no", "'two' matches no"]),
    ],
)
def test_patterns_without_an_effect_are_named(changes, messages):
    with pytest.raises(ConfigError) as error:
        check(**changes)
    found = error.value.errors
    assert len(found) == len(messages) and all(text in line for text, line in zip(messages, found, strict=True)), found


def test_patterns_with_an_effect_pass():
    check(learning_rates=("attn/q/lora_a=1e-5", "mlp/.*/lora=1e-6", "^decoder/=1e-4"), lora__rank=2)
    check(learning_rates=("^vision/blocks/=1e-5", "^vision/=1e-6"))
    check(learning_rates=("^action/=1e-5", "mlp/action=1e-4"), freeze_vlm=True)
    check(lora__targets=("nothing without a rank",))
