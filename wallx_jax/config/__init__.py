"""The configuration of a run: every setting with its default, checked and resolved."""

from wallx_jax.config.resolve import default_config, flatten, recorded, resolve
from wallx_jax.utils.errors import ConfigError

__all__ = ["ConfigError", "default_config", "flatten", "recorded", "resolve"]
