"""Build the prompt of a sample and mark which of its tokens are training targets.

The prompt is a chat around the images, the instruction and the proprioception. Its frame is that of the published
Wall-X weights (wall_x/data/utils.py upstream), its text comes from a PromptTemplate.

Legend: T prefix tokens, W label window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.data.tokenizer import Tokenizer, check_unicode, fast_token
from wallx_jax.models.config import IGNORE

FAST_CLOSING_TOKENS = 2  # <|im_end|> and the newline after a FAST answer

Task = Literal["action", "language"]
WALLX = PromptTemplate()
"""Prompt text that the published weights were trained on."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt, without padding.

    Attributes:
        ids: token ids.
        labels: one per token: its own id if it is a target, else -100.
        pad: id of the padding token.
    """

    ids: list[int]
    labels: list[int]
    pad: int


def prompt_text(
    instruction: str,
    views: Sequence[str],
    task: Task = "action",
    answer: Sequence[int] | str | None = None,
    template: PromptTemplate = WALLX,
) -> str:
    """Return the prompt as readable text, with one `<|image_pad|>` per camera; see `build_prefix` for the arguments."""
    return _context(instruction, views, [1] * len(views), task, template) + _answer(task, answer)


def build_prefix(
    tokenizer: Tokenizer,
    instruction: str,
    views: Sequence[str],
    image_tokens: Sequence[int],
    task: Task = "action",
    answer: Sequence[int] | str | None = None,
    template: PromptTemplate = WALLX,
) -> EncodedPrompt:
    """Tokenise the prompt of one sample.

    Args:
        tokenizer: tokenizer with the Wall-X tokens added.
        instruction: what the robot should do, inserted verbatim.
        views: camera views in the order of the images, e.g. "face_view".
        image_tokens: number of `<|image_pad|>` per image (`images.image_token_count`).
        task: "action" asks for robot actions and includes the proprioception; "language" asks for the next subtask.
        answer: None ends the prompt where the assistant's turn begins; used for flow matching (the action tokens that
            follow are implied by the model and not part of the ids) and for every generation. FAST token numbers (0 is
            `<|action_token_0|>`) for task "action", or a text for task "language", are appended as targets.
        template: text around all of these.

    Returns:
        ids and labels. Targets are the FAST tokens, `<|im_end|>` and the newline after it; for a text, the text, a
        newline and `<|im_end|>`.

    Raises:
        ValueError: for an empty instruction; control tokens or half a surrogate pair in the instruction, a view or the
            answer; an answer that does not match the task; or FAST tokens that the vocabulary lacks.
    """
    if len(views) != len(image_tokens):
        raise ValueError(f"{len(views)} views ({', '.join(views)}) but {len(image_tokens)} image token counts")
    _check_text(tokenizer, "instruction", instruction)
    for view in views:
        _check_text(tokenizer, "view", template.view_label(view))
    if isinstance(answer, str):
        _check_text(tokenizer, "answer", answer)
    elif answer is not None and not all(0 <= index < tokenizer.fast_size for index in answer):
        raise ValueError(
            f"FAST tokens {min(answer)}..{max(answer)} requested, but the tokenizer has {tokenizer.fast_size} of them; "
            f"add them with Tokenizer.with_wallx_tokens"
        )
    known = tokenizer.token_ids()
    needed = ["pad", "eos", "vision_start", "image"] + ["propri"] * (task == "action")
    if missing := [name for name in needed if getattr(known, name) < 0]:
        raise ValueError(f"the tokenizer has no token for {', '.join(missing)}; call Tokenizer.with_wallx_tokens first")
    context = tokenizer.encode(_context(instruction, views, image_tokens, task, template))
    # The context ends in a newline and no answer begins with whitespace. Qwen's pre-tokenizer always splits there, so
    # encoding the two separately gives the ids of the whole.
    targets = tokenizer.encode(_answer(task, answer))
    return EncodedPrompt(context + targets, [IGNORE] * len(context) + targets, known.pad)


def fit(prompt: EncodedPrompt, length: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left-pad a prompt to the fixed length of the run.

    Args:
        prompt: the prompt.
        length: T, prefix tokens.
        window: W < T, number of trailing positions that carry labels.

    Returns:
        tokens int32 [T], mask bool [T] (False at padding), labels int32 [W] (entry j belongs to position T - W + j).

    Raises:
        ValueError: if the prompt is longer than T or has targets before the window. Nothing is ever truncated.
    """
    if not 0 <= window < length:
        raise ValueError(f"label window {window} must be at least 0 and below the prompt length {length}")
    used = len(prompt.ids)
    if used > length:
        raise ValueError(f"the prompt has {used} tokens but prompt length is {length}; raise it to at least {used}")
    targets = sum(label != IGNORE for label in prompt.labels)
    labels = np.full(length, IGNORE, np.int32)
    labels[length - used :] = prompt.labels
    if np.any(labels[: length - window] != IGNORE):
        raise ValueError(
            f"the prompt has {targets} targets but label window is {window}; raise it to at least {targets}"
        )
    tokens = np.full(length, prompt.pad, np.int32)
    tokens[length - used :] = prompt.ids
    return tokens, np.arange(length) >= length - used, labels[length - window :]


def _context(
    instruction: str, views: Sequence[str], image_tokens: Sequence[int], task: Task, template: PromptTemplate
) -> str:
    """Return the text up to and including the assistant's header."""
    if task not in get_args(Task):
        raise ValueError(f"task is {task!r}; choose one of {', '.join(get_args(Task))}")
    if not instruction.strip():
        raise ValueError("the instruction is empty; every sample needs a task text")
    images = "".join(
        template.image.format(
            view=template.view_label(view), image=f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
        )
        for view, count in zip(views, image_tokens, strict=True)
    )
    request = template.action if task == "action" else template.language
    request = request.format(images=images, instruction=instruction, proprioception="<|propri|>")
    return (
        f"<|im_start|>system\n{template.system}<|im_end|>\n"
        f"<|im_start|>user\n{request}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def _answer(task: Task, answer: Sequence[int] | str | None) -> str:
    """Return the text of the assistant's turn, all of which is a training target."""
    if answer is None:
        return ""
    if isinstance(answer, str) != (task == "language"):
        raise ValueError(
            f"task {task!r} cannot have the answer {answer!r}; 'language' takes text, 'action' FAST tokens"
        )
    if isinstance(answer, str):
        if not answer or answer != answer.strip():
            raise ValueError(f"the answer {answer!r} is empty or has whitespace around it; strip it")
        return f"{answer}\n<|im_end|>"
    if not len(answer):
        raise ValueError("the answer has no FAST tokens")
    return "".join(map(fast_token, answer)) + "<|im_end|>\n"


def _check_text(tokenizer: Tokenizer, what: str, text: str) -> None:
    """Reject control tokens in free text: they would open or close turns and images and so corrupt the layout."""
    check_unicode(f"the {what}", text)
    if found := tokenizer.added_tokens_in(text):
        raise ValueError(f"the {what} {text!r} contains control tokens: {', '.join(found)}; remove them from the text")
