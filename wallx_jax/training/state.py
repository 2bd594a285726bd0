"""Define the training state that is carried from step to step, and how its memory is reused.

The train step is given the old state to overwrite ("donated"), but what XLA makes of that differs by platform, and a
state is most of a run's memory. The difference is confined to the second half of this file:

- An update that must not be applied is skipped by `skip_with_cond` on a CPU and by `skip_with_where` on accelerators.
  There XLA updates the state in place; with the other one, either platform needs memory for two states.
- On a CPU the state also carries a buffer for the gradients, see `with_gradient_buffer`.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from wallx_jax.training.optimizer import Optimizer
from wallx_jax.utils import tree

T = TypeVar("T")


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
    def updates(self) -> jax.Array:
        """int32 [], updates applied: the count in `opt_state`, at which learning-rate schedules are evaluated."""
        return self.step - self.skipped

    @property
    def eval_params(self) -> tree.Tree:
        """Parameters for inference: EMA values where an EMA is kept."""
        if self.ema is None:
            return self.params
        return tree.unflatten(tree.flatten(self.params) | tree.flatten(self.ema))


def create_state(params: tree.Tree, optimizer: Optimizer) -> TrainState:
    """Create a new training state from parameters (concrete, traced or under jax.eval_shape)."""
    trainable, _ = tree.split(params, optimizer.is_trainable)
    opt_state: optax.OptState = optimizer.tx.init(trainable)
    zero = jnp.zeros((), jnp.int32)
    # Copies, because a donated state must not contain the same array twice.
    ema = jax.tree.map(jnp.copy, trainable) if optimizer.config.ema_decay is not None else None
    return TrainState(zero, zero, params, opt_state, ema)


# ---- memory ----------------------------------------------------------------------------------------------------------


def update_if(finite: jax.Array, update: Callable[[T], T], before: T) -> T:
    """Return `update(before)`, or `before` if `finite` is False, in the way that suits the platform it is compiled for.

    Args:
        finite: bool [].
        update: computes new arrays of the same shapes and dtypes.
        before: pytree of arrays.
    """
    return jax.lax.platform_dependent(
        before,
        cpu=functools.partial(skip_with_cond, finite, update),
        default=functools.partial(skip_with_where, finite, update),
    )


def skip_with_cond(finite: jax.Array, update: Callable[[T], T], before: T) -> T:
    """Implement `update_if` by computing the update only if it is applied."""
    return jax.lax.cond(finite, update, lambda kept: kept, before)


def skip_with_where(finite: jax.Array, update: Callable[[T], T], before: T) -> T:
    """Implement `update_if` by always computing the update and selecting element by element."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(before), before)


def with_gradient_buffer(state: TrainState, optimizer: Optimizer, micro_batches: int = 1) -> TrainState:
    """Return the state with a gradient buffer, which is passed on from step to step by donating the state.

    This is for CPUs, where XLA allocates new memory from the system at every step, and zeroing its pages costs 6% of
    the step. On other devices XLA reuses the memory anyway.
    """
    trainable, _ = tree.split(state.params, optimizer.is_trainable)
    # Several micro-batches are summed in float32.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32 if micro_batches > 1 else x.dtype), trainable)
    return dataclasses.replace(state, gradients=zeros)
