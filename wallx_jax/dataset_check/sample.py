"""Describe one training sample as text: prompt, labels, and state and actions before and after normalization.

Legend: A action horizon, D robot dims.
"""

import re
from collections.abc import Sequence

import numpy as np

from wallx_jax.data.batch import Batch
from wallx_jax.data.lerobot import RawSample
from wallx_jax.data.processor import Processor
from wallx_jax.data.prompt import IGNORE
from wallx_jax.data.tokenizer import Tokenizer

REPEATED = re.compile(r"(<\|[^|<>]+\|>)\1+")


def collapse(text: str) -> str:
    """Abbreviate repeated tokens: `<|image_pad|><|image_pad|><|image_pad|>` -> `<|image_pad|>x3`."""
    return REPEATED.sub(lambda run: f"{run[1]}x{len(run[0]) // len(run[1])}", text)


def describe_inputs(raw: RawSample, sample: Batch, processor: Processor, state_names: Sequence[str]) -> str:
    """Describe the inputs of a sample (no batch axis), next to the values recorded in its frame."""
    config, tokenizer = processor.config, processor.tokenizer
    sizes = ", ".join(
        f"{config.prompt.view_label(view)} <- {key} {image.shape[0]}x{image.shape[1]} px, {tokens} tokens"
        for view, key, image, tokens in zip(
            config.views, config.camera_keys, sample.images, config.image_tokens, strict=True
        )
    )
    parts = [
        f"episode {raw.episode}, frame {raw.frame}: {raw.instruction!r}",
        f"images, in order (height x width): {sizes}",
        f"prompt: {len(sample.tokens)} tokens, {int(sample.token_mask.sum())} without padding",
        _indent(collapse(tokenizer.decode(sample.tokens))),
        f"labels: {_labels(sample, tokenizer)}",
        "state:",
        _rows(state_names, raw.state, sample.state, sample.state_mask),
    ]
    return "\n".join(parts)


def describe_actions(raw: RawSample, sample: Batch, processor: Processor, names: Sequence[str]) -> str:
    """Describe the target actions of a sample (no batch axis), step by step."""
    config = processor.config
    parts = [f"actions: {config.horizon} steps, {int(sample.action_is_pad.sum())} of them past the episode's end"]
    if processor.relative.any():
        relative = [name for name, on in zip(names, processor.relative, strict=True) if on]
        parts.append(f"  as differences from the state: {', '.join(relative)}")
    actions = raw.actions - processor.reference(raw.state)
    for step in range(config.horizon):
        rows = _rows(names, actions[step], sample.actions[step], sample.action_mask[step])
        parts.append(f"  step {step}{' (past the end)' if sample.action_is_pad[step] else ''}\n{rows}")
    spare = config.action_dim - processor.action.dims
    if spare:
        parts.append(f"  and {spare} channels that this robot lacks: 0, mask 0")
    return "\n".join(parts)


def _labels(sample: Batch, tokenizer: Tokenizer) -> str:
    if not len(sample.labels):
        return "none (flow matching)"
    targets = [int(label) for label in sample.labels if label != IGNORE]
    return f"{len(targets)} of the last {len(sample.labels)} positions\n{_indent(collapse(tokenizer.decode(targets)))}"


def _rows(names: Sequence[str], raw: np.ndarray, normalized: np.ndarray, mask: np.ndarray) -> str:
    width = max(map(len, names))
    return "\n".join(
        f"    {name:{width}}  {before:12.6g} -> {after:9.5f}{'' if on else '  masked'}"
        for name, before, after, on in zip(names, raw, normalized, mask, strict=False)
    )


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
