"""The smallest model, optimizer and batch that a train step takes."""

import jax
import numpy as np

from wallx_jax.config.schema import OptimConfig
from wallx_jax.data.batch import Batch
from wallx_jax.models.config import TINY
from wallx_jax.utils import tree

OPTIM = OptimConfig(
    learning_rate=1e-3,
    min_lr=1e-4,
    warmup_steps=2,
    action_expert_learning_rate=None,
    weight_decay=0.1,
    max_grad_norm=1.0,
    freeze_vlm=False,
    train_action_heads=True,
)
SMALL = TINY.replace(
    vision={"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": (0,)},
    text={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "mrope_section": (1, 1, 2)},
    action={"intermediate_size": 16, "action_dim": 6, "state_dim": 6},
)
HORIZON = 3


def random_batch(leading: tuple[int, ...], seed: int = 0, labels: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 600, (*leading, 12))
    tokens[..., 3], tokens[..., 8] = SMALL.tokens.image, SMALL.tokens.propri
    channels = np.broadcast_to((np.arange(6) < 4).astype(np.float32), (*leading, HORIZON, 6))
    return Batch(
        images=(rng.integers(0, 256, (*leading, 28, 28, 3), dtype=np.uint8),),
        tokens=tokens.astype(np.int32),
        token_mask=np.ones(tokens.shape, bool),
        labels=np.where(rng.random((*leading, labels)) < 0.5, -100, 7).astype(np.int32),
        state=rng.uniform(-1, 1, (*leading, 6)).astype(np.float32),
        state_mask=np.ones((*leading, 6), np.float32),
        actions=(rng.uniform(-1, 1, (*leading, HORIZON, 6)) * channels).astype(np.float32),
        action_mask=channels,
        action_is_pad=np.zeros((*leading, HORIZON), bool),
    )


def leaves(params):
    return tree.flatten(jax.device_get(params))
