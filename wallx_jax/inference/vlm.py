"""Answer questions about images and videos in text: VQA, chain of thought, any conversation in the chat template."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from wallx_jax.data.batch import Batch, stack_samples
from wallx_jax.data.chat import ChatPrompt, encode_chat
from wallx_jax.data.images import IMAGE_LIMITS, Limits
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.inference import settings
from wallx_jax.inference.sampler import Sampler
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.scan import unstack_layers
from wallx_jax.utils import tree

PROMPT_STEP = 64  # prompts are padded to a multiple of this many tokens, so that few lengths are compiled
Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """An answer of the model.

    Attributes:
        text: the decoded answer.
        tokens: its token ids, without the end token.
        finished: False if it was cut off at `max_tokens`.
        timings_ms: milliseconds for "preprocess", "model" and "total", measured over the whole call with all its
            answers.
    """

    text: str
    tokens: list[int]
    finished: bool
    timings_ms: dict[str, float]


class VLM:
    """The vision-language side of a Wall-X or Qwen2.5-VL model.

    The first call with a new shape (conversations per call, image sizes, prompt length in steps of PROMPT_STEP,
    max_tokens) compiles a program; the most recently used programs are kept.

    Args:
        config: shapes, numerics and token ids of the model.
        params: stacked or unrolled parameters.
        tokenizer: the model's tokenizer.
        limits: smallest and largest image size in pixels; lower the largest to save time and memory.
    """

    def __init__(self, config: WallXConfig, params: tree.Tree, tokenizer: Tokenizer, limits: Limits = IMAGE_LIMITS):
        self.config, self.tokenizer, self.limits = config, tokenizer, limits
        self.params = unstack_layers(params)
        self._sampler = Sampler(config, self.params, also_ends=(config.tokens.pad,))  # as Qwen's generation_config

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._sampler.compilations

    def ask(self, question: str, *images: Any, **options: Any) -> Answer:
        """Answer a question about images (uint8 RGB [h, w, 3] or Pillow); options as in `chat`."""
        content = [{"type": "image", "image": image} for image in images]
        return self.chat([{"role": "user", "content": [*content, {"type": "text", "text": question}]}], **options)

    @overload
    def chat(
        self, conversation: Conversation, *, max_tokens: int = ..., temperature: float = ..., seed: int = ...
    ) -> Answer: ...

    @overload
    def chat(
        self,
        conversation: Sequence[Conversation],
        *,
        max_tokens: int = ...,
        temperature: float = ...,
        seed: int | Sequence[int] = ...,
    ) -> list[Answer]: ...

    def chat(
        self,
        conversation: Conversation | Sequence[Conversation],
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> Answer | list[Answer]:
        """Generate the assistant's next message in a conversation, or in each of a list.

        Args:
            conversation: a list of messages (see data.chat), or a list of such lists.
            max_tokens: token budget of an answer.
            temperature: 0 for greedy decoding; above 0, tokens are sampled from softmax(logits / temperature).
            seed: sampling seed: one for all conversations, or one for each. The answer to a conversation does not
                depend on the others in the batch.

        Raises:
            ValueError: a conversation, message, part or setting is malformed; the message names it.
            LogitsError: the model's logits are not finite.
        """
        start = time.perf_counter()
        # Anything that is not a list of messages is rejected as a malformed conversation.
        single = not isinstance(conversation, Sequence) or not len(conversation) or isinstance(conversation[0], Mapping)
        conversations: Sequence[Any] = [conversation] if single else conversation
        seeds = settings.seeds(seed, len(conversations))
        prompts = []
        for row, each in enumerate(conversations):
            with settings.naming("conversation", row, len(conversations)):
                prompts.append(encode_chat(self.tokenizer, each, self.limits))
        encoded = time.perf_counter()
        generated: dict[int, np.ndarray] = {}
        for rows, batch, seconds in self._batches(prompts):
            sampled = self._sampler(batch, max_tokens, temperature, [seeds[row] for row in rows], seconds)
            for row, tokens in zip(rows, sampled, strict=True):
                generated[row] = tokens
        end = time.perf_counter()
        timings = {"preprocess": encoded - start, "model": end - encoded, "total": end - start}
        answers = []
        for row in range(len(conversations)):
            with settings.naming("conversation", row, len(conversations)):
                answers.append(self._answer(generated[row], {name: 1e3 * s for name, s in timings.items()}))
        return answers[0] if single else answers

    def _answer(self, tokens: np.ndarray, timings_ms: dict[str, float]) -> Answer:
        before_end = self._sampler.answer(tokens)
        ids = (tokens if before_end is None else before_end).tolist()
        text = self.tokenizer.decode(ids, skip_special=True).strip()
        return Answer(text, ids, before_end is not None, timings_ms)

    def _batches(self, prompts: Sequence[ChatPrompt]) -> list[tuple[list[int], Batch, tuple[float, ...]]]:
        """Group prompts whose images have the same sizes: (row numbers, their batch, seconds per frame) per group."""
        groups: dict[tuple, list[int]] = {}
        for row, prompt in enumerate(prompts):
            key = (tuple(visual.shape for visual in prompt.visuals), prompt.seconds)
            groups.setdefault(key, []).append(row)
        batches = []
        for (_, seconds), rows in groups.items():
            longest = max(len(prompts[row].ids) for row in rows)
            length = -(-longest // PROMPT_STEP) * PROMPT_STEP
            batches.append((rows, stack_samples([self._sample(prompts[row], length) for row in rows]), seconds))
        return batches

    def _sample(self, prompt: ChatPrompt, length: int) -> Batch:
        """Return a prompt as a batch row, padded on the left; a chat has no state and no actions."""
        tokens = np.full(length, self.config.tokens.pad, np.int32)
        tokens[length - len(prompt.ids) :] = prompt.ids
        action = self.config.action
        state, actions = np.zeros(action.state_dim, np.float32), np.zeros((0, action.action_dim), np.float32)
        return Batch(
            images=prompt.visuals,
            tokens=tokens,
            token_mask=np.arange(length) >= length - len(prompt.ids),
            labels=np.zeros(0, np.int32),
            state=state,
            state_mask=state,
            actions=actions,
            action_mask=actions,
            action_is_pad=np.zeros(0, bool),
        )
