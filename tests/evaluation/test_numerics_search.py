"""The combination that data were made with is found, and recorded where the next user reads it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallx_jax.checkpoints.layout import find_checkpoints, read_model_config
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.normalize import NormStats
from wallx_jax.data.pipeline import eval_batches
from wallx_jax.data.processor import Processor, ProcessorConfig, required_prompt_length
from wallx_jax.data.stats import compute_stats
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.evaluation import numerics_search, openloop
from wallx_jax.evaluation.numerics_search import COMBINATIONS, Measurement
from wallx_jax.inference.policy import Policy
from wallx_jax.models import flow
from wallx_jax.models.params import from_params
from wallx_jax.models.scan import unstack_layers
from wallx_jax.training.step import EVAL_SEED, frame_noise_and_time
from wallx_jax.weights.load import load_params, read_config

VIEWS, SIZES = ("face_view", "left_wrist_view"), ((56, 84), (56, 56))


@pytest.fixture(scope="module")
def policy(wallx_dir, dataset_info):
    tokenizer = Tokenizer.from_dir(wallx_dir)
    length = required_prompt_length(tokenizer, list(dataset_info.tasks.values()), VIEWS, (6, 4))
    layout = ProcessorConfig(VIEWS, dataset_info.camera_keys, (84, -1), SIZES, 4, length)
    config, params = load_params(wallx_dir)
    # Larger than at the start of training, so that attention and positions matter.
    params = unstack_layers(jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params))
    stats: NormStats = compute_stats(dataset_info)
    config = config.replace(tokens=dataclasses.asdict(tokenizer.token_ids()))
    return Policy(config, params, Processor(layout, tokenizer, stats))


@pytest.fixture(scope="module")
def source(dataset_info):
    return LeRobotSource(dataset_info, 4, dataset_info.camera_keys)


def made_under(numerics, policy, batches):
    """The same batches with actions that this model predicts without error under these numerics.

    For each sample's noise n and time t the actions a are solved from a = n + v((1 - t) n + t a).
    """
    config, made = policy.config.replace(numerics=numerics), []

    @jax.jit
    def improve(batch, actions, noise, time):
        net = from_params(config, policy.params)
        x = flow.interpolate(actions, noise, time)
        hidden = net.forward(net.embed_batch(batch), (x, batch.action_mask, time)).hidden
        return noise + 0.5 * (actions - noise) + 0.5 * net.action.velocity(hidden[:, -noise.shape[1] :])

    for held_out in batches:
        noise, time = frame_noise_and_time(held_out, config, EVAL_SEED)
        actions = noise
        for _ in range(60):
            actions = improve(held_out.batch, actions, noise, time)
        batch = dataclasses.replace(held_out.batch, actions=np.asarray(actions))
        made.append(dataclasses.replace(held_out, batch=batch))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("truth", COMBINATIONS, ids=lambda c: "-".join(c.values()))
def test_finds_what_the_data_were_made_with(policy, source, truth):
    batches = made_under(truth, policy, list(eval_batches(source, policy.processor, 4, limit=16)))
    recorded = openloop.read(source, stride=1, limit=2)
    found = numerics_search.measure(policy, batches, recorded, steps=2)
    decision = numerics_search.decide(found)
    assert decision.best.numerics == truth and not decision.rivals
    losses = {json.dumps(m.numerics): m.flow_losses.mean() for m in found}
    right = losses.pop(json.dumps(truth))
    assert right < 1e-3 * min(losses.values())
    assert "fits" in decision.sentence() and numerics_search.table(found).count("\n") == 4
    assert all(m.as_json()["open_loop_mae"] > 0 and m.as_json()["cross_entropy_loss"] is None for m in found)


def measured(losses: list[float], combination: int, speaks: bool = False) -> Measurement:
    loss, none = np.array(losses), np.full(len(losses), np.nan)
    return Measurement(COMBINATIONS[combination], none if speaks else loss, loss if speaks else none, 0.1)


def test_decides_only_by_what_batches_agree_on():
    base = np.array([1.0, 5.0, 2.0, 9.0])
    clear = [measured(base + shift, i) for i, shift in enumerate((0.1, 0.0, 0.2, 0.3))]
    assert numerics_search.decide(clear).best is clear[1] and not numerics_search.decide(clear).rivals
    noise = np.array([0.5, -0.5, 0.4, -0.38])
    close = [measured(base, 0), measured(base + noise + 0.01, 1), measured(base + 1, 2)]
    decision = numerics_search.decide(close)
    assert decision.best is close[0] and decision.rivals == [close[1]]
    assert decision.sentence().startswith("undecided")
    alone = numerics_search.decide([measured([1.0], 0), measured([2.0], 1)])
    assert alone.rivals, "one batch decides nothing"
    said = [measured([2.0, 2.1], 0, speaks=True), measured([1.0, 1.1], 1, speaks=True)]
    assert numerics_search.decide(said).best is said[1]
    equal = numerics_search.decide([measured(base, 0), measured(base, 1)])
    assert len(equal.rivals) == 1, "what makes no difference is not decided"


@pytest.mark.medium
def test_recorded_numerics_are_what_the_next_user_reads(wallx_dir, run_dir, tmp_path):
    other = {"mrope_layout": "upstream_cuda", "action_attention": "causal"}
    folder = tmp_path / "model"
    shutil.copytree(wallx_dir, folder)
    assert numerics_search.write_numerics(folder, other) == folder / "config.json"
    numerics = read_config(folder).numerics
    assert (numerics.mrope_layout, numerics.action_attention) == ("upstream_cuda", "causal")
    assert dataclasses.replace(numerics, **COMBINATIONS[0]) == read_config(wallx_dir).numerics

    step = tmp_path / "step"
    shutil.copytree(find_checkpoints(run_dir)[0], step)
    numerics_search.write_numerics(step, other)
    assert read_model_config(step).numerics.mrope_layout == "upstream_cuda"
    assert not [file for file in (step / "metadata").iterdir() if file.name.endswith(".tmp")]


def test_the_cache_of_the_hub_is_left_alone(wallx_dir, tmp_path):
    (tmp_path / "blob").write_bytes((wallx_dir / "config.json").read_bytes())
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to(tmp_path / "blob")
    with pytest.raises(ValueError, match="link into the shared Hub cache; copy the directory"):
        numerics_search.write_numerics(tmp_path / "snapshot", COMBINATIONS[0])


@pytest.mark.medium
def test_losses_are_those_of_the_model_under_each_combination(policy, source):
    """Against a direct computation of one batch's flow loss."""
    (held_out,) = eval_batches(source, policy.processor, 2, limit=2)
    batch = held_out.batch
    found = numerics_search.measure(policy, [held_out], openloop.read(source, stride=1, limit=1), steps=1)
    for m in found:
        config = policy.config.replace(numerics=m.numerics)
        noise, time = frame_noise_and_time(held_out, config, EVAL_SEED)
        net = from_params(config, policy.params)
        x = flow.interpolate(jnp.asarray(batch.actions), noise, time)
        hidden = net.forward(net.embed_batch(batch), (x, batch.action_mask, time)).hidden[:, -4:]
        error = (net.action.velocity(hidden) - (batch.actions - noise)) ** 2 * batch.action_mask
        assert m.flow_losses[0] == pytest.approx(float(error.mean()), rel=1e-4)
