"""Training with layers apart is the same training as with layers stacked, and what is stored is stacked."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers.tiny_step import OPTIM, SMALL, random_batch

from wallx_jax.config.schema import MeshConfig
from wallx_jax.models import scan
from wallx_jax.models.config import LoraConfig
from wallx_jax.models.params import init_params
from wallx_jax.training import sharding
from wallx_jax.training.init import abstract_state, restack_like
from wallx_jax.training.loop import put_batch
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.training.state import create_state, with_gradient_buffer
from wallx_jax.training.step import Objective, compile_train_step, make_train_step
from wallx_jax.utils import tree

MODEL = SMALL.replace(
    vision={"depth": 2, "fullatt_block_indexes": (1,)}, text={"num_hidden_layers": 3}, numerics={"remat": "none"}
)
OPTIONS = {
    "rates": {"learning_rates": (("^decoder/layers/attn/", 1e-4),)},
    "frozen": {"freeze_vlm": True, "action_expert_learning_rate": 1e-4, "ema_decay": 0.9},
    "adapters": {"lora": LoraConfig(rank=2)},
}


def fresh_state(model, optim):
    return jax.jit(lambda: create_state(init_params(model, 0), make_optimizer(optim, 10)))()


@functools.cache
def three_updates(model, optim, scan_layers: bool, keep: bool = False):
    """(losses, stacked state after three updates, compiled step)."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    optimizer = make_optimizer(optim, 10)
    stored = abstract_state(model, optimizer, mesh)
    state = fresh_state(model, optim)
    state = restack_like(state, abstract_state(model, optimizer, mesh, scan_layers))
    assert scan.is_unrolled(state.params) != scan_layers
    if keep:
        state = with_gradient_buffer(state, optimizer)
    batches = [put_batch(random_batch((4,), seed=i, labels=4), mesh, 1) for i in range(3)]
    step = compile_train_step(make_train_step(model, optimizer, Objective(), seed=0), state, batches[0])
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, restack_like(dataclasses.replace(state, gradients=None), stored), step


@pytest.mark.medium
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_same_updates(options):
    optim = dataclasses.replace(OPTIM, **options)
    model = dataclasses.replace(MODEL, lora=optim.lora)
    start = jax.device_get(fresh_state(model, optim))
    (stacked_losses, stacked, _), (apart_losses, apart, _) = (
        three_updates(model, optim, scan) for scan in (True, False)
    )
    np.testing.assert_allclose(apart_losses, stacked_losses, rtol=1e-5)
    assert jax.tree.structure(apart) == jax.tree.structure(stacked)
    before = tree.leaves_by_path(start)
    for (path, a), b in zip(tree.leaves_by_path(apart).items(), jax.tree.leaves(stacked), strict=True):
        moved = np.abs(np.asarray(b) - before[path]).max()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2 * moved + 1e-9, err_msg=path)


@pytest.mark.medium
def test_recomputing_changes_nothing():
    kept = three_updates(MODEL, OPTIM, scan_layers=False)
    recomputed = three_updates(MODEL.replace(numerics={"remat": "full"}), OPTIM, scan_layers=False)
    np.testing.assert_allclose(recomputed[0], kept[0], rtol=1e-5)
    assert recomputed[2].cost_analysis()["flops"] > 1.1 * kept[2].cost_analysis()["flops"]


@pytest.mark.medium
def test_memory_of_gradients_is_passed_on():
    plain, kept = (three_updates(MODEL, OPTIM, scan_layers=False, keep=keep) for keep in (False, True))
    np.testing.assert_allclose(kept[0], plain[0], rtol=1e-6)
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(plain[1].params))
    before, after = (step.memory_analysis() for _, _, step in (plain, kept))
    assert before.temp_size_in_bytes - after.temp_size_in_bytes > 0.5 * gradients
    assert after.alias_size_in_bytes - before.alias_size_in_bytes == gradients


@pytest.mark.medium
def test_a_state_survives_being_taken_apart_and_stacked():
    optim = dataclasses.replace(OPTIM, freeze_vlm=True, ema_decay=0.9)
    mesh = sharding.make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    optimizer = make_optimizer(optim, 10)
    stacked, apart = (abstract_state(MODEL, optimizer, mesh, scan_layers) for scan_layers in (True, False))
    state = fresh_state(MODEL, optim)
    there = restack_like(state, apart)
    assert jax.tree.map(lambda x: (x.shape, x.sharding), there) == jax.tree.map(lambda x: (x.shape, x.sharding), apart)
    again = restack_like(there, stacked)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert restack_like(again, stacked) is again
