"""Wall-X (WALL-OSS) vision-language-action policies in JAX.

To train, call `wallx_jax.train.run(config)`.
"""

from importlib import import_module
from typing import Any

from wallx_jax.utils import extras

__version__ = "0.1.0"

# Imported on first use, so that importing the package stays cheap.
_EXPORTS = {
    "load_params": "wallx_jax.weights.load",
    "load_policy": "wallx_jax.inference.load",
    "load_vlm": "wallx_jax.inference.load",
    "compute_stats": "wallx_jax.data.stats",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        try:
            return getattr(import_module(_EXPORTS[name]), name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in extras.PACKAGES["train"]:
                extras.require("train", __name__)
            raise
    raise AttributeError(f"module 'wallx_jax' has no attribute {name!r}")
