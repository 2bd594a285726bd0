"""Generate tokens autoregressively with one set of parameters.

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
    """The model's logits are not finite, so no token can be generated."""


class Sampler:
    """Greedy or sampled generation with one set of parameters, compiled once per shape.

    Args:
        config: shapes, numerics and token ids of the model.
        params: parameters of the model.
        also_ends: tokens that end an answer, in addition to <|im_end|>.
    """

    def __init__(self, config: WallXConfig, params: tree.Tree, also_ends: tuple[int, ...] = ()):
        self.config, self.params = config, params
        self.ends = (config.tokens.eos, *also_ends)
        self._program = BoundedJitCache(self._generate)

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._program.compilations

    def __call__(
        self,
        batch: Batch,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        seconds_per_frame: tuple[float, ...] | None = None,
    ) -> np.ndarray:
        """Continue the prompts of a batch.

        Args:
            batch: the encoded prompts.
            max_tokens: N; generation stops earlier once every row has its end token.
            temperature: 0 for greedy decoding; above 0, tokens are sampled from softmax(logits / temperature).
            seeds: sampling seeds, one per prompt; only their lowest 32 bits are used.
            seconds_per_frame: one per entry of `batch.images`, for videos; see models.positions.

        Returns:
            int32 [B, N], padded after the end token of each row.
        """
        options = (settings.whole("max_tokens", max_tokens, 1), seconds_per_frame)
        warmth = settings.warmth(temperature)
        words = np.array([seed % 2**32 for seed in seeds], np.uint32)
        return np.asarray(self._program(options, self.params, batch, warmth, words))

    def answer(self, tokens: np.ndarray) -> np.ndarray | None:
        """Truncate a row of the result [N] before its end token; None if it has none.

        Raises:
            LogitsError: the logits of this row were not finite.
        """
        if NOT_FINITE in tokens:
            raise LogitsError("the model's logits are not finite: its weights are damaged, or training has diverged")
        return truncate_at_eos(tokens, self.ends)

    def _generate(
        self,
        max_tokens: int,
        seconds_per_frame: Sequence[float] | None,
        params: tree.Tree,
        batch: Batch,
        temperature: jax.Array | None,
        seeds: jax.Array,
    ) -> jax.Array:
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
