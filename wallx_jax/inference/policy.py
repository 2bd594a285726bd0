"""A trained policy: observations in, action chunks in robot units out.

Legend: B observations, A horizon, C model channels, D robot dims.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wallx_jax import tree
from wallx_jax.data.batch import Batch, stack
from wallx_jax.data.fast import FastDecodeError
from wallx_jax.data.processor import Processor
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.generate import generate
from wallx_jax.models.wallx import bind
from wallx_jax.training import checkpoint_dir
from wallx_jax.training.checkpoint import restore_params

Observation = Mapping[str, Any]


class Prediction(NamedTuple):
    """actions: float32 [A, D] in robot units, [B, A, D] for a list of observations. timings_ms: where time went."""

    actions: np.ndarray
    timings_ms: dict[str, float]


class Policy:
    """Acts with one set of parameters. The preprocessing is the very object that training used."""

    def __init__(self, config: WallXConfig, params: tree.Tree, processor: Processor):
        self.config, self.params, self.processor = config, params, processor

    def predict(
        self,
        observation: Observation | Sequence[Observation],
        *,
        steps: int = 10,
        seed: int = 0,
        noise: np.ndarray | None = None,
        max_tokens: int | None = None,
    ) -> Prediction:
        """The action chunk for one observation, or for each of a list.

        Args:
            observation: {"images": {view or camera key: uint8 RGB [h, w, 3]}, "state": [D], "instruction": str}.
            steps: Euler steps of the flow.
            seed: of the noise that the flow starts from; the same seed gives the same actions.
            noise: [B, A, C] to start from instead.
            max_tokens: FAST checkpoints say their actions, greedily; room for that, None: as in training.

        Raises:
            ValueError: naming the field of the observation that is missing or malformed; the policy stays usable.
            FastDecodeError: what a FAST checkpoint said is not a chunk of actions.
        """
        single = isinstance(observation, Mapping)
        start = time.perf_counter()
        batch = stack([self.encode(o) for o in ([observation] if single else observation)])
        encoded = time.perf_counter()
        if self.processor.config.objective == "fast":
            tokens = np.asarray(self._speak(max_tokens or self.processor.config.label_window)(self.params, batch))
            sampled = time.perf_counter()
            actions = np.stack([self._decode(row) for row in tokens])
        else:
            if noise is None:
                noise = jax.random.normal(jax.random.key(seed), batch.actions.shape, jnp.float32)
            chunk = np.asarray(self._sample(steps)(self.params, batch, jnp.asarray(noise, jnp.float32)))
            sampled = time.perf_counter()
            actions = self.processor.decode_actions(chunk)
        timings = {"preprocess": encoded - start, "model": sampled - encoded, "total": time.perf_counter() - start}
        return Prediction(actions[0] if single else actions, {name: 1e3 * s for name, s in timings.items()})

    def encode(self, observation: Observation) -> Batch:
        """One observation as the model sees it (no batch axis)."""
        for field in ("images", "state", "instruction"):
            if field not in observation:
                raise ValueError(f"the observation has no {field!r}; it has {sorted(observation)}")
        config, given = self.processor.config, observation["images"]
        images = []
        for view, key in zip(config.views, config.camera_keys, strict=True):
            if view not in given and key not in given:
                raise ValueError(f"images: camera {view!r} (or {key!r}) is missing; there are {sorted(given)}")
            images.append(given[view] if view in given else given[key])
        return self.processor.encode(images, observation["state"], observation["instruction"])

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        """What a FAST checkpoint said, up to <|im_end|>, -> [A, D]."""
        ends = np.flatnonzero(tokens == self.config.tokens.eos)
        if not len(ends):
            raise FastDecodeError(f"no <|im_end|> within {len(tokens)} tokens; raise max_tokens, or train longer")
        try:
            return self.processor.decode_action_tokens(tokens[: ends[0]])
        except ValueError as error:
            raise FastDecodeError(str(error)) from error

    @functools.cache  # noqa: B019 - as below
    def _speak(self, max_tokens: int):
        config = self.config

        @jax.jit
        def speak(params: tree.Tree, batch: Batch) -> jax.Array:
            net = bind(config, params)
            ids = config.tokens
            return generate(net, net.embed_batch(batch), max_tokens, end_token=ids.eos, fill_token=ids.pad)

        return speak

    @functools.cache  # noqa: B019 - a policy lives as long as its compiled functions
    def _sample(self, steps: int):
        config = self.config

        @jax.jit
        def sample(params: tree.Tree, batch: Batch, noise: jax.Array) -> jax.Array:
            net = bind(config, params)
            return net.sample_actions(net.embed_batch(batch), noise, batch.action_mask, steps)

        return sample


def load_policy(path: str | Path) -> Policy:
    """The policy of a checkpoint directory (or of a run directory: its newest checkpoint).

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    step = checkpoint_dir.find_checkpoints(path)[0]
    config = checkpoint_dir.read_model_config(step)
    return Policy(config, restore_params(step), Processor.from_dir(checkpoint_dir.assets_dir(step)))
