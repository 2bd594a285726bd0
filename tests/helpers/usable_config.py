"""A configuration without mistakes, which no model or dataset stands behind."""

from ml_collections import ConfigDict

from wallx_jax.config import default_config


def usable(**changes) -> ConfigDict:
    """`changes` use "__" for the dot of nested keys."""
    c = default_config()
    c.pretrained_wallx_path, c.repo_id, c.save_path = "model", "lerobot/aloha_mobile_cabinet", "out"
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = c
        for parent in parents:
            section = section[parent]
        section[last] = value
    return c
