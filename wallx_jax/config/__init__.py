"""Define, validate and resolve the configuration of a training run."""

from wallx_jax.config.defaults import default_config, flatten
from wallx_jax.config.resolve import recorded, resolve
from wallx_jax.utils.errors import ConfigError

__all__ = ["ConfigError", "default_config", "flatten", "recorded", "resolve"]
