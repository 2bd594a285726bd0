"""Flow matching from noise (t = 0) to actions (t = 1): x_t = (1 - t) noise + t action, velocity = action - noise.

Everything in float32. Source: upstream's action_head.py since December 2025; pi0 (arXiv 2410.24164) with time reversed.

Legend: B batch, A horizon, C channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wallx_jax.models.config import ActionConfig
from wallx_jax.models.losses import reduce_sum


def sample_noise_and_time(
    key: jax.Array, shape: tuple[int, int, int], config: ActionConfig
) -> tuple[jax.Array, jax.Array]:
    """Standard normal noise [B, A, C] and t = (1 - u) s with u ~ Beta(alpha, beta), [B]; both float32."""
    noise_key, time_key = jax.random.split(key)
    u = jax.random.beta(time_key, config.beta_alpha, config.beta_beta, shape[:1], jnp.float32)
    return jax.random.normal(noise_key, shape, jnp.float32), (1 - u) * config.time_scale


def interpolate(actions: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """x_t [B, A, C] at time [B]."""
    t = time[:, None, None]
    return (1 - t) * noise + t * actions


def euler_times(steps: int) -> jax.Array:
    """linspace(0, 1, steps + 1), float32."""
    return jnp.linspace(0, 1, steps + 1, dtype=jnp.float32)


def integrate(
    velocity: Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]],
    noise: jax.Array,
    times: jax.Array,
    per_step: Any,
    state: Any,
    mask: jax.Array,
    masked_dims: str,
) -> jax.Array:
    """Euler steps along `times` (see `euler_times`) from noise [B, A, C] to a normalised chunk.

    velocity(x [B, A, C], its part of per_step, state) -> ([B, A, C], state). per_step: arrays with a leading axis of
    steps. state: what one call leaves to the next. mask [B, A, C]: channels that the robot has; the others "drift" with
    the predicted velocity, or are "held" on the straight line from their noise to the normalised zero.
    """

    def step(carry, span):
        (x, state), (duration, part) = carry, span
        v, state = velocity(x, part, state)
        if masked_dims == "held":
            v = jnp.where(mask > 0, v, -noise)
        return (x + duration * v, state), None

    return jax.lax.scan(step, (noise, state), (jnp.diff(times), per_step))[0][0]


def flow_error_sum(
    velocity: jax.Array,
    target: jax.Array,
    mask: jax.Array,
    is_pad: jax.Array | None = None,
    per_sample: bool = False,
) -> jax.Array:
    """Summed squared velocity error over the channels in mask, all [B, A, C] float32, without the actions that
    is_pad, bool [B, A], marks."""
    return reduce_sum(jnp.square(velocity - target) * _without(mask, is_pad), per_sample)


def flow_count(mask: jax.Array, reduction: str, is_pad: jax.Array | None = None, per_sample: bool = False) -> jax.Array:
    """What the sum is divided by: "all" channels of mask [B, A, C], as upstream, or the "valid" ones; without the
    actions that is_pad, bool [B, A], marks. Not per sample, any leading axes do."""
    return reduce_sum(_without(mask if reduction == "valid" else jnp.ones_like(mask), is_pad), per_sample)


def _without(mask: jax.Array, is_pad: jax.Array | None) -> jax.Array:
    return mask if is_pad is None else mask * ~is_pad[..., None]
