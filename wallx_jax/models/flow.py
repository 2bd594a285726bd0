"""Flow matching from noise (t = 0) to actions (t = 1), in float32: training targets, loss and Euler sampling.

x_t = (1 - t) noise + t action, velocity = action - noise. Source: upstream's action_head.py since December 2025; pi0
(arXiv 2410.24164) with time reversed.

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
    """Sample standard normal noise [B, A, C] and times t = (1 - u) s, u ~ Beta(alpha, beta), [B]; both float32."""
    noise_key, time_key = jax.random.split(key)
    u = jax.random.beta(time_key, config.beta_alpha, config.beta_beta, shape[:1], jnp.float32)
    return jax.random.normal(noise_key, shape, jnp.float32), (1 - u) * config.time_scale


def interpolate(actions: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """Return x_t [B, A, C] between noise and actions [B, A, C] at time [B]."""
    t = time[:, None, None]
    return (1 - t) * noise + t * actions


def target_velocity(actions: jax.Array, noise: jax.Array) -> jax.Array:
    """Return the velocity dx_t/dt between noise and actions, [B, A, C]; the same at all times."""
    return actions - noise


def euler_times(steps: int) -> jax.Array:
    """Return the float32 times linspace(0, 1, steps + 1) of an Euler integration with `steps` steps."""
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
    """Integrate the velocity field with Euler steps, from noise to a normalised action chunk.

    Args:
        velocity: velocity(x [B, A, C], slice of per_step, state) -> (velocity [B, A, C], new state).
        noise: [B, A, C].
        times: float32 [steps + 1], see `euler_times`.
        per_step: pytree of arrays with a leading axis of steps.
        state: pytree that each call of `velocity` passes to the next.
        mask: [B, A, C], 1 for the channels that the robot has.
        masked_dims: the other channels "drift" with the predicted velocity, or are "held" on the straight line from
            their noise to the normalised zero.

    Returns:
        float32 [B, A, C].
    """

    def step(carry: tuple[jax.Array, Any], span: tuple[jax.Array, Any]) -> tuple[tuple[jax.Array, Any], None]:
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
    """Sum the squared velocity error over the channels in the mask.

    Args:
        velocity: predicted velocity, float32 [B, A, C].
        target: float32 [B, A, C].
        mask: float32 [B, A, C], 1 for the channels that count.
        is_pad: bool [B, A], actions to exclude; None excludes none.
        per_sample: return [B] instead of a scalar.
    """
    return reduce_sum(jnp.square(velocity - target) * _without(mask, is_pad), per_sample)


def flow_count(mask: jax.Array, reduction: str, is_pad: jax.Array | None = None, per_sample: bool = False) -> jax.Array:
    """Return the denominator of the flow loss.

    Args:
        mask: [B, A, C]; any leading axes are allowed unless `per_sample`.
        reduction: count "all" channels, as upstream, or only the "valid" ones in the mask.
        is_pad: bool [B, A], actions to exclude; None excludes none.
        per_sample: return [B] instead of a scalar.
    """
    return reduce_sum(_without(mask if reduction == "valid" else jnp.ones_like(mask), is_pad), per_sample)


def _without(mask: jax.Array, is_pad: jax.Array | None) -> jax.Array:
    return mask if is_pad is None else mask * ~is_pad[..., None]
