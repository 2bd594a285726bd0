"""A trained policy: observations in, action chunks in robot units out.

Legend: B observations, A horizon, C model channels, D robot dims that are given, N tokens.
"""

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from wallx_jax.data.batch import Batch, stack_samples
from wallx_jax.data.fast import FastDecodeError
from wallx_jax.data.processor import Processor, as_numbers
from wallx_jax.data.prompt import Task
from wallx_jax.inference import settings
from wallx_jax.inference.jit_cache import BoundedJitCache
from wallx_jax.inference.sampler import Sampler
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.params import from_params
from wallx_jax.models.scan import unstack_layers
from wallx_jax.utils import tree

Observation = Mapping[str, Any]
SUBTASK_TOKENS = 128  # room for a subtask in words


class ActionError(ValueError):
    """For some observation the policy has no actions that a robot may carry out.

    Attributes:
        failures: {index of the observation: why}.
        actions: float32 [B, A, D] of all observations, NaN in the rows that failed.
    """

    def __init__(self, failures: Mapping[int, str], actions: np.ndarray):
        self.failures, self.actions = dict(failures), actions
        lines = [f"observation {index}: {why}" for index, why in failures.items()]
        super().__init__("; ".join(lines) if len(actions) > 1 else failures[0])


class ActionDecodeError(ActionError, FastDecodeError):
    """What a FAST checkpoint said is not a chunk of actions."""


class ActionNotFiniteError(ActionError):
    """The model gave NaN or infinity."""


@dataclass(frozen=True)
class Prediction:
    """What `Policy.predict` gives.

    actions: float32 [A, D] in robot units, [B, A, D] for a list of observations; always finite. D are the dims that the
        policy was trained on (`predict_action_keys`), and of the others, in their places, those that have a state of
        the same name or are relative to one: they stay at that state. Dims that are neither are not there.
    names: str [D], what the dataset calls these dims; one without a name has its number in the dataset's action.
    timings_ms: where the time went: "preprocess", "model" and "total", and "subtask" where one was asked for.
    subtask: what the policy set itself to do, where it was asked for: a text, or one per observation.
    """

    actions: np.ndarray
    names: tuple[str, ...]
    timings_ms: dict[str, float]
    subtask: str | list[str] | None = None


class Policy:
    """Acts with one set of parameters. The preprocessing is the very object that training used.

    Compiles at the first call of a shape (observations per call, image sizes, prompt length, steps) and keeps the
    programs of the shapes used last.
    """

    def __init__(self, config: WallXConfig, params: tree.Tree, processor: Processor):
        self.config, self.processor = config, processor
        self.params = unstack_layers(params)
        self._flow = BoundedJitCache(self._sample_chunk)
        self._sampler = Sampler(config, self.params)

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self._flow.compilations + self._sampler.compilations

    def predict(
        self,
        observation: Observation | Sequence[Observation],
        *,
        steps: int = 10,
        seed: int | Sequence[int] = 0,
        noise: np.ndarray | None = None,
        subtask: bool = False,
        max_tokens: int | None = None,
        temperature: float = 0.0,
    ) -> Prediction:
        """The action chunk for one observation, or for each of a list.

        Args:
            observation: {"images": {view or camera key: uint8 RGB [h, w, 3] or Pillow}, "state": all dims of the
                dataset's state, "instruction": str}. Images may have any size.
            steps: Euler steps of the flow.
            seed: of the noise that the flow starts from, and of sampled tokens: one for all observations, or one for
                each. An observation and its seed give the same actions, alone or among others.
            noise: [B, A, C] to start the flow from instead.
            subtask: let the policy first say in words what to do next, then act on that instead of the instruction.
            max_tokens: for FAST checkpoints, which say their actions: room for that; None: as in training.
            temperature: for FAST checkpoints: 0 says the likeliest tokens, above they are drawn.

        Raises:
            ValueError: naming the setting, or the field of the observation, that is missing or malformed; the policy
                stays usable.
            ActionDecodeError: what a FAST checkpoint said is not a chunk of actions.
            ActionNotFiniteError: the actions of an observation are not finite.
            LogitsError: as `subtask`.
        """
        start = time.perf_counter()
        single, observations = _listed(observation)
        steps, seeds = settings.whole("steps", steps, 1), settings.seeds(seed, len(observations))
        settings.warmth(temperature)
        window = self.processor.config.label_window
        budget = window if max_tokens is None else settings.whole("max_tokens", max_tokens, 1)
        said = None
        if subtask:
            said = self.subtask(observations, seed=seeds)
            observations = [{**o, "instruction": text} for o, text in zip(observations, said, strict=True)]
        asked = time.perf_counter()
        groups = self._batches(observations)
        states = np.stack([as_numbers("state", o["state"]) for o in observations])
        encoded = time.perf_counter()
        if self.processor.config.objective == "fast":
            actions = self._say_actions(groups, states, budget, temperature, seeds)
        else:
            actions = self._flow_actions(groups, states, steps, seeds, noise)
        end = time.perf_counter()
        timings = {"preprocess": encoded - asked, "model": end - encoded, "total": end - start}
        if subtask:
            timings["subtask"] = asked - start
        return Prediction(
            actions[0] if single else actions,
            self.processor.names,
            {name: 1e3 * seconds for name, seconds in timings.items()},
            said if said is None or not single else said[0],
        )

    def subtask(
        self,
        observation: Observation | Sequence[Observation],
        *,
        max_tokens: int = SUBTASK_TOKENS,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> str | list[str]:
        """What to do next, in words, for one observation or for each of a list (Wall-X's subtask prompt).

        Raises:
            ValueError: as `predict`; also if the model says nothing, or does not come to an end.
            LogitsError: the model gave no finite numbers.
        """
        single, observations = _listed(observation)
        seeds = settings.seeds(seed, len(observations))
        texts = [""] * len(observations)
        for rows, batch in self._batches(observations, "language"):
            said = self._sampler(batch, max_tokens, temperature, [seeds[row] for row in rows])
            for row, tokens in zip(rows, said, strict=True):
                with settings.naming("observation", row, len(observations)):
                    ids = self._sampler.answer(tokens)
                text = self.processor.tokenizer.decode([] if ids is None else ids, skip_special=True).strip()
                if not text:
                    what = "nothing" if ids is not None else f"no end within {max_tokens} tokens"
                    raise ValueError(f"observation {row}: asked for the next subtask, the model said {what}")
                texts[row] = text
        return texts[0] if single else texts

    def encode(self, observation: Observation, task: Task = "action") -> Batch:
        """One observation as the model sees it (no batch axis)."""
        if not isinstance(observation, Mapping):
            raise ValueError(f"the observation is a {type(observation).__name__}; expected a dict")
        for field in ("images", "state", "instruction"):
            if field not in observation:
                raise ValueError(f"the observation has no {field!r}; it has {list(observation)}")
        given, instruction = observation["images"], observation["instruction"]
        if not isinstance(given, Mapping):
            raise ValueError(f"images: {type(given).__name__}; expected a dict of camera view -> picture")
        config, images = self.processor.config, []
        for view, key in zip(config.views, config.camera_keys, strict=True):
            if view not in given and key not in given:
                raise ValueError(f"images: camera {view!r} (or {key!r}) is missing; there are {list(given)}")
            images.append(given[view] if view in given else given[key])
        processor = self.processor.for_inference(images, instruction, task)
        return processor.encode(images, observation["state"], instruction, task=task)

    def _batches(self, observations: Sequence[Observation], task: Task = "action") -> list[tuple[list[int], Batch]]:
        """(row numbers, their batch) for each set of observations whose arrays have the same shapes."""
        groups: dict[tuple, list[tuple[int, Batch]]] = {}
        for row, observation in enumerate(observations):
            with settings.naming("observation", row, len(observations)):
                sample = self.encode(observation, task)
            groups.setdefault(tuple(x.shape for x in jax.tree.leaves(sample)), []).append((row, sample))
        return [
            ([row for row, _ in group], stack_samples([sample for _, sample in group])) for group in groups.values()
        ]

    def _flow_actions(
        self, groups, states: np.ndarray, steps: int, seeds: Sequence[int], noise: np.ndarray | None
    ) -> np.ndarray:
        """Robot units [B, A, D] by flow matching."""
        shape = (len(seeds), *groups[0][1].actions.shape[1:])
        if noise is None:
            noise = np.stack([np.random.default_rng(seed).standard_normal(shape[1:], np.float32) for seed in seeds])
        noise = as_numbers("noise", noise)
        if noise.shape != shape:
            raise ValueError(f"noise has shape {noise.shape}; expected {shape} (observations, horizon, channels)")
        with np.errstate(over="ignore"):
            noise, chunks = noise.astype(np.float32), np.empty(shape, np.float32)
        if (wrong := ~np.isfinite(noise).all(axis=(1, 2))).any():
            raise ValueError(f"noise is not finite for observations {np.flatnonzero(wrong).tolist()}")
        for rows, batch in groups:
            chunks[rows] = self._flow((steps,), self.params, batch, noise[rows])
        actions = self.processor.decode_actions(chunks, states)
        if failures := {row: why for row, chunk in enumerate(actions) if (why := self._not_finite(chunk))}:
            actions[list(failures)] = np.nan
            raise ActionNotFiniteError(failures, actions)
        return actions

    def _say_actions(
        self, groups, states: np.ndarray, budget: int, temperature: float, seeds: Sequence[int]
    ) -> np.ndarray:
        """Robot units [B, A, D] of a FAST checkpoint."""
        config, names, failures = self.processor.config, self.processor.names, {}
        actions = np.full((len(seeds), config.horizon, len(names)), np.nan, np.float32)
        for rows, batch in groups:
            said = self._sampler(batch, budget, temperature, [seeds[row] for row in rows])
            for row, tokens in zip(rows, said, strict=True):
                try:
                    if (ids := self._sampler.answer(tokens)) is None:
                        raise FastDecodeError(
                            f"no <|im_end|> within {budget} tokens; raise max_tokens, or train longer"
                        )
                    chunk = self.processor.decode_action_tokens(ids, states[row])
                    if why := self._not_finite(chunk):
                        raise FastDecodeError(why)
                    actions[row] = chunk
                except ValueError as error:
                    failures[row] = str(error)
        if failures:
            raise ActionDecodeError(failures, actions)
        return actions

    def _not_finite(self, chunk: np.ndarray) -> str | None:
        """What to say of a chunk [A, D] with NaN or infinity; None if it has none."""
        wrong = ~np.isfinite(chunk).all(axis=0)
        if not wrong.any():
            return None
        dims = ", ".join(itertools.compress(self.processor.names, wrong))
        return f"the actions are not finite at dims {dims}: the weights are damaged, or training has diverged"

    def _sample_chunk(self, steps: int, params: tree.Tree, batch: Batch, noise: jax.Array) -> jax.Array:
        net = from_params(self.config, params)
        return net.sample_actions(net.embed_batch(batch), noise, batch.action_mask, steps)


def _listed(observation: Any) -> tuple[bool, list[Observation]]:
    """(was it one alone, the observations as a list)."""
    if isinstance(observation, Mapping):
        return True, [observation]
    if isinstance(observation, str) or not isinstance(observation, Iterable):
        raise ValueError(f"the observation is a {type(observation).__name__}; expected a dict, or a list of them")
    observations = list(observation)
    if not observations:
        raise ValueError("no observation was given")
    return False, observations
