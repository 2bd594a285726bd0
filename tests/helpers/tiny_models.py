"""Tiny random model directories."""

import json
from pathlib import Path

import numpy as np

from wallx_jax.models.config import PRESETS
from wallx_jax.models.params import abstract_params
from wallx_jax.utils import tree
from wallx_jax.weights.names import torch_tensors
from wallx_jax.weights.safetensors_io import write_safetensors

SMALL = PRESETS["tiny"].replace(
    vision={"depth": 2, "fullatt_block_indexes": (1,)}, text={"num_hidden_layers": 3, "vocab_size": 90}
)
SMALL_QWEN = SMALL.replace(action={"intermediate_size": None})


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return tree.map_with_path(
        lambda path, spec: rng.standard_normal(spec.shape, np.float32).astype(spec.dtype), abstract_params(config)
    )


class Directory:
    """A model directory whose tensors and config a test may change before they are written."""

    def __init__(self, path: Path, config, params):
        self.path, self.config, self.params = path, config, params
        self.tensors = torch_tensors(config, params)
        self.hf = config.to_hf()

    def write(self) -> Path:
        self.path.mkdir(exist_ok=True)
        write_safetensors(self.path / "model.safetensors", self.tensors)
        (self.path / "config.json").write_text(json.dumps(self.hf))
        return self.path
