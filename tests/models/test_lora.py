"""Adapters: what they compute, where they go, and that merging changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.tiny_models import SMALL

from wallx_jax.models import lora
from wallx_jax.models.config import LoraConfig, WallXConfig
from wallx_jax.models.params import abstract_params, from_params, init_params
from wallx_jax.models.wallx import FlowTarget
from wallx_jax.utils import tree

RANK4 = LoraConfig(rank=4, alpha=8.0)
EVERYWHERE = LoraConfig(rank=2, alpha=3.0, targets=("",))


def adapted(config: LoraConfig, seed: int = 0, zero_b: bool = False):
    """(model config, parameters whose B is random or still zero)."""
    model = dataclasses.replace(SMALL, lora=config)
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        random = path.endswith("/lora_b") and not zero_b
        return rng.standard_normal(x.shape, np.float32) * 0.1 if random else np.asarray(x)

    return model, tree.map_with_path(leaf, init_params(model, seed))


def losses(model: WallXConfig, params) -> np.ndarray:
    """Both losses of one random sample."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 60, (1, 12))
    net = from_params(model.replace(tokens={"image": 80, "propri": 81}), params)
    tokens[0, 2], tokens[0, 8] = 80, 81
    pixels = rng.integers(0, 256, (1, 28, 28, 3), np.uint8)
    features, grids = net.encode_images((pixels,))
    state, actions = rng.standard_normal((1, 20), np.float32), rng.standard_normal((1, 3, 20), np.float32)
    prefix = net.embed_prefix(tokens, np.ones(tokens.shape, bool), features, grids, state, np.ones_like(state))
    target = FlowTarget(actions, np.ones_like(actions), actions[:, ::-1], np.array([0.3], np.float32))
    sums = net.loss_sums(prefix, tokens[:, -4:], target)
    return np.array([sums.cross_entropy, sums.flow])


@pytest.mark.medium
@pytest.mark.parametrize("config", [RANK4, EVERYWHERE], ids=["decoder", "everywhere"])
def test_merged_computes_the_same(config):
    model, params = adapted(config)
    plain = dataclasses.replace(model, lora=LoraConfig())
    merged = lora.merge_params(params, config)
    assert tree.flatten(merged).keys() == tree.flatten(abstract_params(plain)).keys()
    base = {path: x for path, x in tree.flatten(params).items() if not lora.is_adapter(path)}
    with_adapters, after, before = losses(model, params), losses(plain, merged), losses(plain, tree.unflatten(base))
    np.testing.assert_allclose(with_adapters, after, rtol=2e-5)
    assert (np.abs(with_adapters - before) > 1e-3 * np.abs(before)).all(), "the adapters change both losses"


def test_a_fresh_adapter_changes_nothing():
    model, params = adapted(RANK4, zero_b=True)
    base = tree.unflatten({path: x for path, x in tree.flatten(params).items() if not lora.is_adapter(path)})
    np.testing.assert_array_equal(losses(model, params), losses(dataclasses.replace(model, lora=LoraConfig()), base))
    a = tree.flatten(params)["decoder/layers/mlp/vlm/gate/lora_a"]
    bound = 64**-0.5
    assert abs(a).max() <= bound and abs(a.std() - bound / 3**0.5) < 0.1 * bound


def test_targets_choose_layers():
    def layers(*targets):
        model = dataclasses.replace(SMALL, lora=LoraConfig(rank=3, targets=targets))
        flat = tree.flatten(abstract_params(model))
        return {path.removesuffix("/lora_a"): x.shape for path, x in flat.items() if path.endswith("lora_a")}

    assert layers("attn/(q|v)$", "w2$", "merger/fc2") == {
        "decoder/layers/attn/q": (3, 64, 3),
        "decoder/layers/attn/v": (3, 64, 3),
        "vision/merger/fc2": (128, 3),
    }
    assert set(layers("^decoder/layers/mlp/action/")) == {
        f"decoder/layers/mlp/action/{part}" for part in ("gate", "up", "down")
    }
    assert layers("nothing") == {}


def test_adapters_stay_float32_and_travel_in_config_json():
    model = dataclasses.replace(SMALL, lora=RANK4).replace(numerics={"param_dtype": "bfloat16"})
    flat = tree.flatten(abstract_params(model))
    assert flat["decoder/layers/attn/q/kernel"].dtype == jax.numpy.bfloat16
    assert flat["decoder/layers/attn/q/lora_a"].dtype == flat["decoder/layers/attn/q/lora_b"].dtype == np.float32
    assert WallXConfig.from_hf(model.to_hf()).lora == RANK4
    assert "lora" not in SMALL.to_hf()["wallx_jax"]
