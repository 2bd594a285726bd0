"""A robot put together from slices, some of its actions relative to its state: trained, judged, exported."""

import argparse
import dataclasses
import json
import logging

import numpy as np
import pytest
from helpers import synthetic, tiny_run

import wallx_jax
import wallx_jax.train
from wallx_jax.checkpoints.layout import find_checkpoints
from wallx_jax.checkpoints.to_pytorch import export_model
from wallx_jax.data.normalize import load_norm_stats, save_norm_stats
from wallx_jax.data.processor import Processor
from wallx_jax.evaluation import ablation, openloop
from wallx_jax.evaluation.target import load_eval_target
from wallx_jax.utils.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
HORIZON = 4
ROBOT = {
    "dof_config": {"gripper": "action[6:7]", "right": "action[7:14]"},
    "agent_pos_config": {"right": "observation.state[7:14]", "left": "observation.state[0:6]"},
    "relative_action_keys": ("right",),
    "predict_action_keys": ("right",),
}
RELATIVE_TO = (-1, *range(7))


@pytest.fixture(scope="module")
def run_dir(model_dir, dataset_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    wallx_jax.train.run(tiny_run.run_config(model_dir, dataset_dir, folder, num_training_steps=2, **ROBOT))
    return folder


@pytest.fixture(scope="module")
def subject(run_dir):
    return load_eval_target(argparse.Namespace(checkpoint=str(run_dir), dataset=None, robot=None, config=None))


def episode(number):
    states, actions = synthetic.episode_table(number)
    return np.concatenate([states[:, 7:14], states[:, :6]], axis=1), actions[:, 6:14]


def test_the_checkpoint_knows_where_its_dims_come_from(run_dir, subject):
    stored = json.loads((find_checkpoints(run_dir)[0] / "assets" / "processor.json").read_text())
    assert stored["action_key"] == "action[6:14]" and stored["relative_to"] == list(RELATIVE_TO)
    assert stored["state_key"] == "observation.state[7:14],observation.state[0:6]"
    assert subject.info.dim_names(subject.held_out.action_key) == [f"joint_{i}" for i in range(6, 14)]
    recorded = openloop.read(subject.held_out, stride=1)
    states, actions = episode(3)
    np.testing.assert_array_equal(recorded.observations[2]["state"], states[2])
    np.testing.assert_array_equal(recorded.actions[1], actions[1:5])


def test_what_was_trained_is_what_is_carried_out(subject, monkeypatch):
    """A model that says exactly what it was trained to gives the recorded actions back."""
    policy, recorded = subject.policy, openloop.read(subject.held_out, stride=1)
    assert policy.processor.names == tuple(f"joint_{dim}" for dim in range(7, 14)), "nothing trains the gripper"
    samples = [
        policy.processor.encode(list(o["images"].values()), o["state"], o["instruction"], actions)
        for o, actions in zip(recorded.observations, recorded.actions, strict=True)
    ]
    limits = np.abs(np.stack([sample.actions for sample in samples])).max(axis=(0, 1))[1:8] < 1
    monkeypatch.setattr(policy, "_flow", lambda static, params, batch, noise: noise)
    said = policy.predict(recorded.observations, noise=np.stack([sample.actions for sample in samples])).actions
    assert limits.sum() > 2, "held-out actions within the quantiles"
    np.testing.assert_allclose(said[..., limits], recorded.actions[..., 1:][..., limits], atol=1e-5)


def test_judged_in_robot_units(subject):
    recorded, processor = openloop.read(subject.held_out, stride=1), subject.policy.processor
    found = openloop.baselines(recorded, processor)
    states, _ = episode(3)
    for step in range(HORIZON):
        np.testing.assert_allclose(found["hold_still"][:, step, 1:], states[:, :7])
        np.testing.assert_allclose(found["mean_action"][:, step, 1:], states[:, :7] + processor.stats.action.mean[1:])
    seen = ablation.changes(recorded, processor, subject.info.tasks)["state zeroed"](recorded.observations)
    chunks = openloop.predict(subject.policy, seen, steps=1)
    moved = ablation.from_true_states(chunks, seen, recorded, processor)
    zeroed = seen[0]["state"]
    np.testing.assert_allclose(moved[:, 0, 1:] - chunks[:, 0, 1:], states[:, :7] - zeroed[:7], atol=1e-5)
    assert np.isnan(moved[..., 0]).all(), "the gripper, which nothing trains, has no state of its name"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"relative_action_keys": ()}, r"relative_action_keys .* = \{\}, but the run of resume.ckpt has \{1: 0, "),
        (
            {"dof_config": {"gripper": "action[6:7]", "right": "action[7:13]"}},
            "6 dims in dof_config and 7 in agent_pos_config",
        ),
        ({"dof_config": {"right": "action[7:14]", "gripper": "action[6:7]"}}, r"= 'action\[7:14\],action\[6:7\]', but"),
    ],
)
def test_another_robot_cannot_resume(run_dir, model_dir, dataset_dir, changes, match):
    config = tiny_run.run_config(model_dir, dataset_dir, run_dir, resume__ckpt="latest", **ROBOT | changes)
    with pytest.raises(ConfigError, match=match):
        wallx_jax.train.run(config)


def test_statistics_on_file_must_be_of_the_same_differences(model_dir, dataset_dir, tmp_path, caplog):
    def dry_run(**changes):
        wallx_jax.train.run(tiny_run.run_config(model_dir, dataset_dir, tmp_path / "never", **ROBOT | changes), True)

    with caplog.at_level(logging.INFO):
        dry_run()
    (line,) = [record.getMessage() for record in caplog.records if "compute_norm_stats" in record.getMessage()]
    assert "state (13 dims of observation.state[7:14],observation.state[0:6])" in line and "26 frames in 0." in line
    assert "action (8 dims of action[6:14], right relative to the state over 4 steps)" in line
    plain = tmp_path / "plain.json"
    stats = wallx_jax.compute_stats(
        dataset_dir, "observation.state[7:14],observation.state[0:6]", "action[6:14]", None, RELATIVE_TO, HORIZON
    )
    save_norm_stats(tmp_path / "relative.json", stats)
    save_norm_stats(plain, dataclasses.replace(stats, relative_to=(), horizon=None))
    caplog.clear()
    dry_run(norm_stats_path=str(tmp_path / "relative.json"))
    assert "compute_norm_stats" not in caplog.text
    for changes, match in (
        ({"norm_stats_path": str(plain)}, "plain.json: the statistics are for absolute actions.*compute_norm_stats.py"),
        (
            {"norm_stats_path": str(tmp_path / "relative.json"), "relative_action_keys": ()},
            "relative.json: .*expected statistics for absolute actions",
        ),
        (
            {"norm_stats_path": str(tmp_path / "relative.json"), "action_horizon": 5},
            "over 4 steps; expected statistics .* over 5 steps",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            dry_run(**changes)


def test_export_says_that_the_state_must_be_added(run_dir, subject, tmp_path):
    with pytest.warns(UserWarning, match="differences from the state .* upstream's loader and lerobot's do not"):
        exported = export_model(run_dir, tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text())["wallx_jax"]["relative_actions"] is True
    read = load_norm_stats(exported)
    assert (read.relative_to, read.horizon) == (RELATIVE_TO, HORIZON)
    assert Processor.from_dir(exported).config == subject.policy.processor.config
    observation = openloop.read(subject.held_out, stride=1).observations[1]
    ours, theirs = (policy.predict(observation) for policy in (subject.policy, wallx_jax.load_policy(exported)))
    np.testing.assert_array_equal(ours.actions, theirs.actions)
