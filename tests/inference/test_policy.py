"""Acting with a Wall-X directory: pictures of any size in, chunks in robot units out, errors that name the field."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import tiny_run
from PIL import Image

import wallx_jax
from wallx_jax.checkpoints.checkpointer import Checkpointer
from wallx_jax.checkpoints.layout import CheckpointError
from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.data.fast import FastDecodeError, FastTokenizer
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.normalize import NormStats, Stats, save_norm_stats
from wallx_jax.data.pipeline import Encode
from wallx_jax.data.processor import PROMPT_STEP, Processor
from wallx_jax.data.stats import compute_stats
from wallx_jax.inference.load import load_model
from wallx_jax.inference.policy import ActionDecodeError, ActionNotFiniteError, Policy
from wallx_jax.inference.sampler import LogitsError
from wallx_jax.models import scan
from wallx_jax.models.params import abstract_params
from wallx_jax.utils import tree
from wallx_jax.weights.safetensors_io import WeightsError, write_safetensors

DIMS, HORIZON, VIEWS = 7, 5, ("face_view", "left_wrist_view")
FLOAT32 = {"param_dtype": "float32", "compute_dtype": "float32"}


def robot_stats(dims: int = DIMS) -> NormStats:
    rng = np.random.default_rng(4)

    def part():
        low, high = rng.uniform(-2, -1, dims), rng.uniform(1, 2, dims)
        return Stats((low + high) / 2, high - low, low, high, low, high)

    return NormStats(part(), part(), "observation.state", "action")


def observation(height: int = 60, width: int = 90, seed: int = 0, **changes) -> dict:
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (height, width, 3), np.uint8) for view in VIEWS}
    return {"images": images, "state": rng.uniform(-1, 1, DIMS), "instruction": "open the cabinet"} | changes


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def policy(model_dir):
    return wallx_jax.load_policy(
        model_dir, norm_stats=robot_stats(), views=VIEWS, resolution=84, horizon=HORIZON, numerics=FLOAT32
    )


@pytest.fixture(scope="module")
def fast_dir(tmp_path_factory):
    """A FAST tokenizer for this robot."""
    chunks = np.random.default_rng(0).uniform(-1, 1, (64, HORIZON, DIMS))
    folder = tmp_path_factory.mktemp("fast")
    FastTokenizer.fit(chunks, vocab_size=400).save(folder)
    return folder


@pytest.fixture(scope="module")
def fast_policy(model_dir, fast_dir, tmp_path_factory):
    """A policy that says its actions; its weights are random, so what it says is no chunk."""
    folder = tmp_path_factory.mktemp("model") / "fast"
    size = FastTokenizer.from_dir(fast_dir).vocab_size
    tokenizer = tiny_run.write_tokenizer(folder)
    tokenizer = tokenizer.with_wallx_tokens(size)
    tiny_run.write_model(folder, vocab_size=len(tokenizer))
    tokenizer.save(folder)
    return wallx_jax.load_policy(
        folder, norm_stats=robot_stats(), views=VIEWS, horizon=HORIZON, action_tokenizer=fast_dir, numerics=FLOAT32
    )


@pytest.mark.medium
def test_chunk_in_robot_units(policy):
    prediction = policy.predict(observation())
    assert prediction.actions.shape == (HORIZON, DIMS) and prediction.actions.dtype == np.float32
    assert np.isfinite(prediction.actions).all() and prediction.subtask is None
    assert set(prediction.timings_ms) == {"preprocess", "model", "total"}
    assert prediction.timings_ms["total"] >= prediction.timings_ms["model"] > 0
    stats = policy.processor.stats.action
    middle, half = (stats.q01 + stats.q99) / 2, (stats.q99 - stats.q01) / 2
    noise = np.zeros((1, HORIZON, policy.processor.config.action_dim), np.float32)
    started_at_zero = policy.predict(observation(), noise=noise).actions
    assert np.abs((started_at_zero - middle) / half).max() < 3  # a tiny random velocity moves it little


def test_seed_decides(policy):
    first, again, other = (policy.predict(observation(), seed=seed).actions for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("seeds", [5, [3, 3, 1, 2**40], np.arange(4), range(4)], ids=["one", "list", "array", "range"])
def test_batch_gives_each_what_it_gets_alone(policy, seeds):
    """Whatever its place in the list; also with pictures of different sizes, which run as groups."""
    observations = [observation(), observation(120, 60, seed=1), observation(seed=2), observation(120, 60, seed=3)]
    together = policy.predict(observations, seed=seeds).actions
    assert together.shape == (4, HORIZON, DIMS)
    own = [seeds] * 4 if isinstance(seeds, int) else list(seeds)
    for row, (each, seed) in enumerate(zip(observations, own, strict=True)):
        np.testing.assert_allclose(together[row], policy.predict(each, seed=seed).actions, atol=1e-5)
    twice = policy.predict([observations[1]] * 2, seed=own[:2]).actions
    assert (np.abs(twice[0] - twice[1]).max() < 1e-5) == (own[0] == own[1])


def test_noise_of_ones_own(policy):
    observations = [observation(), observation(120, 60, seed=1), observation(seed=2), observation(120, 60, seed=3)]
    shape = (4, HORIZON, policy.processor.config.action_dim)
    noise = np.random.default_rng(0).normal(size=shape)
    together = policy.predict(observations, noise=noise).actions
    for row, each in enumerate(observations):
        alone = policy.predict(each, noise=noise[row : row + 1]).actions
        np.testing.assert_allclose(together[row], alone, atol=1e-5)


@pytest.mark.parametrize("size", [(480, 640), (60, 90), (720, 1280), (33, 500), (90, 60)])
def test_pictures_of_any_size_are_resized_by_the_rule_of_training(policy, size):
    sample = policy.encode(observation(*size))
    expected = wallx_jax.data.images.target_size(*size, 84)
    assert [image.shape for image in sample.images] == [(*expected, 3)] * 2
    tokens = (sample.tokens == policy.config.tokens.image).sum()
    assert tokens == 2 * wallx_jax.data.images.image_token_count(*expected)
    assert policy.predict(observation(*size)).actions.shape == (HORIZON, DIMS)


def test_pillow_pictures_are_those_of_arrays(policy):
    arrays = observation()
    pillow = arrays | {"images": {view: Image.fromarray(image) for view, image in arrays["images"].items()}}
    np.testing.assert_array_equal(policy.predict(arrays).actions, policy.predict(pillow).actions)


def test_longer_words_than_in_training_get_more_room_and_padding_changes_nothing(policy):
    wordy = observation(instruction="open the cabinet " * 20)
    sample = policy.encode(wordy)
    assert len(sample.tokens) % PROMPT_STEP == 0 and sample.token_mask.all() < len(sample.tokens)
    assert np.isfinite(policy.predict(wordy).actions).all()
    short = observation()
    roomy = dataclasses.replace(policy.processor.config, prompt_length=policy.processor.config.prompt_length + 64)
    other = Policy(policy.config, policy.params, Processor(roomy, policy.processor.tokenizer, policy.processor.stats))
    np.testing.assert_allclose(policy.predict(short).actions, other.predict(short).actions, atol=1e-5)


def test_one_compilation_per_shape(policy):
    policy.predict(observation(), steps=3)
    before = policy.compilations
    for seed in range(3):
        policy.predict(observation(seed=seed, instruction="pick up the red block"), steps=3, seed=seed)
        policy.predict(observation(61, 91, seed=seed), steps=3)  # becomes the same size
    assert policy.compilations == before
    policy.predict(observation(200, 60), steps=3)
    assert policy.compilations == before + 1


@pytest.mark.parametrize(
    "words",
    [
        PromptTemplate(),
        PromptTemplate("Act.", {"face_view": "head"}, "{image}{view}", "{images}{instruction}{proprioception}"),
    ],
)
def test_a_dataset_sample_reaches_the_model_as_in_training(dataset_info, model_dir, tmp_path, words):
    """Training and acting share their preprocessing, through a checkpoint too: every input of the model is the same
    array."""
    stats = compute_stats(dataset_info)
    policy = wallx_jax.load_policy(model_dir, norm_stats=stats, views=VIEWS, resolution=84, horizon=4)
    layout, keys = policy.processor.config, dataset_info.camera_keys
    # As training sets it up: for the dataset's frames and its longest instruction.
    sizes = tuple(wallx_jax.data.images.target_size(*dataset_info.frame_size(key), 84) for key in keys)
    layout = dataclasses.replace(layout, camera_keys=tuple(keys), image_sizes=sizes, prompt_length=80, prompt=words)
    processor = Processor(layout, policy.processor.tokenizer, stats)
    processor.save(tmp_path)
    raw = LeRobotSource(dataset_info, 4, keys)[9]
    trained = Encode(processor)(raw)
    acted = Policy(policy.config, policy.params, Processor.from_dir(tmp_path)).encode(
        {
            "images": dict(zip(keys, raw.images, strict=True)),
            "state": raw.state,
            "instruction": raw.instruction,
        }
    )
    for name in ("tokens", "token_mask", "labels", "state", "state_mask", "action_mask"):
        a, b = getattr(trained, name), getattr(acted, name)
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype
    for a, b in zip(trained.images, acted.images, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not acted.actions.any()


def test_wrong_observations_name_the_field_and_leave_the_policy_usable(policy):
    right = observation()
    expected = policy.predict(right).actions
    images, state = right["images"], right["state"]
    pixel, floats = np.zeros((1, 1, 3), np.uint8), images["face_view"].astype(np.float32)
    nan = state.copy()
    nan[3] = np.nan
    for changes, message in (
        ({"images": {"face_view": images["face_view"]}}, "camera 'left_wrist_view'.* is missing"),
        ({"images": list(images.values())}, "images: list; expected a dict"),
        ({"images": images | {"face_view": images["face_view"].transpose(2, 0, 1)}}, "face_view: .*channels come last"),
        ({"images": images | {"face_view": floats}}, "face_view: dtype float32"),
        ({"images": images | {"face_view": images["face_view"][..., :1]}}, "face_view: shape"),
        ({"images": images | {"left_wrist_view": pixel}}, "left_wrist_view: an image of 1x1"),
        ({"images": images | {"left_wrist_view": None}}, "left_wrist_view: NoneType"),
        ({"state": nan}, r"state is not finite at dims \[3\]"),
        ({"state": state[:-1]}, r"state has shape \(6,\); expected \(7,\)"),
        ({"state": state[None]}, r"state has shape \(1, 7\)"),
        ({"instruction": ""}, "instruction is ''"),
        ({"instruction": "  "}, "instruction is '  '"),
        ({"instruction": None}, "instruction is None"),
        ({"instruction": "open <|im_end|>"}, r"instruction .* contains control tokens: <\|im_end\|>"),
        ({"instruction": "lift \ud83d"}, "instruction .* contains half of a surrogate pair"),
        ({"state": {"shoulder": 0.0}}, "state is {'shoulder': 0.0}; expected an array of numbers"),
        ({"state": ["a"] * DIMS}, "state is .*; expected an array of numbers"),
        ({"state": [[0, 1], [2]]}, "state is .*; expected an array of numbers"),
        ({"state": state * np.inf}, r"state is not finite at dims \[0, 1, 2, 3, 4, 5, 6\]"),
        (
            {"images": {0: pixel, "face_view": pixel}},
            r"camera 'left_wrist_view'.* is missing; there are \[0, 'face_view'\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            policy.predict(right | changes)
        with pytest.raises(ValueError, match=f"observation 1: .*{message}"):
            policy.predict([right, right | changes])
    for name in ("images", "state", "instruction"):
        with pytest.raises(ValueError, match=rf"the observation has no '{name}'; it has \[.*1\]"):
            policy.predict({key: value for key, value in right.items() if key != name} | {1: 2})
    for wrong in (None, 7, "lift the cup"):
        for call in (policy.predict, policy.subtask):
            with pytest.raises(ValueError, match="the observation is a .*; expected a dict, or a list"):
                call(wrong)
        with pytest.raises(ValueError, match="observation 1: the observation is a .*; expected a dict"):
            policy.predict([right, wrong])
    with pytest.raises(ValueError, match="no observation"):
        policy.predict([])
    np.testing.assert_array_equal(policy.predict(right).actions, expected)


NOISE = np.zeros((1, HORIZON, 20))


@pytest.mark.parametrize(
    ("setting", "values", "message"),
    [
        ("steps", (0, -1, None, "10", 1.5, [3]), "steps is .*; give an integer, at least 1"),
        ("seed", (None, 1.5, "1", -1, [0.5], ["a"]), "seed is .*; give an integer, at least 0"),
        ("seed", ([], [1, 2], range(3), np.zeros((2, 1), int)), "seed has . entries; give one for all"),
        ("max_tokens", (0, -5, "9", 2.5), "max_tokens is .*; give an integer, at least 1"),
        ("temperature", (-1, None, "hot", np.nan, np.inf, 1e300), "temperature is .*; give 0"),
        ("noise", (np.zeros((1, 2)), NOISE[0], 0.0), "noise has shape"),
        ("noise", (["a"], [[1], [2, 3]], {"noise": 1}), "noise is .*; expected an array of numbers"),
        ("noise", (NOISE + np.nan, NOISE + np.inf, NOISE + 1e300), r"noise is not finite for observations \[0\]"),
    ],
)
def test_wrong_settings_are_named(policy, setting, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message):
            policy.predict(observation(), **{setting: value})


def test_numbers_of_numpy_are_numbers(policy):
    expected = policy.predict(observation(), steps=2, seed=3).actions
    settings = {"steps": np.int64(2), "seed": np.uint8(3), "temperature": np.float32(0), "max_tokens": np.int32(4)}
    np.testing.assert_array_equal(policy.predict(observation(), **settings).actions, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_never_reaches_a_robot(policy, monkeypatch, bad):
    """Also what is finite until it is in robot units."""
    flow, stats = policy._flow, policy.processor.stats
    wide = dataclasses.replace(stats.action, q01=stats.action.q01 * 1e3, q99=stats.action.q99 * 1e3)
    names = tuple(f"joint_{dim}" for dim in range(DIMS))
    layout = dataclasses.replace(policy.processor.config, action_names=names)
    processor = Processor(layout, policy.processor.tokenizer, dataclasses.replace(stats, action=wide))
    monkeypatch.setattr(policy, "processor", processor)
    observations = [observation(), observation(120, 60, seed=1), observation(seed=2)]
    right = policy.predict(observations).actions

    def spoil(options, params, batch, noise):
        chunk = np.array(flow(options, params, batch, noise))
        if len(chunk) == 2:  # observations 0 and 2, which share their picture size
            chunk[1, 3, [2, 5]] = bad
        return chunk

    monkeypatch.setattr(policy, "_flow", spoil)
    with pytest.raises(
        ActionNotFiniteError, match="observation 2: the actions are not finite at dims joint_2, joint_5:"
    ) as e:
        policy.predict(observations)
    assert set(e.value.failures) == {2} and np.isnan(e.value.actions[2]).all()
    np.testing.assert_array_equal(e.value.actions[:2], right[:2])


@pytest.mark.medium
def test_weights_that_went_bad(policy, fast_policy):
    """In memory, where nobody looked when they were loaded: flow, FAST and words."""
    for acts in (policy, fast_policy):
        flat = tree.flatten(acts.params)
        flat["decoder/layers/1/attn/o/kernel"] = jax.numpy.full_like(flat["decoder/layers/1/attn/o/kernel"], np.nan)
        bad = Policy(acts.config, tree.unflatten(flat), acts.processor)
        kind, message = (ActionNotFiniteError, "") if acts is policy else (ActionDecodeError, "logits are ")
        with pytest.raises(kind, match=f"{message}not finite"):
            bad.predict(observation(), steps=1)
        with pytest.raises(kind, match=f"observation 0: .*{message}not finite.*; observation 1: "):
            bad.predict([observation()] * 2, steps=1)
        with pytest.raises(LogitsError, match="observation 0: the model's logits are not finite"):
            bad.subtask([observation()] * 2, max_tokens=2)


def test_a_checkpoint_with_weights_that_went_bad_is_refused(policy, tmp_path):
    """When it is opened, with the paths of the parameters."""
    flat = tree.flatten(scan.restack_like(policy.params, abstract_params(policy.config)))
    flat["action/w2/kernel"] = flat["action/w2/kernel"].at[1, 2].set(np.nan)
    flat["decoder/layers/attn/q/bias"] = flat["decoder/layers/attn/q/bias"].at[1, 0].set(np.inf)
    policy.processor.save(tmp_path / "assets")
    with Checkpointer(tmp_path / "run") as checkpointer:
        state = {"params": tree.unflatten(flat), "step": jax.numpy.zeros((), int)}
        checkpointer.save(3, state, None, {}, policy.config, tmp_path / "assets")
    for load in (wallx_jax.load_policy, wallx_jax.load_vlm):
        with pytest.raises(
            CheckpointError, match="3: NaN or infinity in action/w2/kernel, decoder/layers/attn/q/bias: "
        ):
            load(tmp_path / "run")


def partly_trained(policy) -> Policy:
    """A policy of which nothing trains dims 2 and 5; the state has the name of dim 2 at place 4."""
    layout = dataclasses.replace(
        policy.processor.config,
        predicted=tuple(dim not in (2, 5) for dim in range(DIMS)),
        action_names=tuple(f"joint_{dim}.pos" for dim in range(DIMS)),
        state_names=tuple("joint_2.pos" if dim == 4 else f"measured_{dim}" for dim in range(DIMS)),
    )
    return Policy(policy.config, policy.params, Processor(layout, policy.processor.tokenizer, policy.processor.stats))


def test_a_prediction_names_its_dims(policy):
    assert policy.predict(observation()).names == tuple(map(str, range(DIMS)))
    observations = [observation(), observation(120, 60, seed=1)]
    acts = partly_trained(policy)
    chunks = acts.predict(observations, seed=4)
    assert chunks.names == tuple(f"joint_{dim}.pos" for dim in (0, 1, 2, 3, 4, 6))
    assert chunks.actions.shape == (2, HORIZON, 6) and acts.predict(observations[0]).names == chunks.names
    held = np.stack([each["state"][4] for each in observations]).astype(np.float32)
    np.testing.assert_array_equal(chunks.actions[..., 2], np.tile(held[:, None], HORIZON))
    other = acts.predict(observations, seed=5).actions
    moves = np.abs(other - chunks.actions).max(axis=(0, 1)) > 1e-3
    assert moves.tolist() == [True, True, False, True, True, True], "what nothing trains does not hang on the noise"


def test_a_view_that_kept_its_size_in_training(policy):
    """A camera of another size: what the model sees has the trained one, in one program."""
    layout = dataclasses.replace(policy.processor.config, resolutions=(84, -1), image_sizes=((56, 84), (84, 56)))
    acts = Policy(policy.config, policy.params, Processor(layout, policy.processor.tokenizer, policy.processor.stats))
    for size in ((84, 56), (480, 640), (60, 60)):
        seen = observation()
        seen["images"]["left_wrist_view"] = observation(*size)["images"]["left_wrist_view"]
        assert acts.encode(seen).images[1].shape == (84, 56, 3)
        assert np.isfinite(acts.predict(seen, steps=1).actions).all()
    assert acts.compilations == 1


def test_a_model_directory_does_not_know_the_size_of_its_pictures(model_dir):
    with pytest.raises(ValueError, match="resolution is -1: .*give the pixels of their longer side"):
        wallx_jax.load_policy(model_dir, norm_stats=robot_stats(), views=VIEWS, resolution=-1)


def test_acts_on_the_subtask_it_has_set_itself(policy, monkeypatch):
    tokenizer, ids = policy.processor.tokenizer, policy.config.tokens
    said = [*tokenizer.encode("pick up the red block\n"), ids.eos, ids.pad]
    asked = []

    def say(batch, budget, temperature, seeds):
        asked.append(tokenizer.decode(batch.tokens[0]))
        return np.array([said] * len(batch.tokens))

    monkeypatch.setattr(type(policy._sampler), "__call__", lambda self, *inputs: say(*inputs))
    prediction = policy.predict(observation(), subtask=True)
    assert prediction.subtask == "pick up the red block" and "subtask" in prediction.timings_ms
    assert "Predict the next action in language." in asked[0] and "<|propri|>" not in asked[0]
    direct = policy.predict(observation(instruction="pick up the red block")).actions
    np.testing.assert_array_equal(prediction.actions, direct)
    assert policy.predict([observation()] * 2, subtask=True).subtask == ["pick up the red block"] * 2
    said[:] = [ids.eos]
    with pytest.raises(ValueError, match="the model generated nothing"):
        policy.subtask(observation())
    said[:] = [5, 5]
    with pytest.raises(ValueError, match="no end within 3 tokens"):
        policy.subtask(observation(), max_tokens=3)


def test_subtask_without_an_end_is_an_error(policy):
    with pytest.raises(ValueError, match="no end within 6 tokens"):
        policy.subtask(observation(), max_tokens=6)


def test_fast_policy_says_its_actions(fast_policy, monkeypatch):
    processor, ids = fast_policy.processor, fast_policy.config.tokens
    chunk = np.random.default_rng(0).uniform(-1, 1, (HORIZON, DIMS))
    said = [processor.tokenizer.fast_start + i for i in processor.fast.encode(chunk)]
    right = np.array([*said, ids.eos, ids.pad])
    wrong = np.full(len(right), 7)
    monkeypatch.setattr(
        type(fast_policy._sampler), "__call__", lambda self, batch, *_: np.stack([right, wrong][: len(batch.tokens)])
    )
    expected = processor.decode_action_tokens(said)
    np.testing.assert_array_equal(fast_policy.predict(observation()).actions, expected)
    with pytest.raises(ActionDecodeError, match=r"observation 1: no <\|im_end\|>") as caught:
        fast_policy.predict([observation(), observation(seed=1)])
    assert set(caught.value.failures) == {1}
    np.testing.assert_array_equal(caught.value.actions[0], expected)
    assert np.isnan(caught.value.actions[1]).all()


def test_fast_failure_is_never_an_action(fast_policy):
    for options in ({"max_tokens": 4}, {"max_tokens": 8, "temperature": 1.0, "seed": 3}):
        with pytest.raises(FastDecodeError, match=r"<\|im_end\|>|not action tokens|FAST ids"):
            fast_policy.predict(observation(), **options)


def test_fast_prompt_keeps_no_room_for_the_answer(fast_policy):
    sample = fast_policy.encode(observation(480, 640))
    config = fast_policy.processor.config
    assert len(sample.tokens) == config.prompt_length - config.label_window


def test_statistics_among_the_weights(model_dir, tmp_path):
    """Upstream keeps q01 and q99 - q01 of each robot beside the parameters."""
    config, params = wallx_jax.load_params(model_dir)
    names = {
        f"action_preprocessor.normalizer_{kind}.{stat}.acme/arm": np.linspace(1, 2, 20, dtype=np.float32) * scale
        for kind, scale in (("action", 2), ("propri", 3))
        for stat in ("min", "delta")
    }
    folder = tmp_path / "with"
    tiny_run.write_model(folder)
    from safetensors.numpy import load_file

    write_safetensors(folder / "model.safetensors", load_file(folder / "model.safetensors") | names)
    policy = wallx_jax.load_policy(folder, robot="acme/arm", views=VIEWS, resolution=84, horizon=2)
    action = policy.processor.stats.action
    np.testing.assert_allclose(action.q99 - action.q01, np.linspace(2, 4, 20), rtol=1e-6)
    assert policy.predict(observation(state=np.ones(20))).actions.shape == (2, 20)
    with pytest.raises(ValueError, match="robot 'acme'.*it has .'acme/arm'"):
        wallx_jax.load_policy(folder, robot="acme")
    with pytest.raises(ValueError, match="whose actions.*it has: acme/arm"):
        wallx_jax.load_policy(folder)


def test_what_cannot_act_says_so(model_dir, tmp_path):
    with pytest.raises(ValueError, match="whose actions.*norm_stats=FILE.*it has: none"):
        wallx_jax.load_policy(model_dir)
    qwen = tiny_run.write_model(tmp_path / "qwen", qwen=True)
    with pytest.raises(WeightsError, match="without an action side.*load_vlm"):
        wallx_jax.load_policy(qwen, norm_stats=robot_stats())
    with pytest.raises(FileNotFoundError, match="does not exist|neither a folder"):
        wallx_jax.load_policy(tmp_path / "nowhere")
    save_norm_stats(tmp_path, robot_stats(30))
    with pytest.raises(ValueError, match="30 dims but the model only 20 channels"):
        wallx_jax.load_policy(model_dir, norm_stats=tmp_path / "norm_stats.json")


def test_a_directory_that_knows_its_robot_needs_no_more(policy, model_dir, tmp_path):
    folder = tmp_path / "exported"
    tiny_run.write_model(folder)
    policy.processor.save(folder)
    again = wallx_jax.load_policy(folder, numerics=FLOAT32)
    np.testing.assert_array_equal(again.predict(observation()).actions, policy.predict(observation()).actions)
    for surplus in ({"norm_stats": robot_stats()}, {"horizon": 8}, {"views": VIEWS, "resolution": 56}):
        with pytest.raises(ValueError, match=f"knows its robot: leave out {', '.join(surplus)}$"):
            wallx_jax.load_policy(folder, **surplus)


@pytest.mark.parametrize("horizon", [0, -1, 2.5, True])
def test_a_chunk_has_a_number_of_actions(model_dir, horizon):
    with pytest.raises(ValueError, match=f"^horizon = {horizon}: give the actions per chunk, 1 or more"):
        wallx_jax.load_policy(model_dir, norm_stats=robot_stats(), horizon=horizon)


def test_relative_actions_are_added_to_the_state(policy, model_dir, tmp_path):
    """With the same statistics the model says the same; statistics on file say what it is relative to."""
    relative_to = (3, -1, *range(5))
    save_norm_stats(tmp_path, dataclasses.replace(robot_stats(), relative_to=relative_to, horizon=HORIZON))
    options = {"norm_stats": tmp_path, "views": VIEWS, "resolution": 84, "numerics": FLOAT32}
    relative = wallx_jax.load_policy(model_dir, horizon=HORIZON, **options)
    observations = [observation(), observation(120, 60, seed=1)]
    ours, absolute = (each.predict(observations, seed=3).actions for each in (relative, policy))
    states = np.stack([o["state"] for o in observations])[:, list(relative_to)] * (np.array(relative_to) >= 0)
    np.testing.assert_allclose(ours, absolute + states[:, None], atol=1e-6)
    with pytest.raises(ValueError, match="over 5 steps; expected statistics .* over 6 steps"):
        wallx_jax.load_policy(model_dir, horizon=6, **options)


def test_numerics_can_be_overridden(policy, model_dir):
    causal = load_model(model_dir, numerics=FLOAT32 | {"action_attention": "causal"})
    assert causal.config.numerics.action_attention == "causal"
    assert json.dumps(sorted(tree.flatten(causal.params))) == json.dumps(sorted(tree.flatten(policy.params)))
    other = Policy(causal.config, causal.params, policy.processor)
    assert np.abs(other.predict(observation()).actions - policy.predict(observation()).actions).max() > 1e-7
