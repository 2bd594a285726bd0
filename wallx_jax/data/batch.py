"""The contract between data and model: what one training or acting batch holds.

Legend: B batch, h w image pixels, T prefix tokens, W label window, A action horizon, C model channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Arrays of one batch; a single sample is the same without the leading B. All shapes are static for a run.

    images: one uint8 [B, h, w, 3] RGB array per camera, in the order of the prompt's placeholders; h and w are
        multiples of 28 (patch 14 x merge 2).
    tokens: int32 [B, T] prefix tokens, left padded. The A action tokens that follow in flow mode are implied.
    token_mask: bool [B, T], False at padding.
    labels: int32 [B, W], the targets of the last W prefix positions (already aligned: labels[:, j] is the id at
        prefix position T - W + j, or -100 where there is no target); W = 0 when nothing is to be said. W < T.
    state, state_mask: float32 [B, C_state], normalised and zero padded; mask 1.0 where the robot has the channel.
    actions, action_mask: float32 [B, A, C], likewise. All zero when acting.
    action_is_pad: bool [B, A], True past the end of the episode.
    dataset: int32 [B], which dataset of a run with several a sample is from; None in a run with one.
    """

    images: tuple[Any, ...]
    tokens: Any
    token_mask: Any
    labels: Any
    state: Any
    state_mask: Any
    actions: Any
    action_mask: Any
    action_is_pad: Any
    dataset: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EvalBatch:
    """A batch of held-out frames.

    Attributes:
        batch: the samples.
        frame: uint32 [B], the frames' numbers in their dataset. Noise and flow times come from them, so that a frame
            has the same loss in whatever batch it is.
        counted: bool [B], False for samples that only fill the batch.
    """

    batch: Batch
    frame: Any
    counted: Any


def stack_samples(samples: Sequence[Batch]) -> Batch:
    """Stacks samples without a batch axis into one batch of NumPy arrays."""
    columns = {f.name: [getattr(sample, f.name) for sample in samples] for f in fields(Batch)}
    images = tuple(np.stack(camera) for camera in zip(*columns.pop("images"), strict=True))
    return Batch(images, **{name: None if rows[0] is None else np.stack(rows) for name, rows in columns.items()})


def describe(batch: Batch) -> dict[str, str]:
    """{"tokens": "int32[8,112]", ...}, for logs and error messages."""

    def text(x):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"

    return {
        f.name: ", ".join(map(text, value)) if isinstance(value := getattr(batch, f.name), tuple) else text(value)
        for f in fields(batch)
        if getattr(batch, f.name) is not None
    }
