"""JAX's global switches, set by a host program for its own ends, neither change nor stop what we compute."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_run

import wallx_jax
from wallx_jax.config.schema import OptimConfig
from wallx_jax.data.batch import EvalBatch
from wallx_jax.data.build import blank_sample
from wallx_jax.inference.policy import ActionNotFiniteError, Policy
from wallx_jax.inference.vlm import VLM
from wallx_jax.models.params import init_params
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.training.state import create_state
from wallx_jax.training.step import Objective, make_eval_step, make_train_step
from wallx_jax.utils import jax_flags

HOSTS = {
    "64 bits": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "another generator": lambda: jax.default_prng_impl("rbg"),
    "the old threefry": lambda: jax.threefry_partitionable(False),
    "no transfers": lambda: jax.transfer_guard("disallow"),
    "checks of keys": lambda: jax.debug_key_reuse(True),
    "checks of NaN": lambda: jax.debug_nans(True),
    "another device": lambda: jax.default_device(jax.devices()[1]),
    "no jit": jax.disable_jit,
}
TRACED = ("64 bits", "strict promotion", "no rank promotion", "another generator", "the old threefry")
OPTIM = OptimConfig(learning_rate=1e-3, min_lr=1e-4, warmup_steps=1)
PICTURE = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
OBSERVATION = {"images": {"face_view": PICTURE}, "state": np.linspace(-1, 1, 4), "instruction": "open the cabinet"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model") / "tiny")


def open_policy(model_dir) -> Policy:
    return wallx_jax.load_policy(
        model_dir, norm_stats=tiny_run.unit_stats(4), views=("face_view",), resolution=56, horizon=3,
        numerics={"param_dtype": "float32", "compute_dtype": "float32"},
    )  # fmt: skip


def act(model_dir) -> tuple[np.ndarray, list[int]]:
    """What a policy does, and what its model says."""
    policy = open_policy(model_dir)
    vlm = VLM(policy.config, policy.params, policy.processor.tokenizer)
    said = vlm.ask("what is it?", PICTURE, max_tokens=4, temperature=1.0, seed=5)
    return policy.predict(OBSERVATION, steps=2, seed=3).actions, said.tokens


@pytest.fixture(scope="module")
def plain(model_dir):
    return act(model_dir)


@pytest.mark.medium
@pytest.mark.parametrize("host", HOSTS)
def test_acting_and_answering(model_dir, plain, host):
    with HOSTS[host]():
        actions, tokens = act(model_dir)
    assert actions.dtype == np.float32 and tokens == plain[1]
    np.testing.assert_allclose(actions, plain[0], atol=1e-6)


def test_a_host_that_changes_its_mind(model_dir, plain):
    """Programs that are compiled already serve under other switches, and on the device where the policy was opened."""
    with jax.default_device(jax.devices()[1]):
        policy = open_policy(model_dir)
        policy.predict(OBSERVATION, steps=2, seed=3)
    for host in HOSTS.values():
        with host():
            np.testing.assert_allclose(policy.predict(OBSERVATION, steps=2, seed=3).actions, plain[0], atol=1e-6)
    assert policy.compilations == 1


def test_bad_weights_are_told_as_ever_where_jax_looks_for_nan(model_dir):
    bad = open_policy(model_dir)
    bad.params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), bad.params)
    with jax.debug_nans(True), pytest.raises(ActionNotFiniteError, match="the actions are not finite"):
        bad.predict(OBSERVATION, steps=1)


def train(layout, config) -> list[np.ndarray]:
    """Parameters in bfloat16 and metrics after an update, and a validation loss."""
    batch = jax.tree.map(lambda x: np.stack([x, x]), blank_sample(layout))
    batch = dataclasses.replace(batch, actions=batch.actions + np.float32(0.5), action_mask=batch.action_mask + 1)
    state = create_state(init_params(config, 0), make_optimizer(OPTIM, 10))
    step = jax.jit(make_train_step(config, make_optimizer(OPTIM, 10), Objective(), seed=0))
    after, metrics = step(state, jax.tree.map(lambda x: x[None], batch))
    held_out = EvalBatch(batch, frame=np.arange(2, dtype=np.uint32), counted=np.ones(2, bool))
    sums, _ = jax.jit(make_eval_step(config, Objective(), seed=0))(after.params, held_out)
    return [np.asarray(x) for x in jax.tree.leaves(jax.device_get((after.params, metrics, sums)))]


@pytest.mark.slow
def test_training(model_dir):
    """Initialisation, noise and rounding included, with all of them set at once."""
    policy = open_policy(model_dir)
    given = policy.processor.config, policy.config.replace(numerics={"param_dtype": "bfloat16"})
    expected = train(*given)
    with contextlib.ExitStack() as host:
        for name in TRACED:
            host.enter_context(HOSTS[name]())
        found = train(*given)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_the_host_keeps_its_switches():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        with jax_flags.ours():
            assert jnp.arange(2).dtype == np.int32
        assert jnp.arange(2).dtype == np.int64 and jax.config.jax_numpy_dtype_promotion == "strict"
