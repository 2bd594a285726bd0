"""Tokens that a model says after a prompt.

Legend: B prompts, N new tokens.
"""

import jax
import numpy as np

from wallx_jax import tree
from wallx_jax.data.batch import Batch
from wallx_jax.inference.compiled import Compiled
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.generate import generate, up_to
from wallx_jax.models.wallx import bind


class Speaker:
    """Greedy or sampled generation with one set of parameters, compiled once per shape.

    `also_ends`: tokens that end an answer beside <|im_end|>.
    """

    def __init__(self, config: WallXConfig, params: tree.Tree, also_ends: tuple[int, ...] = ()):
        self.config, self.params = config, params
        self.ends = (config.tokens.eos, *also_ends)
        self._program = Compiled(self._generate)

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self._program.compilations

    def __call__(
        self,
        batch: Batch,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        seconds_per_frame: tuple[float, ...] | None = None,
    ) -> np.ndarray:
        """int32 [B, N] that continue the prompts of a batch, padding behind the end of each.

        Args:
            max_tokens: N; it ends earlier when every row has come to its end.
            temperature: 0 says the likeliest token; above, tokens are drawn from softmax(logits / temperature).
            seed: of the drawing.
            seconds_per_frame: per picture of `batch.images`, for videos; see models.positions.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; give at least 1")
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; give 0 (the likeliest token) or more")
        warmth = np.float32(temperature) if temperature else None
        options = (max_tokens, seconds_per_frame)
        return np.asarray(self._program(options, self.params, batch, warmth, jax.random.key(seed)))

    def answer(self, tokens: np.ndarray) -> np.ndarray | None:
        """A row of the result [N] up to its end; None when it has none."""
        return up_to(tokens, self.ends)

    def _generate(self, max_tokens, seconds_per_frame, params, batch, temperature, key) -> jax.Array:
        net = bind(self.config, params)
        return generate(
            net,
            net.embed_batch(batch, seconds_per_frame),
            max_tokens,
            end_tokens=self.ends,
            fill_token=self.config.tokens.pad,
            temperature=temperature,
            key=key,
        )
