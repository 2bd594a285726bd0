"""Fine-tuning with adapters: what is trained, saved, resumed, acted with and exported."""

import dataclasses

import numpy as np
import pytest
from helpers import tiny_run

import wallx_jax
import wallx_jax.train
from wallx_jax.checkpoints.checkpointer import restore_params
from wallx_jax.checkpoints.compare import compare
from wallx_jax.checkpoints.layout import read_model_config
from wallx_jax.checkpoints.to_pytorch import export_model
from wallx_jax.models.config import LoraConfig
from wallx_jax.models.lora import is_adapter
from wallx_jax.utils import tree
from wallx_jax.utils.errors import ConfigError
from wallx_jax.weights.load import load_params

pytestmark = pytest.mark.slow
OBSERVATION = {
    "images": {view: np.full((60, 90, 3), 90, np.uint8) for view in ("face_view", "left_wrist_view")},
    "state": np.zeros(14),
    "instruction": "open the cabinet",
}


def config_for(model_dir, dataset_dir, save_path, **changes):
    options = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2, "lora__rank": 4, "eval_interval": 0}
    return tiny_run.run_config(model_dir, dataset_dir, save_path, **options | changes)


@pytest.fixture(scope="module")
def run_dir(model_dir, dataset_dir, tmp_path_factory):
    """Four updates, saved after two."""
    folder = tmp_path_factory.mktemp("run") / "lora"
    wallx_jax.train.run(config_for(model_dir, dataset_dir, folder))
    return folder


def flat(params):
    return {path: np.asarray(x) for path, x in tree.flatten(params).items()}


def test_adapters_and_heads_are_trained_and_nothing_else(model_dir, run_dir):
    base, after = flat(load_params(model_dir)[1]), flat(restore_params(run_dir))
    changed = {path for path in base if not np.array_equal(base[path], after[path])}
    assert changed == {path for path in base if path.startswith("action/")}
    adapters = {path: x for path, x in after.items() if is_adapter(path)}
    assert len(adapters) == 20 and after.keys() == base.keys() | adapters.keys()
    assert all(x.any() for x in adapters.values()), "each B has left zero"


def test_resumed_equals_uninterrupted(model_dir, dataset_dir, run_dir, tmp_path):
    options = {"resume__ckpt": str(run_dir / "checkpoints" / "2")}
    last = wallx_jax.train.run(config_for(model_dir, dataset_dir, tmp_path / "resumed", **options))
    for path, x in flat(restore_params(last)).items():
        np.testing.assert_array_equal(x, flat(restore_params(run_dir))[path], err_msg=path)


def test_new_run_goes_on_from_adapters_or_from_what_they_make(model_dir, dataset_dir, run_dir, tmp_path):
    options = {"resume__ckpt": str(run_dir), "resume__load_ckpt_only": True, "num_training_steps": 1}
    for rank in (4, 0):
        last = wallx_jax.train.run(
            config_for(model_dir, dataset_dir, tmp_path / str(rank), lora__rank=rank, num_warmup_steps=100, **options)
        )
        assert any(map(is_adapter, flat(restore_params(last)))) == (rank > 0)
        found = compare(run_dir, last)  # the first of 100 warm-up steps has a rate of zero
        assert all(difference < 1e-6 for difference, _ in found.values.values()), found


def test_export_is_merged_and_acts_like_the_run(model_dir, run_dir, tmp_path):
    exported = export_model(run_dir, tmp_path / "exported")
    assert compare(run_dir, exported).identical
    changed = compare(model_dir, exported)
    assert not changed.only_a and not changed.only_b
    assert {name for name in changed.values if ".self_attn.q_proj.weight" in name}, "the adapters are in the kernels"
    assert not {name for name in changed.values if "embed_tokens" in name or "visual" in name}
    config = load_params(exported)[0]
    assert config.lora == LoraConfig()
    assert config.action == read_model_config(run_dir).action
    ours, theirs, base = (
        wallx_jax.load_policy(path, **options).predict(OBSERVATION).actions
        for path, options in (
            (run_dir, {}),
            (exported, {}),
            (model_dir, {"norm_stats": run_dir / "assets" / "norm_stats.json", "views": tuple(OBSERVATION["images"]),
                         "resolution": 84, "horizon": 4}),
        )
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - base).max() > 1e-4


def test_sharding_and_accumulation_change_nothing(model_dir, dataset_dir, run_dir, tmp_path):
    options = {"mesh__fsdp": -1, "mesh__tensor": 1, "batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    last = wallx_jax.train.run(config_for(model_dir, dataset_dir, tmp_path / "other", **options))
    expected = flat(restore_params(run_dir))
    for path, x in flat(restore_params(last)).items():
        np.testing.assert_allclose(x, expected[path], atol=3e-5, err_msg=path)


def test_settings_that_cannot_work(model_dir, dataset_dir, tmp_path):
    wrong = {"lora__targets": ("[",), "lora__rank": -1, "lora__alpha": 0.0}
    with pytest.raises(ConfigError) as error:
        wallx_jax.train.run(config_for(model_dir, dataset_dir, tmp_path / "run", **wrong))
    assert [key for key in ("lora.targets", "lora.rank", "lora.alpha") if key in str(error.value)] == [
        "lora.targets", "lora.rank", "lora.alpha"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"lora.targets = \('nothing',\) match no linear layer; there are .*attn/q"):
        wallx_jax.train.run(config_for(model_dir, dataset_dir, tmp_path / "run", lora__targets=("nothing",)))
    qwen = tiny_run.write_model(tmp_path / "qwen", qwen=True)
    with pytest.raises(ConfigError, match="the action expert, which is new"):
        wallx_jax.train.run(config_for(qwen, dataset_dir, tmp_path / "run"))
    targets = ("decoder/layers/attn/", "decoder/layers/mlp/vlm/")
    last = wallx_jax.train.run(config_for(qwen, dataset_dir, tmp_path / "run", lora__targets=targets))
    config = read_model_config(last)
    assert config.lora == dataclasses.replace(LoraConfig(), rank=4, targets=targets)
