"""A converted checkpoint serves wherever the model directory does: training, acting, asking; and a run exports."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import tiny_run

import wallx_jax
import wallx_jax.train
from wallx_jax.checkpoints.compare import compare
from wallx_jax.checkpoints.from_pytorch import convert_model
from wallx_jax.checkpoints.layout import CheckpointError
from wallx_jax.checkpoints.to_pytorch import export_model
from wallx_jax.config import resolve
from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.data.processor import Processor
from wallx_jax.training import init, sharding
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.utils import tree
from wallx_jax.weights.load import load_params

DIMS = 7
OBSERVATION = {
    "images": {view: np.full((60, 90, 3), 90, np.uint8) for view in ("face_view", "left_wrist_view")},
    "state": np.linspace(-1, 1, DIMS),
    "instruction": "open the cabinet",
}


def robot() -> dict:
    views = tuple(OBSERVATION["images"])
    return {"norm_stats": tiny_run.unit_stats(DIMS), "views": views, "resolution": 84, "horizon": 4}


@pytest.fixture(scope="module", params=["wallx", "qwen"])
def pair(request, tmp_path_factory):
    """(model directory, its conversion, whether it acts)."""
    folder, acts = tmp_path_factory.mktemp("pair"), request.param == "wallx"
    model = tiny_run.write_model(folder / "model", qwen=not acts)
    return model, convert_model(model, folder / "checkpoint", has_action_head=acts), acts


@pytest.mark.medium
def test_acts_and_answers_as_its_origin(pair):
    model, checkpoint, acts = pair
    answers = [wallx_jax.load_vlm(path).ask("what is it?", max_tokens=4).tokens for path in (model, checkpoint)]
    assert answers[0] == answers[1]
    if acts:
        ours, theirs = (wallx_jax.load_policy(path, **robot()).predict(OBSERVATION) for path in (checkpoint, model))
        np.testing.assert_array_equal(ours.actions, theirs.actions)
        with pytest.raises(ValueError, match="whose actions.*it has: none"):
            wallx_jax.load_policy(checkpoint)


@pytest.mark.parametrize("wider", [False, True])
def test_training_starts_from_it_as_from_its_origin(pair, dataset_dir, tmp_path, wider):
    """Also where the vocabulary shrinks and the action side is fresh (Qwen), or the robot is wider."""
    states = []
    for path in pair[:2]:
        config = tiny_run.run_config(path, dataset_dir, tmp_path)
        settings = resolve(config)
        optimizer = make_optimizer(settings.optim, 4)
        origin = init.find(settings, 33 if wider else 14, 31 if wider else 14, None)
        mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
        if wider and pair[2]:
            with pytest.warns(UserWarning, match="the robot has 31 action and 33 state channels"):
                states.append(init.load_state(origin, optimizer, mesh, settings.loop.seed))
        else:
            states.append(init.load_state(origin, optimizer, mesh, settings.loop.seed))
    theirs, ours = (tree.flatten(state.params) for state in states)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_converted_model_is_no_run(pair, dataset_dir, tmp_path):
    config = tiny_run.run_config(pair[0], dataset_dir, tmp_path / "run", mesh__fsdp=-1, resume__ckpt=str(pair[1]))
    with pytest.raises(CheckpointError, match="is a converted model, no run.*pretrained_wallx_path="):
        wallx_jax.train.run(config)


@pytest.mark.medium
@pytest.mark.parametrize("words", [PromptTemplate(), PromptTemplate("Act.", {"face_view": "head"})])
def test_the_prompt_travels_beside_the_numerics(wallx_dir, tmp_path, words):
    """Where it is Wall-X's own nothing is said of it: that is what PyTorch's loaders build."""
    model = shutil.copytree(wallx_dir, tmp_path / "model")
    processor = wallx_jax.load_policy(model, **robot()).processor
    layout = dataclasses.replace(processor.config, prompt=words)
    Processor(layout, processor.tokenizer, processor.stats).save(model)
    checkpoint = convert_model(model, tmp_path / "checkpoint", has_action_head=True)
    own = words != PromptTemplate()
    with pytest.warns(UserWarning, match="a prompt of its own") if own else contextlib.nullcontext():
        exported = export_model(checkpoint, tmp_path / "exported")
    numerics = json.loads((exported / "config.json").read_text())["wallx_jax"]
    assert PromptTemplate(**numerics.get("prompt", {})) == words and ("prompt" in numerics) == own
    assert numerics["action_attention"] == load_params(exported)[0].numerics.action_attention
    assert wallx_jax.load_policy(exported).processor.config.prompt == words
    export_model(checkpoint, tmp_path / "vlm", layout="qwen2_5_vl")  # which has no use for it


@pytest.mark.slow
def test_a_run_exports_and_its_export_acts_alike(wallx_dir, dataset_dir, tmp_path):
    checkpoint = convert_model(wallx_dir, tmp_path / "checkpoint", has_action_head=True)
    run = tmp_path / "run"
    wallx_jax.train.run(
        tiny_run.run_config(checkpoint, dataset_dir, run, num_training_steps=2, eval_interval=0, mesh__fsdp=-1)
    )
    exported = export_model(run, tmp_path / "exported")
    assert compare(run, exported).identical
    assert len(compare(wallx_dir, exported).values) > 50, "training changed nothing"
    observation = OBSERVATION | {"state": np.zeros(14)}
    ours, theirs = (wallx_jax.load_policy(path).predict(observation).actions for path in (run, exported))
    np.testing.assert_array_equal(ours, theirs)
    config = load_params(exported)[0]
    assert dataclasses.asdict(config.numerics)["compute_dtype"] == "float32", "the run's numerics travel"
