"""The validation loss of a run depends on weights and frames alone, not on batches, devices or what is trained on."""

import json

import numpy as np
import pytest
from helpers import synthetic, tiny_run

import wallx_jax.train
from wallx_jax.data.fast import FastTokenizer

pytestmark = pytest.mark.slow
BATCHES = ((1, 1), (1, 13), (4, 2))  # devices, evaluation samples on each


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """A model that says its actions, and its settings."""
    folder = tmp_path_factory.mktemp("fast")
    FastTokenizer.fit(np.random.default_rng(0).uniform(-1, 1, (64, 4, 14)), vocab_size=400).save(folder / "fast")
    return tiny_run.write_model(folder / "qwen", qwen=True), {
        "use_fast_tokenizer": True,
        "action_tokenizer_path": str(folder / "fast"),
        "action_expert_intermediate_size": 16,
    }


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = synthetic.write_dataset(tmp_path_factory.mktemp("small") / "small", dims=7)
    return {"datasets": {"seven": {"repo_id": str(folder), "weight": 0.5}}}


@pytest.mark.parametrize("kind", ["flow", "moving average", "some frames", "fast", "mixture"])
def test_validation_loss_depends_on_the_frames_alone(
    model_dir, dataset_dir, fast, mixture, tmp_path, monkeypatch, kind
):
    """After one update at learning rate 0, so that the weights are the same."""
    model, changes = {
        "flow": (model_dir, {}),
        "moving average": (model_dir, {"ema_decay": 0.9}),
        "some frames": (model_dir, {"eval_frames": 4}),
        "fast": fast,
        "mixture": (model_dir, mixture),
    }[kind]
    losses = []
    for devices, size in BATCHES:
        tiny_run.use_devices(monkeypatch, devices)
        run = tmp_path / f"{devices}_{size}"
        config = tiny_run.run_config(
            model, dataset_dir, run, num_training_steps=1, eval_interval=1, eval_batches=None, mesh__data=devices,
            eval_batch_size_per_gpu=size, batch_size_per_gpu=4 // devices, **changes,
        )  # fmt: skip
        wallx_jax.train.run(config)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses += [{k: v for k, v in line.items() if k.startswith("val_")} for line in lines if "val_loss" in line]
    assert len(losses) == len(BATCHES) and losses[0]["val_loss"] > 0
    assert ("val_flow_loss/seven" in losses[0]) == (kind == "mixture")
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
