"""Look up the versions of installed packages."""

import importlib.metadata

# Recorded in checkpoints and printed by the doctor.
PACKAGES = (
    "wallx-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "lerobot", "transformers"
)  # fmt: skip


def package_version(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
