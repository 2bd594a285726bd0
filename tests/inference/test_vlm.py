"""Questions about pictures and videos: what transformers' PyTorch class says, token for token."""

import numpy as np
import pytest
from helpers import tiny_run
from helpers.torch_qwen import qwen_config, random_model, token_types, torch
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

import wallx_jax
from wallx_jax.data.chat import encode_chat
from wallx_jax.data.images import Limits
from wallx_jax.inference.sampler import LogitsError
from wallx_jax.inference.vlm import PROMPT_STEP, VLM
from wallx_jax.utils import tree

TOKENS = 24
RNG = np.random.default_rng(0)


def picture(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def ask(text: str, *parts) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def image(height: int, width: int) -> dict:
    return {"type": "image", "image": picture(height, width)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder, torch model): a tiny Qwen2.5-VL with a tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = tiny_run.write_tokenizer(folder)
    ids = tokenizer.token_ids()
    config = qwen_config(
        4, 2, 3, [1], 2, vocabulary=len(tokenizer) + 10, image_token_id=ids.image, video_token_id=ids.video,
        vision_start_token_id=ids.vision_start, vision_end_token_id=tokenizer.token_id("<|vision_end|>"),
        eos_token_id=ids.eos, pad_token_id=ids.pad,
    )  # fmt: skip
    return folder, random_model(config, folder, seed=3, layer_scale=0.4)


@pytest.fixture(scope="module")
def vlm(reference):
    return wallx_jax.load_vlm(reference[0], numerics={"param_dtype": "float32", "compute_dtype": "float32"})


def torch_answers(model, vlm: VLM, conversations: list) -> list[list[int]]:
    """What transformers generates greedily for prompts of our making, with pixels of its own processors."""
    prompts = [encode_chat(vlm.tokenizer, each) for each in conversations]
    length = max(len(prompt.ids) for prompt in prompts)
    ids, ends = vlm.config.tokens, (vlm.config.tokens.eos, vlm.config.tokens.pad)
    rows = [[ids.pad] * (length - len(prompt.ids)) + prompt.ids for prompt in prompts]
    mask = [[0] * (length - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    images = [v for prompt in prompts for v in prompt.visuals if v.ndim == 3]
    videos = [(v, s) for prompt in prompts for v, s in zip(prompt.visuals, prompt.seconds, strict=True) if v.ndim == 4]
    inputs |= token_types(model, inputs["input_ids"])
    if images:
        found = [Qwen2VLImageProcessor()(Image.fromarray(v), return_tensors="pt") for v in images]
        inputs["pixel_values"] = torch.cat([f["pixel_values"] for f in found])
        inputs["image_grid_thw"] = torch.cat([f["image_grid_thw"] for f in found])
    if videos:
        processor = Qwen2VLVideoProcessor()
        frames = [torch.tensor(v).permute(0, 3, 1, 2) for v, _ in videos]
        inputs |= processor(frames, do_resize=False, do_sample_frames=False, return_tensors="pt")
        inputs["second_per_grid_ts"] = [seconds for _, seconds in videos]
    with torch.no_grad():
        said = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=list(ends), pad_token_id=ids.pad
        )
    answers = []
    for row in said[:, length:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (image(100, 130),),
        (image(60, 200), image(90, 90)),
        ({"type": "video", "video": [picture(120, 160) for _ in range(5)], "fps": 2.0},),
        ({"type": "video", "video": [picture(90, 120) for _ in range(4)], "fps": 1.0}, image(70, 80)),
    ],
    ids=["text", "image", "images", "video", "video and image"],
)
def test_greedy_answer_is_that_of_transformers(reference, vlm, parts):
    conversation = ask("pick up the red block", *parts)
    answer = vlm.chat(conversation, max_tokens=TOKENS)
    assert answer.tokens == torch_answers(reference[1], vlm, [conversation])[0]
    assert len(set(answer.tokens)) > 3, "the case must not be trivial"
    assert answer.finished == (len(answer.tokens) < TOKENS)


@pytest.mark.medium
def test_batch_of_different_lengths_is_that_of_transformers(reference, vlm):
    conversations = [
        ask("stack", image(100, 130)),
        ask("open the cabinet, then close it and open it once more", image(100, 130)),
    ]
    together = vlm.chat(conversations, max_tokens=TOKENS)
    assert [answer.tokens for answer in together] == torch_answers(reference[1], vlm, conversations)
    alone = [vlm.chat(each, max_tokens=TOKENS) for each in conversations]
    assert [a.tokens for a in together] == [a.tokens for a in alone]


@pytest.mark.medium
def test_conversations_with_pictures_of_different_sizes_go_together(vlm):
    conversations = [ask("one", image(60, 60)), ask("two", image(120, 60)), ask("three"), ask("four", image(60, 60))]
    together = vlm.chat(conversations, max_tokens=4)
    assert [a.tokens for a in together] == [vlm.chat(each, max_tokens=4).tokens for each in conversations]


def test_one_compilation_per_shape(vlm):
    before = vlm.compilations
    for text in ("what is it?", "and now?", "why?"):
        vlm.ask(text, picture(56, 84), max_tokens=3)
    assert vlm.compilations == before + 1
    vlm.ask("why? " * PROMPT_STEP, picture(56, 84), max_tokens=3)
    assert vlm.compilations == before + 2


def test_sampling_follows_its_seed(vlm):
    question = ask("say something", image(56, 56))
    answers = [vlm.chat(question, max_tokens=16, temperature=2.0, seed=seed).tokens for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]
    cold = vlm.chat(question, max_tokens=16, temperature=1e-4, seed=5).tokens
    assert cold == vlm.chat(question, max_tokens=16).tokens


@pytest.mark.medium
@pytest.mark.parametrize("seeds", [7, [7, 1, 7, 2]], ids=["one", "each"])
def test_what_is_drawn_does_not_depend_on_the_place_in_the_list(vlm, seeds):
    conversations = [ask("one", image(60, 60)), ask("two"), ask("three", image(60, 60)), ask("four " * 9)]
    own = [seeds] * 4 if isinstance(seeds, int) else seeds
    together = vlm.chat(conversations, max_tokens=8, temperature=1.0, seed=seeds)
    alone = [
        vlm.chat(each, max_tokens=8, temperature=1.0, seed=seed).tokens
        for each, seed in zip(conversations, own, strict=True)
    ]
    assert [answer.tokens for answer in together] == alone
    same = vlm.chat([conversations[0]] * 3, max_tokens=8, temperature=2.0, seed=[4, 4, 5])
    assert same[0].tokens == same[1].tokens != same[2].tokens


@pytest.mark.medium
def test_weights_that_went_bad_say_nothing(vlm):
    flat = tree.flatten(vlm.params)
    flat["decoder/norm/scale"] = flat["decoder/norm/scale"].at[0].set(np.inf)
    bad = VLM(vlm.config, tree.unflatten(flat), vlm.tokenizer)
    for temperature in (0.0, 1.0):
        with pytest.raises(LogitsError, match="^the model's logits are not finite"):
            bad.ask("what is it?", picture(56, 84), max_tokens=3, temperature=temperature)
        with pytest.raises(LogitsError, match="conversation 0: the model's logits are not finite"):
            bad.chat([ask("one"), ask("two")], max_tokens=3, temperature=temperature)


def test_a_cold_or_hot_temperature_is_no_division_by_zero(vlm):
    likeliest = vlm.ask("why?", max_tokens=8).tokens
    for temperature in (1e-30, np.float32(1e-45), 1e-300):
        assert vlm.ask("why?", max_tokens=8, temperature=temperature).tokens == likeliest
    assert vlm.ask("why?", max_tokens=8, temperature=1e38).tokens


def test_answer_tells_its_end_and_time(vlm):
    answer = vlm.ask("what is it?", picture(56, 84), max_tokens=2)
    assert len(answer.tokens) == 2 and not answer.finished
    assert answer.text == vlm.tokenizer.decode(answer.tokens, skip_special=True).strip()
    assert answer.timings_ms["total"] >= answer.timings_ms["model"] > 0


def test_larger_pictures_cost_fewer_tokens_under_limits(reference):
    small = wallx_jax.load_vlm(reference[0])
    small.limits = Limits(4 * 28**2, 16 * 28**2)
    ids = encode_chat(small.tokenizer, ask("hi", image(480, 640)), small.limits).ids
    assert ids.count(small.config.tokens.image) <= 16


def test_wrong_input_names_itself_and_leaves_the_model_usable(vlm):
    for conversation, message in (
        ([], "no messages"),
        ([{"role": "user"}], "message 0 is .* 'role' and 'content'"),
        (ask("hi", {"type": "sound", "sound": 1}), "part of type 'sound'"),
        (ask("hi", {"type": "image", "image": np.zeros((3, 40, 40), np.uint8)}), "message 0, image 0: .*channels"),
        (ask("hi", {"type": "image", "image": np.zeros((1, 1, 3), np.uint8)}), "message 0, image 0: .*1x1"),
        (ask("hi", {"type": "video", "video": [picture(56, 56)]}), "message 0, video 0: fps is None"),
        (ask("hi", {"type": "video", "video": [], "fps": 2}), "message 0, video 0 has no frames"),
        (ask("hi <|image_pad|>"), r"message 0, text 0 contains control tokens: <\|image_pad\|>"),
    ):
        with pytest.raises(ValueError, match=message):
            vlm.chat(conversation)
        with pytest.raises(ValueError, match=f"conversation 1: .*{message}"):
            vlm.chat([ask("hi"), conversation])
    for conversation in (None, 3, "hi", {"role": "user", "content": "hi"}):
        with pytest.raises(ValueError, match="the conversation is a .*; expected a list of messages"):
            vlm.chat(conversation)
        with pytest.raises(ValueError, match="conversation 1: the conversation is a .*; expected a list"):
            vlm.chat([ask("hi"), conversation])
    with pytest.raises(ValueError, match="message 0, text 0 is None; expected text"):
        vlm.ask(None)
    for setting, values in (
        ("max_tokens", (0, -1, None, "5", 1.5)),
        ("temperature", (-1, None, "hot", float("nan"), float("inf"))),
        ("seed", (None, -1, 0.5, "1", [1, 2])),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"{setting} (is|has) .*give"):
                vlm.ask("hi", **{setting: value})
    assert vlm.ask("what is it?", picture(56, 84), max_tokens=2).tokens
