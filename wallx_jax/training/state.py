"""Define the training state that is carried from step to step."""

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
    """State of a training run.

    Attributes:
        step: int32 [], optimizer steps attempted.
        skipped: int32 [], those among them that were skipped because of a non-finite loss or gradient.
        params: nested dict of all parameters.
        opt_state: optax state of the trainable parameters.
        ema: moving average of the trainable parameters, in their dtypes; None if none is kept.
        gradients: the last gradients, kept only to reuse their memory in the next step (`with_gradient_buffer`); not
            part of a checkpoint.
    """

    step: jax.Array
    skipped: jax.Array
    params: tree.Tree
    opt_state: Any
    ema: tree.Tree | None = None
    gradients: tree.Tree | None = None

    @property
    def acting(self) -> tree.Tree:
        """Parameters for inference: EMA values where an EMA is kept."""
        if self.ema is None:
            return self.params
        return tree.unflatten(tree.flatten(self.params) | tree.flatten(self.ema))


def create_state(params: tree.Tree, config: OptimConfig, decay_steps: int) -> TrainState:
    """Create a new training state from parameters (concrete, traced or under jax.eval_shape)."""
    trainable, _ = tree.split(params, is_trainable(config))
    opt_state: optax.OptState = make_optimizer(config, decay_steps).init(trainable)
    zero = jnp.zeros((), jnp.int32)
    # Copies, because a donated state must not contain the same array twice.
    ema = jax.tree.map(jnp.copy, trainable) if config.ema_decay is not None else None
    return TrainState(zero, zero, params, opt_state, ema)


def with_gradient_buffer(state: TrainState, config: OptimConfig, micro_batches: int = 1) -> TrainState:
    """Return the state with a gradient buffer, which is passed on from step to step by donating the state.

    This is for CPUs, where XLA allocates new memory from the system at every step, and zeroing its pages costs 6% of
    the step. On other devices XLA reuses the memory anyway.
    """
    trainable, _ = tree.split(state.params, is_trainable(config))
    # Several micro-batches are summed in float32.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32 if micro_batches > 1 else x.dtype), trainable)
    return dataclasses.replace(state, gradients=zeros)
