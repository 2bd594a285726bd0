"""Encode conversations with images and videos: Qwen's chat template, visual placeholders and visual inputs.

A conversation is a list of messages in the format of transformers:

    [{"role": "user", "content": [{"type": "image", "image": rgb}, {"type": "text", "text": "What is this?"}]}]

Images are uint8 RGB [h, w, 3] arrays or Pillow images. A video is
{"type": "video", "video": frames, "fps": frames per second}.
"""

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from wallx_jax.data import chat_template, images
from wallx_jax.data.tokenizer import Tokenizer, check_unicode
from wallx_jax.models.config import FRAMES_PER_TOKEN

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
# Tokens that delimit turns and visual inputs, or stand for a robot's state and actions.
CONTROL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|image_pad|video_pad|propri|action|action_token_\d+)\|>"
)
FPS_RANGE = (1e-3, 1e3)  # frames per second; time positions in a video are integers

# Equivalent to Qwen2.5-VL's template for text, images and videos; used for tokenizer directories without one.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}{% endif %}"
    "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatPrompt:
    """An encoded conversation, ending where the assistant's turn begins.

    Attributes:
        ids: token ids.
        visuals: uint8 [h, w, 3] per image and [F, h, w, 3] per video, in the order of their placeholders; h and w are
            multiples of 28.
        seconds: per visual, the seconds of video between two temporal rows of its grid; 0 for an image.
    """

    ids: list[int]
    visuals: tuple[np.ndarray, ...]
    seconds: tuple[float, ...]


def encode_chat(
    tokenizer: Tokenizer, conversation: Sequence[Mapping[str, Any]], limits: images.Limits = images.IMAGE_LIMITS
) -> ChatPrompt:
    """Render, resize and tokenise a conversation.

    Args:
        tokenizer: the text tokenizer, whose chat template is used if it supports images.
        conversation: the messages.
        limits: minimum and maximum pixels of an image; more pixels give more tokens. Video frames use VIDEO_LIMITS.

    Raises:
        ValueError: a message or part is malformed, contains control tokens, or is not an image; the message names it.
    """
    if isinstance(conversation, str) or not isinstance(conversation, Sequence):
        raise ValueError(f"the conversation is a {type(conversation).__name__}; expected a list of messages")
    messages = [_message(i, message) for i, message in enumerate(conversation)]
    if not messages:
        raise ValueError("the conversation has no messages")
    visuals, seconds = [], []
    for where, part in _parts(messages):
        if part["type"] == "image":
            visuals.append(images.resize(part["image"], name=where, limits=limits))
            seconds.append(0.0)
        elif part["type"] == "video":
            visuals.append(_video(part, where))
            seconds.append(FRAMES_PER_TOKEN / _fps(part, where))
        else:
            _check_text(part["text"], where)
    text = chat_template.render(_template(tokenizer.config), messages)
    return ChatPrompt(tokenizer.encode(_expand(text, visuals)), tuple(visuals), tuple(seconds))


def _message(index: int, message: Any) -> dict[str, Any]:
    """Check a message and return it with its content as a list of parts."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise ValueError(f"message {index} is {message!r}; expected a dict with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not role.isidentifier():
        raise ValueError(f"message {index}: role is {role!r}; expected a role such as 'system', 'user' or 'assistant'")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ValueError(f"message {index}: content is {reprlib.repr(content)}; expected text or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image", "video") or kind not in part:
            raise ValueError(
                f"message {index} has a part of type {kind!r}; expected {{'type': 'text', 'text': ...}}, or "
                "the same with 'image' or 'video'"
            )
    return {"role": role, "content": [dict(part) for part in content]}


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (description for error messages, part) in order."""
    for i, message in enumerate(messages):
        for j, part in enumerate(message["content"]):
            yield f"message {i}, {part['type']} {j}", part


def _video(part: Mapping[str, Any], where: str) -> np.ndarray:
    """Return a video as uint8 [F, h, w, 3], with F even because the model merges pairs of frames."""
    video = part["video"]
    if isinstance(video, str) or not isinstance(video, Iterable):
        raise ValueError(f"{where} is {reprlib.repr(video)}; expected its frames (data.video.read_video reads a file)")
    frames = list(video)
    if not frames:
        raise ValueError(f"{where} has no frames")
    resized = [
        images.resize(frame, name=f"{where}, frame {i}", limits=images.VIDEO_LIMITS) for i, frame in enumerate(frames)
    ]
    if len({frame.shape for frame in resized}) > 1:
        raise ValueError(f"{where} has frames of different sizes")
    resized += [resized[-1]] * (-len(resized) % FRAMES_PER_TOKEN)
    return np.stack(resized)


def _fps(part: Mapping[str, Any], where: str) -> float:
    fps, (least, most) = part.get("fps"), FPS_RANGE
    if not isinstance(fps, Real) or not least <= fps <= most:  # type: ignore[operator]  # typeshed has no Real <= float
        raise ValueError(f"{where}: fps is {fps!r}; expected frames per second, between {least:g} and {most:g}")
    return float(fps)


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{where} is {reprlib.repr(text)}; expected text")
    check_unicode(where, text)
    if found := list(dict.fromkeys(CONTROL.findall(text))):
        raise ValueError(f"{where} contains control tokens: {', '.join(found)}; remove them from the text")


def _template(config: Mapping[str, Any]) -> str:
    """Return the tokenizer's own template if that supports images, else TEMPLATE."""
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template if {"name", "template"} <= set(entry)}
        template = named.get("default")
    return template if isinstance(template, str) and IMAGE_PAD in template else TEMPLATE


def _expand(text: str, visuals: Sequence[np.ndarray]) -> str:
    """Repeat each placeholder once per token of its image or video."""
    rest, pieces = text, []
    for visual in visuals:
        pad = VIDEO_PAD if visual.ndim == 4 else IMAGE_PAD
        before, found, rest = rest.partition(pad)
        if not found or IMAGE_PAD in before or VIDEO_PAD in before:
            raise ValueError("the tokenizer's chat template does not insert the images of this conversation")
        frames = len(visual) // FRAMES_PER_TOKEN if visual.ndim == 4 else 1
        pieces += [before, pad * (frames * images.image_token_count(*visual.shape[-3:-1]))]
    return "".join([*pieces, rest])
