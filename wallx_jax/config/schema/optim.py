"""Settings of the optimizer: learning rates, trainable parameters and adapters."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from wallx_jax.models.config import LoraConfig
from wallx_jax.utils.settings import Choice, section, setting


class Optimizer(Choice):
    """Update rules."""

    ADAMW = "adamw"
    ADAFACTOR = "adafactor"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rates, trainable parameters and adapters. Steps are optimizer updates.

    Attributes:
        learning_rates: (regular expression for parameter paths, peak learning rate); the first match applies.
        freeze_vlm: whether the configuration sets this or upstream's train_action_expert_only.
    """

    optimizer: Optimizer = setting(
        Optimizer.ADAMW, '"adamw", or "adafactor": factored second moment, no first; saves 8 GiB per moment at 3B'
    )
    learning_rate: float = setting(9e-5, "peak, after warmup", above=0)
    min_lr: float = setting(
        5e-5, "learning rate at the end of the cosine decay; other peaks decay by the same factor", minimum=0
    )
    warmup_steps: int = setting(100, "steps of linear warmup from 0 to the peak", key="num_warmup_steps", minimum=0)
    weight_decay: float = setting(0.1, "decoupled (AdamW), on every trained parameter as upstream", minimum=0)
    max_grad_norm: float = setting(1.0, "clip gradients to this global norm", above=0)
    action_expert_learning_rate: float | None = setting(
        None, "peak for the action expert; None: learning_rate", above=0
    )
    learning_rates: tuple[tuple[str, float], ...] = setting(
        (), 'peaks by parameter path, "REGEX=RATE"; the first match applies'
    )
    freeze_vlm: bool = setting(False, "train only the action expert and the action heads")
    train_action_expert_only: ClassVar[bool] = setting(False, "upstream's alias of freeze_vlm", derived=True)
    train_action_heads: bool = setting(
        True, "False: freeze the action heads too, as upstream (needs freeze_vlm or lora.rank)"
    )
    stochastic_rounding: bool = setting(True, "of bfloat16 parameters and moments; False: round to nearest")
    ema_decay: float | None = setting(
        None, "keep a moving average of trained parameters for inference, e.g. 0.999; None: off", above=0, below=1
    )
    lora: LoraConfig = section(LoraConfig, default=LoraConfig())

    @staticmethod
    def errors(v: Mapping[str, Any]) -> list[str]:
        """Check the section's settings, also against each other, given all settings by key."""
        errors = [
            f"learning_rates: {entry!r} is not PATTERN=RATE, e.g. '^vision/=1e-5'"
            for entry in v["learning_rates"]
            if not _is_rate(entry)
        ]
        for target in v["lora.targets"]:
            try:
                re.compile(target if isinstance(target, str) else "")
            except re.error as error:
                errors.append(f"lora.targets: {target!r} is not a regular expression: {error}")
        if v["min_lr"] > v["learning_rate"]:
            errors.append(f"min_lr = {v['min_lr']:g} exceeds learning_rate = {v['learning_rate']:g}: lower min_lr")
        if not v["train_action_heads"] and not is_vlm_frozen(v) and not v["lora.rank"]:
            errors.append(
                "train_action_heads = False has a meaning only with freeze_vlm, train_action_expert_only or lora.rank: "
                "set one of them, or leave it True"
            )
        return errors


def is_vlm_frozen(v: Mapping[str, Any]) -> bool:
    """Return whether freeze_vlm is set under either of its names, given all settings by key."""
    return v["freeze_vlm"] or v["train_action_expert_only"]


def pattern_and_rate(entry: str) -> tuple[str, float]:
    """Parse "^vision/=1e-5" into ("^vision/", 1e-5)."""
    pattern, _, rate = entry.rpartition("=")
    return pattern, float(rate)


def _is_rate(entry: Any) -> bool:
    try:
        pattern, rate = pattern_and_rate(str(entry))
        re.compile(pattern)
    except (ValueError, re.error):
        return False
    return 0 < rate < math.inf
