"""Malformed conversations name the message and the part."""

import numpy as np
import pytest
from helpers import tiny_run
from PIL import Image

from wallx_jax.data.chat import FRAMES_PER_TOKEN, encode_chat

FRAMES = [np.full((56, 84, 3), 40 * n, np.uint8) for n in range(4)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = tiny_run.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = tokenizer.with_wallx_tokens(4)
    return tokenizer


def video(**changes) -> dict:
    return {"type": "video", "video": FRAMES, "fps": 2} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "message 1: content is None; expected text or a list of parts"),
        ({"type": "text", "text": "x"}, "message 1: content is {'text': 'x', 'type': 'text'}; expected"),
        (7, "message 1: content is 7"),
        (["x"], "message 1 has a part of type None"),
        ([{"type": "text", "text": None}], "message 1, text 0 is None; expected text"),
        ([{"type": "text", "text": 3}], "message 1, text 0 is 3; expected text"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": b"b"}], "message 1, text 1 is b'b'; expected text"),
        ("half \ud83d", "message 1, text 0 'half .* holds half of a surrogate pair at character 5"),
        ("<|im_end|>", r"message 1, text 0 contains control tokens: <\|im_end\|>"),
        ("go <|propri|> <|action_token_3|>", r"control tokens: <\|propri\|>, <\|action_token_3\|>; remove"),
        ([{"type": "image", "image": "photo.png"}], "message 1, image 0: str; give a uint8"),
        ([{"type": "image", "image": FRAMES[0] / 255}], "message 1, image 0: dtype float64; give uint8"),
        ([{"type": "image", "image": Image.new("L", (60, 60))}], "message 1, image 0: Pillow image of mode 'L'"),
        ([video(video=None)], "message 1, video 0 is None; expected its frames"),
        ([video(video="clip.mp4")], "message 1, video 0 is 'clip.mp4'; expected its frames"),
        ([video(video=FRAMES[:1] + [None])], "message 1, video 0, frame 1: NoneType; give a uint8"),
        *(
            ([video(fps=fps)], "message 1, video 0: fps is .*; say how many .* in a second, 0.001 to 1000")
            for fps in (None, "2", 0, -1, float("nan"), float("inf"), 1e-300, np.float32("inf"))
        ),
    ],
)
def test_malformed_content(tokenizer, content, message):
    conversation = [{"role": "system", "content": "Be short."}, {"role": "user", "content": content}]
    with pytest.raises(ValueError, match=message):
        encode_chat(tokenizer, conversation)


@pytest.mark.parametrize("role", ["user<|im_end|>", "user\nsystem", "", None, 3, "\ud83d"])
def test_a_role_is_a_word(tokenizer, role):
    with pytest.raises(ValueError, match="message 0: role is .*; expected a word"):
        encode_chat(tokenizer, [{"role": role, "content": "x"}])


@pytest.mark.parametrize("conversation", [None, 3, "hello", {"role": "user", "content": "x"}, iter(())])
def test_a_conversation_is_a_list(tokenizer, conversation):
    with pytest.raises(ValueError, match="the conversation is a .*; expected a list of messages"):
        encode_chat(tokenizer, conversation)


def test_what_the_template_refuses_is_told(tokenizer, monkeypatch):
    template = "<|image_pad|>{{ raise_exception('roles must alternate') }}"
    monkeypatch.setitem(tokenizer.config, "chat_template", template)
    with pytest.raises(ValueError, match="chat template refuses this conversation: roles must alternate"):
        encode_chat(tokenizer, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("fps", [2, 2.0, np.float32(2), np.int64(2), np.uint8(2)])
def test_any_number_is_a_frame_rate(tokenizer, fps):
    prompt = encode_chat(tokenizer, [{"role": "user", "content": [video(fps=fps)]}])
    assert prompt.seconds == (FRAMES_PER_TOKEN / 2,) and type(prompt.seconds[0]) is float
