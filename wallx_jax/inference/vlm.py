"""Questions about pictures and videos, answered in words: VQA, chain of thought, whatever the chat template carries."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

PROMPT_STEP = 64  # prompts are padded to a multiple of so many tokens, so that few lengths are compiled
Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """text and its token ids, without the end token; finished: False when `max_tokens` cut it off. timings_ms:
    "preprocess", "model" and "total" of the call that gave it, with all answers of that call."""

    text: str
    tokens: list[int]
    finished: bool
    timings_ms: dict[str, float]


class VLM:
    """The vision-language side of a Wall-X or Qwen2.5-VL model.

    Compiles at the first call of a shape (conversations per call, picture sizes, prompt length in steps of
    PROMPT_STEP, max_tokens) and keeps the programs of the shapes used last.

    Args:
        limits: pixels that an image is kept between; lower the larger one to save time and memory.
    """

    def __init__(self, config: WallXConfig, params: tree.Tree, tokenizer: Tokenizer, limits: Limits = IMAGE_LIMITS):
        self.config, self.tokenizer, self.limits = config, tokenizer, limits
        self.params = unstack_layers(params)
        self._sampler = Sampler(config, self.params, also_ends=(config.tokens.pad,))  # as Qwen's generation_config

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self._sampler.compilations

    def ask(self, question: str, *pictures: Any, **options: Any) -> Answer:
        """The answer to a question about pictures (uint8 RGB [h, w, 3] or Pillow); options as in `chat`."""
        content = [{"type": "image", "image": picture} for picture in pictures]
        return self.chat([{"role": "user", "content": [*content, {"type": "text", "text": question}]}], **options)

    def chat(
        self,
        conversation: Conversation | Sequence[Conversation],
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> Answer | list[Answer]:
        """What the assistant says next in a conversation (see data.chat), or in each of a list.

        Args:
            max_tokens: room for the answer.
            temperature: 0 says the likeliest token; above, tokens are drawn from softmax(logits / temperature).
            seed: of the drawing: one for all conversations, or one for each. The answer to a conversation does not
                depend on those beside it.

        Raises:
            ValueError: naming the conversation, message and part that is malformed, or the setting.
            LogitsError: the model gave no finite numbers.
        """
        start = time.perf_counter()
        # What is no list of messages is refused as a conversation.
        single = not isinstance(conversation, Sequence) or not len(conversation) or isinstance(conversation[0], Mapping)
        conversations = [conversation] if single else conversation
        seeds = settings.seeds(seed, len(conversations))
        prompts = []
        for row, each in enumerate(conversations):
            with settings.naming("conversation", row, len(conversations)):
                prompts.append(encode_chat(self.tokenizer, each, self.limits))
        encoded = time.perf_counter()
        said: list[np.ndarray | None] = [None] * len(prompts)
        for rows, batch, seconds in self._batches(prompts):
            answers = self._sampler(batch, max_tokens, temperature, [seeds[row] for row in rows], seconds)
            for row, tokens in zip(rows, answers, strict=True):
                said[row] = tokens
        end = time.perf_counter()
        timings = {"preprocess": encoded - start, "model": end - encoded, "total": end - start}
        answers = []
        for row, tokens in enumerate(said):
            with settings.naming("conversation", row, len(conversations)):
                answers.append(self._answer(tokens, {name: 1e3 * s for name, s in timings.items()}))
        return answers[0] if single else answers

    def _answer(self, tokens: np.ndarray, timings_ms: dict[str, float]) -> Answer:
        ids = self._sampler.answer(tokens)
        finished = ids is not None
        ids = (ids if finished else tokens).tolist()
        return Answer(self.tokenizer.decode(ids, skip_special=True).strip(), ids, finished, timings_ms)

    def _batches(self, prompts: Sequence[ChatPrompt]) -> list[tuple[list[int], Batch, tuple[float, ...]]]:
        """(row numbers, their batch, seconds per frame) for each set of prompts with pictures of the same sizes."""
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
        """A prompt as a batch row, padded on the left; a chat has no state and no actions."""
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
