"""What a training run carries from step to step."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wallx_jax.config.schema import OptimConfig
from wallx_jax.training.optimizer import is_trainable, make_optimizer
from wallx_jax.utils import tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32, optimizer steps tried. skipped: int32, those of them left out because of a non-finite loss or
    gradient. params: nested dict of all parameters. opt_state: optax state of the trainable ones. ema: moving average
    of the trainable ones, in their dtypes, where one is kept. gradients: the last ones, where their memory is kept for
    the next (`with_gradient_buffer`); no part of a checkpoint."""

    step: jax.Array
    skipped: jax.Array
    params: tree.Tree
    opt_state: Any
    ema: tree.Tree | None = None
    gradients: tree.Tree | None = None

    @property
    def acting(self) -> tree.Tree:
        """All parameters, those with a moving average replaced by it: what a checkpoint acts with."""
        if self.ema is None:
            return self.params
        return tree.unflatten(tree.flatten(self.params) | tree.flatten(self.ema))


def create_state(params: tree.Tree, config: OptimConfig, decay_steps: int) -> TrainState:
    """A fresh state around these parameters (concrete, traced or under jax.eval_shape)."""
    trainable, _ = tree.split(params, is_trainable(config))
    opt_state: optax.OptState = make_optimizer(config, decay_steps).init(trainable)
    zero = jnp.zeros((), jnp.int32)
    # Copies: a donated state must not hold an array twice.
    ema = jax.tree.map(jnp.copy, trainable) if config.ema_decay is not None else None
    return TrainState(zero, zero, params, opt_state, ema)


def with_gradient_buffer(state: TrainState, config: OptimConfig, micro_batches: int = 1) -> TrainState:
    """The state with memory for gradients, which a donated state passes on from step to step.

    For CPUs: there XLA asks the system for fresh memory at every step, and zeroing its pages costs 6% of the step. On
    other devices XLA keeps it anyway.
    """
    trainable, _ = tree.split(state.params, is_trainable(config))
    # Several micro-batches are summed in float32.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32 if micro_batches > 1 else x.dtype), trainable)
    return dataclasses.replace(state, gradients=zeros)
