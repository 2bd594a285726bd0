"""Two robots in one run: trained on together, resumed, and each acted for by its name."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import synthetic, tiny_run

import wallx_jax
import wallx_jax.train
from wallx_jax.checkpoints.checkpointer import restore_params
from wallx_jax.evaluation.target import load_eval_target
from wallx_jax.utils import tree
from wallx_jax.utils.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
RNG = np.random.default_rng(0)
IMAGES = {
    "face_view": RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8),
    "left_wrist_view": RNG.integers(0, 256, (48, 48, 3), dtype=np.uint8),
}


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory):
    """A robot with 7 dims instead of 14."""
    return synthetic.write_dataset(tmp_path_factory.mktemp("small") / "small", dims=7)


def configured(model_dir, dataset_dir, small_dir, save_path, **changes):
    datasets = {"seven": {"repo_id": str(small_dir), "weight": 0.5}}
    return tiny_run.run_config(
        model_dir, dataset_dir, save_path, batch_size_per_gpu=3, **{"datasets": datasets, **changes}
    )


@pytest.fixture(scope="module")
def whole(model_dir, dataset_dir, small_dir, tmp_path_factory):
    config = configured(model_dir, dataset_dir, small_dir, tmp_path_factory.mktemp("run") / "whole")
    return config, wallx_jax.train.run(config)


def log(config):
    return [json.loads(line) for line in (Path(config.save_path) / "metrics.jsonl").read_text().splitlines()]


def test_logs_the_loss_of_each(whole):
    config, _ = whole
    for line in log(config):
        if "loss" in line:  # three samples, of which one is the smaller dataset's
            parts = [line["flow_loss/synthetic"], line["flow_loss/seven"]]
            assert line["flow_loss"] == pytest.approx((2 * parts[0] + parts[1]) / 3, rel=1e-4)
    (first, *_) = [line for line in log(config) if "val_loss" in line]
    assert min(first["val_flow_loss/synthetic"], first["val_flow_loss/seven"]) <= first["val_flow_loss"]
    assert max(first["val_flow_loss/synthetic"], first["val_flow_loss/seven"]) >= first["val_flow_loss"]


def test_resume_equals_the_uninterrupted_run(whole, model_dir, dataset_dir, small_dir, tmp_path):
    config, last = whole
    killed = tiny_run.killed_after(Path(config.save_path), 2, tmp_path / "run")
    half = configured(model_dir, dataset_dir, small_dir, killed, resume__ckpt="latest")
    a, b = (tree.flatten(restore_params(path)) for path in (last, wallx_jax.train.run(half)))
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    alone = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "run", resume__ckpt="latest")
    with pytest.raises(ConfigError, match="datasets are .*'synthetic'.* but the run .* has .*'seven'"):
        wallx_jax.train.run(alone)


def test_acting_says_which_robot(whole):
    _, last = whole
    with pytest.raises(ValueError, match=r"trained on several.*\['seven', 'synthetic'\]"):
        wallx_jax.load_policy(last)
    for robot, dims in (("synthetic", 14), ("seven", 7)):
        policy = wallx_jax.load_policy(last, robot=robot)
        actions = policy.predict({"images": IMAGES, "state": np.zeros(dims), "instruction": "open the cabinet"}).actions
        low, high = policy.processor.stats.action.q01, policy.processor.stats.action.q99
        assert actions.shape == (4, dims) and np.isfinite(actions).all() and len(low) == len(high) == dims


def test_evaluation_says_which_robot(whole):
    _, last = whole

    def subject(robot):
        return load_eval_target(argparse.Namespace(checkpoint=str(last), dataset=None, robot=robot, config=None))

    assert subject("seven").info.repo_id == "small" and subject("synthetic").info.repo_id == "synthetic"
    assert len(subject("seven").policy.processor.stats.action.q01) == 7
    with pytest.raises(ValueError, match=r"--robot None.*\['seven', 'synthetic'\]"):
        subject(None)


def test_pictures_must_have_one_size(model_dir, dataset_dir, small_dir, tmp_path):
    views = {"left_wrist_view": "cam_left_wrist"}
    datasets = {"seven": {"repo_id": str(small_dir), "camera_views": views}}
    config = configured(model_dir, dataset_dir, small_dir, tmp_path / "never", datasets=datasets)
    with pytest.raises(ConfigError, match="datasets.seven: its images come to 56x56 .* synthetic to 56x84, 56x56"):
        wallx_jax.train.run(config)
    assert not (tmp_path / "never").exists()
