"""The training state: parameters for inference, and updates that are applied or skipped on each platform."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tiny_step import OPTIM, SMALL

from wallx_jax.models.params import init_params
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.training.state import create_state, skip_with_cond, skip_with_where, update_if
from wallx_jax.utils import tree

WAYS = (skip_with_cond, skip_with_where, update_if)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


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
        assert_same_bits(call(jnp.asarray(finite)), expected)


@pytest.mark.parametrize("skip", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_moments_and_counts_are_skipped_with_the_parameters(skip, name):
    tx = make_optimizer(dataclasses.replace(OPTIM, optimizer=name, warmup_steps=0), 10).tx
    params = {"decoder": {"norm": {"scale": jnp.ones(3)}}, "embed": {"embedding": jnp.ones((2, 2))}}

    @jax.jit
    def step(before, scale):
        def update(before):
            params, moments = before
            updates, moments = tx.update(jax.tree.map(lambda x: scale * x, params), moments, params)
            return optax.apply_updates(params, updates), moments

        return skip(jnp.isfinite(scale), update, before)

    first = step((params, tx.init(params)), 0.1)
    skipped = step(first, np.float32("inf"))
    assert_same_bits(skipped, first)
    (moved, moments), (params, before) = step(skipped, 0.1), first
    assert (int(moments[-1].count), int(before[-1].count)) == (2, 1)
    assert all((x != y).all() for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True))


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
