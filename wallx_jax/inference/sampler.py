"""Tokens that a model says after a prompt.

Legend: B prompts, N new tokens.
"""

from collections.abc import Sequence

import jax
import numpy as np

from wallx_jax.data.batch import Batch
from wallx_jax.inference import settings
from wallx_jax.inference.jit_cache import BoundedJitCache
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.generate import NOT_FINITE, generate, truncate_at_eos
from wallx_jax.models.params import from_params
from wallx_jax.utils import tree


class LogitsError(ValueError):
    """The model's logits are not finite, so that it says nothing."""


class Sampler:
    """Greedy or sampled generation with one set of parameters, compiled once per shape.

    `also_ends`: tokens that end an answer beside <|im_end|>.
    """

    def __init__(self, config: WallXConfig, params: tree.Tree, also_ends: tuple[int, ...] = ()):
        self.config, self.params = config, params
        self.ends = (config.tokens.eos, *also_ends)
        self._program = BoundedJitCache(self._generate)

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self._program.compilations

    def __call__(
        self,
        batch: Batch,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        seconds_per_frame: tuple[float, ...] | None = None,
    ) -> np.ndarray:
        """int32 [B, N] that continue the prompts of a batch, padding behind the end of each.

        Args:
            max_tokens: N; it ends earlier when every row has come to its end.
            temperature: 0 says the likeliest token; above, tokens are drawn from softmax(logits / temperature).
            seeds: of the drawing, one per prompt; their lowest 32 bits count.
            seconds_per_frame: per picture of `batch.images`, for videos; see models.positions.
        """
        options = (settings.whole("max_tokens", max_tokens, 1), seconds_per_frame)
        warmth = settings.warmth(temperature)
        words = np.array([seed % 2**32 for seed in seeds], np.uint32)
        return np.asarray(self._program(options, self.params, batch, warmth, words))

    def answer(self, tokens: np.ndarray) -> np.ndarray | None:
        """A row of the result [N] up to its end; None when it has none.

        Raises:
            LogitsError: the model had no answer.
        """
        if NOT_FINITE in tokens:
            raise LogitsError("the model's logits are not finite: its weights are damaged, or training has diverged")
        return truncate_at_eos(tokens, self.ends)

    def _generate(self, max_tokens, seconds_per_frame, params, batch, temperature, seeds) -> jax.Array:
        net = from_params(self.config, params)
        return generate(
            net,
            net.embed_batch(batch, seconds_per_frame),
            max_tokens,
            end_tokens=self.ends,
            fill_token=self.config.tokens.pad,
            temperature=temperature,
            keys=jax.vmap(jax.random.key)(seeds),
        )
