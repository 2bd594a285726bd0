"""The training state: parameters for inference, and updates that are applied or skipped on each platform."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import OPTIM, SMALL, random_batch

from wallx_jax.models.params import init_params
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.training.state import create_state, skip_with_cond, skip_with_where, update_if
from wallx_jax.training.step import Objective, make_train_step
from wallx_jax.utils import tree

WAYS = (skip_with_cond, skip_with_where, update_if)


def decayed(state):
    """An update whose result contains NaN wherever the state is 1."""
    return jax.tree.map(lambda x: jnp.where(x == 1, jnp.nan, x * 0.5).astype(x.dtype), state)


@pytest.mark.parametrize("skip", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("jitted", [False, True])
def test_an_update_is_applied_as_a_whole_or_not_at_all(skip, jitted):
    before = {"a": jnp.arange(6, dtype=jnp.float32), "b": {"c": jnp.ones((2, 3), jnp.bfloat16)}, "d": jnp.float32(3)}
    call = functools.partial(skip, update=decayed, before=before)
    call = jax.jit(call) if jitted else call
    for finite, expected in ((True, decayed(before)), (False, before)):
        after = call(jnp.asarray(finite))
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
        jax.tree.map(np.testing.assert_array_equal, after, expected)


@pytest.mark.parametrize("skip", [skip_with_cond, skip_with_where], ids=lambda way: way.__name__)
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_train_step_skips_alike_on_every_platform(skip, optimizer, monkeypatch):
    """Finite updates agree, and after one that is not finite the state is bit for bit that of before."""
    optimizer = make_optimizer(dataclasses.replace(OPTIM, optimizer=optimizer, ema_decay=0.9), 10)
    model = SMALL.replace(numerics={"param_dtype": "bfloat16"})
    state = create_state(init_params(model, 0), optimizer)
    good, bad = random_batch((1, 2)), random_batch((1, 2))
    bad = dataclasses.replace(bad, actions=bad.actions + np.float32("nan"))
    expected, _ = jax.jit(make_train_step(model, optimizer, Objective(), seed=0))(state, good)
    monkeypatch.setattr("wallx_jax.training.step.update_if", skip)
    step = jax.jit(make_train_step(model, optimizer, Objective(), seed=0))
    after, metrics = step(state, good)
    assert bool(metrics["finite"])
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-2, atol=1e-5)
    skipped, metrics = step(after, bad)
    assert not bool(metrics["finite"]) and int(skipped.skipped) == 1
    for part in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(skipped, part), getattr(after, part))


def test_updates_are_counted_as_the_optimizer_counts_them():
    optimizer = make_optimizer(OPTIM, 10)
    step = jax.jit(make_train_step(SMALL, optimizer, Objective(), seed=0))
    state, good = create_state(init_params(SMALL, 0), optimizer), random_batch((1, 2))
    bad = dataclasses.replace(good, actions=good.actions + np.float32("nan"))
    for batch in (good, bad, good, bad, bad):
        state, _ = step(state, batch)
        assert int(state.updates) == int(state.opt_state[-1].count) == int(state.opt_state[0].count)
    assert int(state.updates) == 2


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_inference_uses_the_average_where_there_is_one(ema_decay):
    optimizer = make_optimizer(dataclasses.replace(OPTIM, freeze_vlm=True, ema_decay=ema_decay), 10)
    state = create_state(init_params(SMALL, 0), optimizer)
    if ema_decay is not None:
        state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 1, state.ema))
    params = tree.flatten(state.eval_params)
    for path, x in tree.flatten(state.params).items():
        averaged = ema_decay is not None and optimizer.is_trainable(path)
        np.testing.assert_array_equal(params[path], x + 1 if averaged else x, err_msg=path)
