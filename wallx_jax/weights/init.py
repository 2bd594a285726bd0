"""Initialize parameters that the weight files lack, resize the vocabulary and widen the robot channels.

Works on host arrays, as `load_params` reads them, before they are placed on devices. Leaves that keep their shape are
returned as they are.
"""

import dataclasses
import warnings
import zlib

import numpy as np

from wallx_jax.models.config import WallXConfig
from wallx_jax.utils import tree

VOCABULARY = ("embed/embedding", "lm_head/kernel")
CHANNELS = ("action/propri_proj/kernel", "action/w1/kernel", "action/proj_back/kernel")


def init_param(path: str, shape: tuple[int, ...], dtype: np.dtype, config: WallXConfig, seed: int) -> np.ndarray:
    """Initialize a parameter with normal(0, initializer_range), as upstream does for weights missing in the files.

    Adapters are initialized as in `models.lora`. The values depend only on the arguments: the random generator is
    seeded with `seed` and `path`.
    """
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    if path.endswith("/lora_b"):
        return np.zeros(shape, dtype)
    if path.endswith("/lora_a"):
        return rng.uniform(-1, 1, shape).astype(dtype) * dtype.type(shape[-2] ** -0.5)
    values = rng.standard_normal(shape, np.float32)
    values *= config.text.initializer_range
    return values.astype(dtype)


def resize_vocabulary(
    config: WallXConfig, params: tree.Tree, rows: int, seed: int = 0
) -> tuple[WallXConfig, tree.Tree]:
    """Truncate the embedding (and an untied head) to `rows` tokens, or append new ones.

    New rows follow transformers' `resize_token_embeddings(mean_resizing=True)`: normal around the mean of the old rows
    with 1e-9 times their covariance, so that new tokens are equally likely at first but distinct. The noise consists of
    random combinations of centered old rows, which have that covariance without a matrix decomposition.

    Returns:
        The config with the new `vocab_size`, and the parameters.

    Raises:
        ValueError: if `rows` is less than 1.
    """
    if rows < 1:
        raise ValueError(f"vocabulary rows must be positive, got {rows}")
    flat = tree.flatten(params)
    for path in VOCABULARY:
        if path in flat and rows != config.text.vocab_size:
            table = np.asarray(flat[path]) if path == "embed/embedding" else np.asarray(flat[path]).T
            table = table[:rows] if rows < len(table) else _grow(table, rows, seed)
            flat[path] = np.array(table if path == "embed/embedding" else table.T, order="C")
    return config.replace(text={"vocab_size": rows}), tree.unflatten(flat)


def _grow(table: np.ndarray, rows: int, seed: int, samples: int = 1024) -> np.ndarray:
    """Append rows to a table [old rows, D], up to [rows, D]; `samples` old rows estimate the covariance."""
    rng = np.random.default_rng(seed)
    mean = table.mean(axis=0, dtype=np.float64).astype(np.float32)
    centered = table[rng.integers(len(table), size=samples)].astype(np.float32) - mean
    mixture = rng.standard_normal((rows - len(table), samples), np.float32) * np.float32((1e-9 / samples) ** 0.5)
    return np.concatenate([table, (mean + mixture @ centered).astype(table.dtype)])


def widen_channels(
    config: WallXConfig, params: tree.Tree, action_dim: int, state_dim: int, seed: int = 0
) -> tuple[WallXConfig, tree.Tree]:
    """Widen the action heads to at least `action_dim` and `state_dim` channels, with a warning if channels are added.

    The heads' inputs are [values | mask]: new channels are appended to each half. Their weights are freshly
    initialized; if the new channels of the inputs are zero, the outputs of the old channels do not change.

    Returns:
        The config with the new numbers of channels, and the parameters.

    Raises:
        ValueError: if the model has no action heads.
    """
    old = config.action
    if old.intermediate_size is None:
        raise ValueError(f"the model has no action side to widen to {action_dim} action and {state_dim} state channels")
    new = dataclasses.replace(old, action_dim=max(action_dim, old.action_dim), state_dim=max(state_dim, old.state_dim))
    if new == old:
        return config, params
    warnings.warn(
        f"the robot has {action_dim} action and {state_dim} state channels, the checkpoint {old.action_dim} and "
        f"{old.state_dim}: the projection weights of the channels it lacks are freshly initialized and must be trained",
        stacklevel=2,
    )
    flat = tree.flatten(params)

    def add(path: str, kernel: np.ndarray, axis: int, count: int) -> np.ndarray:
        shape = list(kernel.shape)
        shape[axis] = count
        return np.concatenate([kernel, init_param(path, tuple(shape), kernel.dtype, config, seed)], axis=axis)

    for path, before, after in (
        ("action/propri_proj/kernel", old.state_dim, new.state_dim),
        ("action/w1/kernel", old.action_dim, new.action_dim),
    ):
        values, mask = np.split(np.asarray(flat[path]), 2)
        flat[path] = np.concatenate(
            [add(f"{path}/values", values, 0, after - before), add(f"{path}/mask", mask, 0, after - before)]
        )
    path = "action/proj_back/kernel"
    flat[path] = add(path, np.asarray(flat[path]), 1, new.action_dim - old.action_dim)
    return dataclasses.replace(config, action=new), tree.unflatten(flat)
