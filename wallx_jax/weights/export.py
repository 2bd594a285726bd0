"""Parameters back to a PyTorch model directory."""

import json
from pathlib import Path

import jax
import numpy as np

from wallx_jax import tree
from wallx_jax.models.config import WallXConfig
from wallx_jax.weights.names import torch_tensors
from wallx_jax.weights.safetensors_io import SINGLE, atomic_file, write_safetensors


def save_directory(directory: str | Path, config: WallXConfig, params: tree.Tree) -> None:
    """Writes config.json and model.safetensors, in upstream's names (Qwen2.5-VL's for a model without an action side).

    A tied head is not written. Each tensor keeps the dtype that the parameter has, so nothing is lost; the file may mix
    dtypes where `Numerics.float32_islands` does. `load_params` reads it back bit for bit.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / SINGLE, torch_tensors(config, jax.tree.map(np.asarray, params)))
    with atomic_file(directory / "config.json") as file:
        file.write(json.dumps(config.to_hf(), indent=2).encode() + b"\n")
