"""Settings of the model: the source of its weights, and its numerics."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wallx_jax.models.config import Numerics
from wallx_jax.utils.settings import section, setting


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The source of the model's weights and its tokenizer. WALL-OSS and Qwen2.5-VL are told apart by their tensors.

    Attributes:
        numerics: (field, value) pairs of models.config.Numerics that the configuration sets.
    """

    path: str = setting(
        None, "weights and tokenizer: local directory or Hub repo id", key="pretrained_wallx_path", required=True
    )
    revision: str | None = setting(
        None, "Hub branch, tag or commit; None: the default branch", key="pretrained_revision"
    )
    action_expert_intermediate_size: int = setting(
        2048, "MLP width of the new action expert when starting from Qwen2.5-VL", above=0
    )
    use_fast_tokenizer: bool = setting(False, "True: autoregressive FAST action tokens; False: flow matching")
    action_tokenizer_path: str | None = setting(
        None, "FAST tokenizer, local directory or Hub repo id", only_with="use_fast_tokenizer"
    )
    numerics: tuple[tuple[str, Any], ...] = section(Numerics, unset=True)

    def apply_numerics(self, base: Numerics) -> Numerics:
        """Return `base`, the numerics of the checkpoint or the defaults, with the configured fields replaced."""
        return dataclasses.replace(base, **dict(self.numerics))

    @staticmethod
    def errors(v: Mapping[str, Any]) -> list[str]:
        """Check the section's settings against each other, given all settings by key."""
        if v["use_fast_tokenizer"] and not v["action_tokenizer_path"]:
            return ["action_tokenizer_path: required by use_fast_tokenizer = True, e.g. 'physical-intelligence/fast'"]
        return []
