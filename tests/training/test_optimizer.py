"""The optimizer: schedules, learning-rate groups, frozen parameters, and a state that depends on no rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_step import OPTIM, SMALL, leaves

from wallx_jax.models.config import PRESETS, LoraConfig
from wallx_jax.models.params import abstract_params, init_params
from wallx_jax.training.optimizer import make_optimizer, make_schedule
from wallx_jax.training.state import create_state
from wallx_jax.utils import tree


def test_schedule():
    rate = make_schedule(1e-3, OPTIM, 12)
    assert [float(rate(n)) for n in (0, 1, 2, 7, 12, 50)] == pytest.approx([0, 5e-4, 1e-3, 5.5e-4, 1e-4, 1e-4])
    expert = make_schedule(2e-3, OPTIM, 12)
    assert float(expert(12)) == pytest.approx(2e-4), "another group ends at the same fraction of its own peak"


def test_groups():
    paths = list(tree.flatten(abstract_params(SMALL)))
    expert = [p for p in paths if p.startswith("decoder/layers/mlp/action/")]
    heads = [p for p in paths if p.startswith("action/")]
    assert expert and heads

    def grouped(**changes):
        group_of = make_optimizer(dataclasses.replace(OPTIM, **changes), 10).group_of
        return {name: [p for p in paths if group_of(p) == name] for name in ("vlm", "action_expert", "frozen")}

    assert grouped()["action_expert"] == expert and not grouped()["frozen"]
    assert grouped(freeze_vlm=True)["vlm"] == heads
    assert grouped(freeze_vlm=True, train_action_heads=False)["vlm"] == []
    assert set(grouped(freeze_vlm=True)["frozen"]) == set(paths) - set(expert) - set(heads)
    config = dataclasses.replace(OPTIM, freeze_vlm=True)
    frozen_state = create_state(init_params(SMALL, 0), make_optimizer(config, 10))
    moments = sum(x.size for x in jax.tree.leaves(frozen_state.opt_state))
    trained = sum(x.size for p, x in leaves(frozen_state.params).items() if p in expert + heads)
    assert moments < 2 * trained + 10, "frozen parameters have no optimizer state"


@pytest.mark.parametrize("targets", [("decoder/layers/",), ("decoder/layers/attn/", "mlp/vlm")])
def test_groups_with_adapters(targets):
    """Trained: adapters, action heads, and an action expert that has no adapters."""
    config = dataclasses.replace(OPTIM, lora=LoraConfig(rank=2, targets=targets))
    paths = list(tree.flatten(abstract_params(dataclasses.replace(SMALL, lora=config.lora))))
    groups = {path: make_optimizer(config, 10).group_of(path) for path in paths}
    for path, group in groups.items():
        if path.startswith("decoder/layers/mlp/action/"):
            trained = path.endswith(("lora_a", "lora_b")) or len(targets) == 2
            assert group == ("action_expert" if trained else "frozen"), path
        else:
            assert group == ("vlm" if "lora_" in path or path.startswith("action/") else "frozen"), path
    only_action = make_optimizer(dataclasses.replace(config, freeze_vlm=True), 10)
    assert {only_action.group_of(p) for p in paths if "mlp/vlm" in p or "attn" in p} == {"frozen"}


def test_decay_reaches_every_parameter():
    """Weight decay 0.1 on norms, biases and embeddings too, as upstream: zero gradients still shrink them."""
    params = {"decoder": {"norm": {"scale": jnp.ones(3)}}, "embed": {"embedding": jnp.ones((2, 2))}}
    optimizer = make_optimizer(dataclasses.replace(OPTIM, warmup_steps=0), 10).tx
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -1e-3 * 0.1, rtol=1e-5)


def test_adafactor_keeps_hardly_any_moments():
    optimizer = make_optimizer(dataclasses.replace(OPTIM, optimizer="adafactor"), 10)
    state = jax.eval_shape(lambda p: create_state(p, optimizer), abstract_params(PRESETS["wall_oss_3b"]))
    moments, params = (sum(x.size for x in jax.tree.leaves(part)) for part in (state.opt_state, state.params))
    assert moments < 0.01 * params


@pytest.mark.parametrize("peak", [1e-3, 7e-4, 1e-5])
def test_every_peak_falls_to_the_same_share_of_itself(peak):
    """min_lr is what is left of learning_rate."""
    config = dataclasses.replace(OPTIM, learning_rate=1e-3, min_lr=1e-4, warmup_steps=3)
    rate = make_schedule(peak, config, 10)
    np.testing.assert_allclose([rate(3), rate(10)], [peak, 0.1 * peak], rtol=1e-5)
    assert rate(9) > 0.1 * peak, "the last update's"


def with_rules(**changes):
    rules = (("^vision/", 1e-5), ("mlp/action/down", 2e-5))
    return dataclasses.replace(OPTIM, action_expert_learning_rate=7e-4, learning_rates=rules, **changes)


def test_learning_rates_by_pattern():
    optimizer = make_optimizer(with_rules(warmup_steps=0), 10)

    def peak(path):
        return optimizer.peaks[optimizer.group_of(path)]

    assert peak("vision/blocks/attn/qkv/kernel") == 1e-5
    assert peak("decoder/layers/mlp/action/down/kernel") == 2e-5
    assert peak("decoder/layers/mlp/action/up/kernel") == 7e-4
    assert peak("decoder/norm/scale") == 1e-3
    params = tree.map_with_path(lambda path, x: jnp.ones(x.shape), abstract_params(SMALL))
    updates, _ = optimizer.tx.update(jax.tree.map(jnp.zeros_like, params), optimizer.tx.init(params), params)
    for path, update in tree.flatten(updates).items():
        np.testing.assert_allclose(update, -peak(path) * 0.1, rtol=1e-5)


def test_groups_are_named_after_what_selects_them():
    optimizer, paths = make_optimizer(with_rules(freeze_vlm=True), 10), list(tree.flatten(abstract_params(SMALL)))
    assert list(optimizer.schedules) == ["vlm", "action_expert", "rule:^vision/", "rule:mlp/action/down"]
    found = {path: optimizer.group_of(path) for path in paths}
    assert {group for path, group in found.items() if path.startswith("vision/")} == {"frozen"}, "a rule thaws nothing"
    assert optimizer.groups(abstract_params(SMALL)) == ["vlm", "action_expert", "rule:mlp/action/down"]
    assert {path for path in paths if not optimizer.is_trainable(path)} == {
        path for path, group in found.items() if group == "frozen"
    }


CHANGES = {
    "learning_rate": {"learning_rate": 5e-4},
    "min_lr": {"min_lr": 2e-4},
    "warm-up": {"warmup_steps": 7},
    "weight decay": {"weight_decay": 0.0},
    "expert": {"action_expert_learning_rate": 3e-4},
    "other rules": {"learning_rates": (("^decoder/", 1e-6),)},
    "no rules": {"learning_rates": ()},
    "length": {},
}
GROUPS = {
    "one group": dataclasses.replace(OPTIM, freeze_vlm=True, train_action_heads=False),
    "several groups": with_rules(),
}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("config", GROUPS.values(), ids=GROUPS)
def test_the_state_fits_an_optimizer_with_other_rates(config, changes, name):
    """Same leaves at the same paths, and the next update is the other optimizer's at the count of the state."""
    config = dataclasses.replace(config, optimizer=name)
    before, after = make_optimizer(config, 20), make_optimizer(dataclasses.replace(config, **changes), 40)
    assert len(before.groups(abstract_params(SMALL))) == (1 if config.freeze_vlm else 4)
    states = [jax.eval_shape(lambda p, o=o: create_state(p, o), abstract_params(SMALL)) for o in (before, after)]
    specs = [{path: (x.shape, x.dtype) for path, x in tree.leaves_by_path(state).items()} for state in states]
    assert specs[0] == specs[1]

    # With zero gradients only weight decay acts, so the update is the rate itself.
    path = "decoder/layers/mlp/action/up/kernel"
    params = tree.unflatten({path: jnp.ones((2, 3))})
    zeros, state = jax.tree.map(jnp.zeros_like, params), before.tx.init(params)
    for _ in range(4):
        _, state = before.tx.update(zeros, state, params)
    (update,) = jax.tree.leaves(after.tx.update(zeros, state, params)[0])
    rate = float(after.schedules[after.group_of(path)](4))
    np.testing.assert_allclose(update, -rate * after.config.weight_decay, rtol=1e-5)
    assert rate > 0
