import dataclasses
import gc
import json
import pickle
import weakref

import numpy as np
import pytest
from helpers import synthetic
from PIL import Image

from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.data import images as image_ops
from wallx_jax.data.batch import Batch
from wallx_jax.data.fast import FastTokenizer
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.normalize import NormStats, Stats
from wallx_jax.data.pipeline import DataLoader, training_dataset
from wallx_jax.data.processor import Processor, ProcessorConfig, has_relative_actions, required_prompt_length
from wallx_jax.data.stats import compute_stats
from wallx_jax.data.tokenizer import Tokenizer

HORIZON, FAST_SIZE = 6, 400
VIEWS, RESOLUTIONS = ("face_view", "left_wrist_view"), (84, -1)
SIZES = tuple(
    image_ops.target_size(*size, resolution)
    for size, resolution in zip(synthetic.CAMERAS.values(), RESOLUTIONS, strict=True)
)
FAST_BUDGET = 120


@pytest.fixture(scope="module")
def tokenizer():
    from helpers.qwen_vocab import tokenizer_dir

    tokenizer = Tokenizer.from_dir(tokenizer_dir())
    tokenizer = tokenizer.with_wallx_tokens(FAST_SIZE)
    return tokenizer


@pytest.fixture(scope="module")
def stats():
    rng = np.random.default_rng(0)

    def part(dims):
        low, high = rng.uniform(-2, -1, dims), rng.uniform(1, 2, dims)
        return Stats((low + high) / 2, high - low, low, high, low, high)

    return NormStats(part(synthetic.DIMS), part(synthetic.DIMS), synthetic.STATE, synthetic.ACTION)


@pytest.fixture(scope="module")
def fast():
    chunks = np.cumsum(np.random.default_rng(1).normal(scale=0.1, size=(64, HORIZON, synthetic.DIMS)), axis=1)
    return FastTokenizer.fit(np.clip(chunks, -1, 1), FAST_SIZE, 10)


def config(tokenizer, **changes):
    counts = [image_ops.image_token_count(*size) for size in SIZES]
    budget = FAST_BUDGET if changes.get("objective") == "fast" else 0
    length = required_prompt_length(tokenizer, synthetic.TASKS, VIEWS, counts, budget)
    window = budget + 2 if budget else 0
    base = ProcessorConfig(VIEWS, tuple(synthetic.CAMERAS), RESOLUTIONS, SIZES, HORIZON, length, window)
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def flow(tokenizer, stats):
    return Processor(config(tokenizer), tokenizer, stats)


@pytest.fixture
def observation():
    rng = np.random.default_rng(2)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in synthetic.CAMERAS.values()]
    return {"images": pictures, "state": rng.normal(size=synthetic.DIMS), "instruction": synthetic.TASKS[0]}


@pytest.fixture
def actions():
    return np.random.default_rng(3).normal(scale=0.5, size=(HORIZON, synthetic.DIMS))


def assert_equal(a, b):
    for f in dataclasses.fields(Batch):
        x, y = getattr(a, f.name), getattr(b, f.name)
        for left, right in zip(x, y, strict=True) if f.name == "images" else [(x, y)]:
            np.testing.assert_array_equal(left, right)
            assert np.asarray(left).dtype == np.asarray(right).dtype


@pytest.mark.medium
def test_shapes_and_dtypes_keep_the_contract(flow, observation, actions):
    sample = flow.encode(**observation, actions=actions, action_is_pad=np.arange(HORIZON) > 3)
    length = flow.config.prompt_length
    expected = {
        "tokens": ((length,), np.int32), "token_mask": ((length,), bool), "labels": ((0,), np.int32),
        "state": ((20,), np.float32), "state_mask": ((20,), np.float32), "actions": ((HORIZON, 20), np.float32),
        "action_mask": ((HORIZON, 20), np.float32), "action_is_pad": ((HORIZON,), bool),
    }  # fmt: skip
    assert {name: (getattr(sample, name).shape, getattr(sample, name).dtype) for name in expected} == expected
    assert [x.shape for x in sample.images] == [(*size, 3) for size in SIZES]
    assert sample.action_is_pad.tolist() == [False] * 4 + [True] * 2
    assert sample.state_mask.tolist() == [1.0] * 14 + [0.0] * 6
    np.testing.assert_array_equal(sample.state, flow.state.normalize(observation["state"]))


def test_prompt_holds_one_token_per_image_block(flow, tokenizer, observation):
    sample = flow.encode(**observation)
    text = tokenizer.decode(sample.tokens[sample.token_mask])
    assert f"Instruction: {synthetic.TASKS[0]}\nPredict" in text and text.endswith("assistant\n")
    assert text.count("<|image_pad|>") == sum(flow.config.image_tokens)
    assert text.index("front view") < text.index("left wrist view")


def test_acting_and_training_see_the_same_observation(flow, observation, actions):
    training, acting = flow.encode(**observation, actions=actions), flow.encode(**observation)
    for name in ("tokens", "token_mask", "state", "state_mask", "action_mask"):
        np.testing.assert_array_equal(getattr(training, name), getattr(acting, name))
    assert not acting.actions.any() and not acting.action_is_pad.any()


def test_actions_come_back(flow, observation, actions):
    sample = flow.encode(**observation, actions=actions)
    assert not sample.actions[:, synthetic.DIMS :].any()
    low, high = flow.stats.action.q01, flow.stats.action.q99
    np.testing.assert_allclose(flow.decode_actions(sample.actions), np.clip(actions, low, high), atol=1e-6)


RELATIVE_TO = (*range(6), -1, *range(7, 13), 2)  # the last action is relative to another joint's state


def relative(tokenizer, stats, fast=None, **changes):
    """A processor of relative actions, with ranges that nothing exceeds."""
    wide = np.full(synthetic.DIMS, 9.0)
    part = Stats(0 * wide, wide, -wide, wide, -wide, wide)
    stats = dataclasses.replace(stats, action=part, relative_to=RELATIVE_TO, horizon=HORIZON)
    return Processor(config(tokenizer, relative_to=RELATIVE_TO, **changes), tokenizer, stats, fast)


def test_relative_actions_are_differences_from_the_first_state_and_come_back(tokenizer, stats, observation, actions):
    processor = relative(tokenizer, stats)
    sample, state = processor.encode(**observation, actions=actions), observation["state"]
    for dim, joint in enumerate(RELATIVE_TO):
        given = actions[:, dim] - (state[joint] if joint >= 0 else 0)
        np.testing.assert_allclose(sample.actions[:, dim], given / 9, atol=1e-6)
    back = processor.decode_actions(sample.actions, state)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, actions, atol=2e-6)
    both = processor.decode_actions(np.stack([sample.actions] * 2), np.stack([state, state + 1]))
    np.testing.assert_allclose(both[1] - both[0], np.tile(processor.relative, (HORIZON, 1)), atol=2e-6)
    with pytest.raises(ValueError, match="pass the state"):
        processor.decode_actions(sample.actions)


def test_relative_actions_as_text_come_back(tokenizer, stats, fast, observation, actions):
    processor = relative(tokenizer, stats, fast, objective="fast")
    labels = processor.encode(**observation, actions=actions).labels
    decoded = processor.decode_action_tokens(labels[labels != -100][:-2], observation["state"])
    np.testing.assert_allclose(decoded, actions, atol=9 * np.sqrt(HORIZON) / 20)


def test_relative_actions_need_the_state_also_where_it_is_not_seen(tokenizer, stats, observation, actions):
    processor = relative(tokenizer, stats, observed=tuple(dim != 2 for dim in range(synthetic.DIMS)))
    actions[1, 2] = np.nan
    assert processor.encode(**observation, actions=actions).action_mask[1, 2] == 0, "no value, no difference"
    observation["state"][2] = np.nan
    with pytest.raises(ValueError, match="state is not finite at dims \\[2\\]"):
        processor.encode(**observation)


def test_statistics_must_be_of_the_same_differences(tokenizer, stats):
    with pytest.raises(ValueError, match="are for absolute actions; expected statistics for actions relative"):
        Processor(config(tokenizer, relative_to=RELATIVE_TO), tokenizer, stats)
    of_differences = dataclasses.replace(stats, relative_to=RELATIVE_TO, horizon=HORIZON)
    with pytest.raises(ValueError, match="expected statistics for absolute actions"):
        Processor(config(tokenizer), tokenizer, of_differences)
    short = dataclasses.replace(stats, relative_to=(1, 2), horizon=HORIZON)
    with pytest.raises(ValueError, match="for each of 14 action dims"):
        Processor(config(tokenizer, relative_to=(1, 2)), tokenizer, short)


def test_relative_actions_are_saved(tokenizer, stats, observation, actions, tmp_path):
    before = relative(tokenizer, stats)
    before.save(tmp_path)
    after = Processor.from_dir(tmp_path)
    assert after.config == before.config and has_relative_actions(tmp_path)
    sample = after.encode(**observation, actions=actions)
    assert_equal(before.encode(**observation, actions=actions), sample)
    np.testing.assert_array_equal(*(p.decode_actions(sample.actions, observation["state"]) for p in (before, after)))


def test_a_directory_from_before_relative_actions(flow, tmp_path):
    flow.save(tmp_path)
    fields = json.loads((tmp_path / "processor.json").read_text())
    del fields["relative_to"]
    (tmp_path / "processor.json").write_text(json.dumps(fields))
    assert Processor.from_dir(tmp_path).config == flow.config and not has_relative_actions(tmp_path)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_missing_action_values_are_masked(flow, observation, actions, missing):
    actions[2, 5] = missing
    sample = flow.encode(**observation, actions=actions)
    assert sample.action_mask[2, 5] == 0 and sample.actions[2, 5] == 0
    assert sample.action_mask.sum() == HORIZON * synthetic.DIMS - 1


@pytest.mark.parametrize("missing", [np.nan, np.inf])
def test_dims_that_are_not_used_are_masked(tokenizer, stats, observation, actions, missing):
    off = tuple(dim != 3 for dim in range(synthetic.DIMS))
    processor = Processor(config(tokenizer, observed=off, predicted=off), tokenizer, stats)
    observation["state"][3] = missing
    sample = processor.encode(**observation, actions=actions)
    assert sample.state_mask[3] == sample.state[3] == 0
    assert not sample.action_mask[:, 3].any() and not sample.actions[:, 3].any()
    with pytest.raises(ValueError, match="predicted has 3 flags, but the norm stats have 14"):
        Processor(config(tokenizer, predicted=(True,) * 3), tokenizer, stats)


def holding(tokenizer, stats, fast=None, trained=range(0, 14, 2), **changes):
    """A processor that predicts every second dim; of the others 1 and 3 have states of their names."""
    names = {"action_names": [f"a{dim}" for dim in range(14)], "state_names": [f"s{dim}" for dim in range(14)]}
    names["action_names"][1], names["state_names"][7] = "gripper", "gripper"
    names["action_names"][3], names["state_names"][3] = "neck", "neck"
    names["action_names"][5], names["state_names"][5:7] = "twice", ["twice", "twice"]
    names["action_names"][9] = names["state_names"][9] = "9"  # a number, as where the dataset has no name
    predicted = tuple(dim in trained for dim in range(14))
    settings = {name: tuple(value) for name, value in names.items()} | {"predicted": predicted} | changes
    return Processor(config(tokenizer, **settings), tokenizer, stats, fast)


def test_dims_that_nothing_trains_hold_the_state_of_their_name_or_are_not_there(tokenizer, stats, observation, actions):
    processor, everything = holding(tokenizer, stats), holding(tokenizer, stats, trained=range(14))
    assert processor.names == ("a0", "gripper", "a2", "neck", "a4", "a6", "a8", "a10", "a12")
    assert np.flatnonzero(processor.given).tolist() == [0, 1, 2, 3, 4, 6, 8, 10, 12]
    state = observation["state"]
    chunk = np.random.default_rng(0).normal(size=(2, HORIZON, 20))
    decoded, all_dims = processor.decode_actions(chunk, np.stack([state, state + 1])), everything.decode_actions(chunk)
    held = [processor.names.index(name) for name in ("gripper", "neck")]
    for row in range(2):
        np.testing.assert_allclose(decoded[row][:, held], np.tile(state[[7, 3]] + row, (HORIZON, 1)), rtol=1e-6)
    others = [i for i in range(9) if i not in held]
    np.testing.assert_array_equal(decoded[..., others], all_dims[..., processor.given][..., others])
    with pytest.raises(ValueError, match="pass the state"):
        processor.decode_actions(chunk)
    state[7] = np.nan  # of no use for training where the policy does not see it
    blind = holding(tokenizer, stats, observed=tuple(dim != 7 for dim in range(14)))
    blind.encode(**observation, actions=actions)
    with pytest.raises(ValueError, match=r"state is not finite at dims \[7\]"):
        blind.encode(**observation)


def test_without_names_nothing_is_held(tokenizer, stats):
    processor = holding(tokenizer, stats, trained=(4, 11), action_names=(), state_names=())
    assert processor.names == ("4", "11")
    assert processor.decode_actions(np.zeros((HORIZON, 20))).shape == (HORIZON, 2)


def test_relative_dims_that_nothing_trains_do_not_move(tokenizer, stats, observation):
    processor = relative(tokenizer, stats, predicted=tuple(dim not in (2, 6, 13) for dim in range(14)))
    assert processor.names == tuple(str(dim) for dim in range(14) if dim != 6), "6 is absolute and has no name"
    decoded = processor.decode_actions(np.ones((HORIZON, 20)), observation["state"])
    np.testing.assert_allclose(decoded[:, [2, 12]], np.tile(observation["state"][2], (HORIZON, 2)), rtol=1e-6)


def test_dims_that_fast_does_not_say_hold_the_state(tokenizer, stats, fast, observation, actions):
    processor = holding(tokenizer, stats, fast, objective="fast")
    labels = processor.encode(**observation, actions=actions).labels
    decoded = processor.decode_action_tokens(labels[labels != -100][:-2], observation["state"])
    np.testing.assert_allclose(decoded[:, 3], np.full(HORIZON, observation["state"][3]), rtol=1e-6)


def test_names_are_saved_and_there_is_one_for_each_dim(tokenizer, stats, tmp_path):
    before = holding(tokenizer, stats)
    before.save(tmp_path)
    assert Processor.from_dir(tmp_path).names == before.names
    for field, count in (("action_names", 3), ("state_names", 15)):
        with pytest.raises(ValueError, match=f"{field} has {count} names, but the norm stats have 14"):
            Processor(config(tokenizer, **{field: ("x",) * count}), tokenizer, stats)


def test_a_picture_of_another_size_is_brought_to_that_of_training(flow, observation, actions):
    """Where the view's resolution is -1; in training such a frame is refused."""
    _, wrist = observation["images"]
    rng = np.random.default_rng(0)
    for size in ((64, 64), (480, 640), (30, 90)):
        given = [observation["images"][0], rng.integers(0, 256, (*size, 3), np.uint8)]
        acting = flow.for_inference(given, observation["instruction"])
        assert acting.config.image_sizes == flow.config.image_sizes
        for processor in (acting, flow):
            assert processor.encode(given, observation["state"], "go").images[1].shape == (*SIZES[1], 3)
        if size != (64, 64):
            with pytest.raises(ValueError, match=f"left_wrist_view: an image of .*{size[0]}, {size[1]}"):
                flow.encode(given, observation["state"], "go", actions)
    same = flow.for_inference(observation["images"], "go").encode(**observation).images[1]
    np.testing.assert_array_equal(same, image_ops.resize(wrist))


def test_pillow_images(flow, observation):
    as_pillow = {**observation, "images": [Image.fromarray(x) for x in observation["images"]]}
    assert_equal(flow.encode(**as_pillow), flow.encode(**observation))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("instruction", "  ", "instruction is '  '"),
        ("instruction", None, "instruction is None"),
        ("state", np.zeros(13), "state has shape \\(13,\\); expected \\(14,\\)"),
        ("state", np.array([0.0] * 5 + [np.nan] * 9), "state is not finite at dims \\[5, 6"),
        ("state", np.array([0.0] * 13 + [-np.inf]), "state is not finite at dims \\[13\\]"),
        ("state", {"joint": 0.0}, "state is {'joint': 0.0}; expected an array of numbers"),
        ("state", ["a"] * 14, "state is \\['a', .*; expected an array of numbers"),
        ("state", ["1"] * 14, "state is .*; expected an array of numbers"),
        ("state", [[0, 1], [2]], "state is .*; expected an array of numbers"),
        ("state", [None] * 14, "state is not finite at dims"),
        ("state", np.zeros(14, complex), "state is .*; expected an array of numbers"),
        ("state", None, r"state has shape \(\)"),
        ("images", [np.zeros((64, 96, 3), np.uint8)], "got 1 images; expected 2, in order \\['face_view'"),
        ("images", [np.zeros((64, 96, 3))] * 2, "face_view: dtype float64"),
        ("images", [np.zeros((96, 64, 3), np.uint8)] * 2, "face_view: an image of .* \\(96, 64\\) becomes .* 84, not"),
        ("actions", np.zeros((3, 14)), "actions have shape \\(3, 14\\); expected \\(6, 14\\)"),
        ("actions", [["a"] * 14] * 6, "actions is .*; expected an array of numbers"),
        ("instruction", "pick up " * 50, "raise it to at least"),
        ("instruction", "pick \ud83d up", "the instruction 'pick .* contains half of a surrogate pair at character 5"),
    ],
)
def test_bad_input_is_named_and_leaves_the_processor_usable(flow, observation, field, value, message):
    with pytest.raises(ValueError, match=message):
        flow.encode(**{**observation, field: value})
    flow.encode(**observation)


def test_fast_labels_say_the_actions(tokenizer, stats, fast, observation, actions):
    processor = Processor(config(tokenizer, objective="fast"), tokenizer, stats, fast)
    sample = processor.encode(**observation, actions=actions)
    answer = sample.labels[sample.labels != -100]
    window = processor.config.label_window
    np.testing.assert_array_equal(sample.tokens[-window:][sample.labels != -100], answer)
    assert tokenizer.decode(answer[-2:]) == "<|im_end|>\n"
    expected = fast.encode(processor.action.normalize(actions)[:, : synthetic.DIMS])
    assert (answer[:-2] - tokenizer.fast_start).tolist() == list(expected)
    decoded = processor.decode_action_tokens(answer[:-2])
    assert decoded.shape == actions.shape
    np.testing.assert_allclose(decoded, np.clip(actions, stats.action.q01, stats.action.q99), atol=0.5)
    acting = processor.encode(**observation)
    assert (acting.labels == -100).all()
    with pytest.raises(ValueError, match="are not action tokens"):
        processor.decode_action_tokens(answer)


def test_fast_leaves_out_masked_dims(tokenizer, stats, fast, observation, actions):
    used = tuple(dim < 7 for dim in range(synthetic.DIMS))
    processor = Processor(config(tokenizer, objective="fast", predicted=used), tokenizer, stats, fast)
    labels = processor.encode(**observation, actions=actions).labels
    ids = labels[labels != -100][:-2]
    normalised = processor.action.normalize(actions)[:, :7]
    assert (ids - tokenizer.fast_start).tolist() == list(fast.encode(normalised))
    assert processor.decode_action_tokens(ids).shape == (HORIZON, 7)


def test_fast_needs_its_tokenizer(tokenizer, stats, fast):
    with pytest.raises(ValueError, match="needs an action tokenizer"):
        Processor(config(tokenizer, objective="fast"), tokenizer, stats)
    from helpers.qwen_vocab import tokenizer_dir

    plain = Tokenizer.from_dir(tokenizer_dir())
    plain = plain.with_wallx_tokens(None)
    with pytest.raises(ValueError, match=f"has {fast.vocab_size} tokens, but the vocabulary has 0"):
        Processor(config(tokenizer, objective="fast"), plain, stats, fast)


OWN = PromptTemplate(
    system="Act.",
    view_names={"face_view": "head"},
    image="{image}{view}",
    action="{instruction}{images}{proprioception}",
    language="{instruction}{images}",
)


@pytest.mark.parametrize(("objective", "words"), [("flow", PromptTemplate()), ("flow", OWN), ("fast", OWN)])
def test_saved_directory_encodes_the_same(tokenizer, stats, fast, observation, actions, tmp_path, objective, words):
    predicted = tuple(dim != 3 for dim in range(synthetic.DIMS))
    settings = config(tokenizer, objective=objective, predicted=predicted, prompt=words)
    before = Processor(settings, tokenizer, stats, fast if objective == "fast" else None)
    before.save(tmp_path / "processor")
    after = Processor.from_dir(tmp_path / "processor")
    assert after.config == before.config
    for given in (actions, None):
        assert_equal(before.encode(**observation, actions=given), after.encode(**observation, actions=given))
    chunk = np.random.default_rng(0).normal(size=(2, HORIZON, 20))
    np.testing.assert_array_equal(before.decode_actions(chunk), after.decode_actions(chunk))


@pytest.mark.parametrize("objective", ["flow", "fast"])
def test_the_words_of_the_prompt_reach_training_and_acting(tokenizer, stats, fast, observation, actions, objective):
    """Also beside a processor with other words and the same tokenizer: what is kept per instruction is kept apart."""
    processors = [
        Processor(config(tokenizer, objective=objective, prompt=words), tokenizer, stats, fast)
        for words in (PromptTemplate(), OWN)
    ]
    picture, image = "<|vision_start|>{}<|vision_end|>", "<|image_pad|>"
    head, wrist = (picture.format(image * count) for count in processors[0].config.image_tokens)
    images, chat = f"{head}head{wrist}left wrist view", "<|im_end|>\n<|im_start|>assistant\n"
    start = f"<|im_start|>system\nAct.<|im_end|>\n<|im_start|>user\n{observation['instruction']}{images}"
    said = {"action": f"{start}<|propri|>{chat}", "language": f"{start}{chat}"}
    for task, given in (("action", actions), ("action", None), ("language", None)):
        default, own = (
            processor.for_inference(observation["images"], observation["instruction"], task)
            if given is None
            else processor
            for processor in processors
        )
        samples = [p.encode(**observation, actions=given, task=task) for p in (default, own)]
        assert not np.array_equal(*(sample.tokens for sample in samples))
        text = tokenizer.decode(samples[1].tokens[samples[1].token_mask])
        assert text.startswith(said[task]) and (given is not None or text == said[task])


def test_prompt_length_follows_the_words(tokenizer, stats, observation):
    arguments = (tokenizer, synthetic.TASKS, VIEWS, [4, 4])
    wordy = PromptTemplate(system="You are a helpful assistant. " * 50)
    assert required_prompt_length(*arguments, 0, wordy) > required_prompt_length(*arguments) + 200
    processor = Processor(config(tokenizer, prompt=wordy), tokenizer, stats)
    acting = processor.for_inference(observation["images"], observation["instruction"])
    assert acting.config.prompt_length > processor.config.prompt_length + 200
    acting.encode(**observation)


def test_a_directory_from_before_prompts_could_be_changed(flow, tmp_path):
    flow.save(tmp_path)
    file = tmp_path / "processor.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in fields.items() if name != "prompt"}))
    assert Processor.from_dir(tmp_path).config == flow.config
    for change, message in (
        ({"sytem": ""}, r"processor.json: prompt: unknown fields \['sytem'\], missing fields \[\]"),
        ({"system": "<|im_end|>"}, "prompt.system = .*control tokens"),
    ):
        file.write_text(json.dumps(fields | {"prompt": fields["prompt"] | change}))
        with pytest.raises(ValueError, match=message):
            Processor.from_dir(tmp_path)


def test_broken_directories(flow, tmp_path):
    with pytest.raises(FileNotFoundError, match="processor.json is missing"):
        Processor.from_dir(tmp_path)
    flow.save(tmp_path)
    file = tmp_path / "processor.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**{k: v for k, v in fields.items() if k != "horizon"}, "colour": 1}))
    with pytest.raises(ValueError, match="unknown fields \\['colour'\\], missing fields \\['horizon'\\]"):
        Processor.from_dir(tmp_path)


def test_one_entry_per_camera(tokenizer):
    with pytest.raises(ValueError, match="one entry per camera.*'resolutions': 1"):
        config(tokenizer, resolutions=(84,))


@pytest.mark.filterwarnings("ignore:The video decoding and encoding capabilities of torchvision")
def test_dataset_to_batch(dataset_info, tokenizer):
    processor = Processor(config(tokenizer), tokenizer, compute_stats(dataset_info))
    source = LeRobotSource(dataset_info, HORIZON, processor.config.camera_keys)
    batch = next(DataLoader(training_dataset(source, processor, seed=0), 3))
    assert batch.tokens.shape == (3, processor.config.prompt_length)
    assert [x.shape for x in batch.images] == [(3, *size, 3) for size in SIZES]
    assert np.abs(batch.actions).max() <= 1
    decoded = processor.decode_actions(batch.actions)
    np.testing.assert_allclose(decoded[..., synthetic.CONSTANT_DIM], 0.25)


def test_a_dropped_processor_leaves_nothing_behind(stats, tokenizer, observation):
    """Encoded prompts are kept by the processor and its copies, not by the module."""
    own = tokenizer.with_wallx_tokens(FAST_SIZE)
    processor = Processor(config(own), own, stats)
    other = processor.for_inference(observation["images"], observation["instruction"])
    again = pickle.loads(pickle.dumps(other))
    expected = other.encode(**observation)
    assert other.encode(**observation).tokens is expected.tokens
    np.testing.assert_array_equal(again.encode(**observation).tokens, expected.tokens)
    dropped = weakref.ref(own)
    del own, processor, other
    gc.collect()
    assert dropped() is None
