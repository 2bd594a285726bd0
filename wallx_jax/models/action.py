"""Proprioception and action heads, computed in float32 (upstream's action_preprocessor).

Legend: B batch, A horizon, C model channels, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wallx_jax.models.config import WallXConfig
from wallx_jax.models.layers import Linear


def time_embedding(time: jax.Array, width: int) -> jax.Array:
    """Embed flow time sinusoidally, without scaling it (upstream's action_head.py).

    Args:
        time: float32 [B], in [0, 1].
        width: D.

    Returns:
        float32 [B, D]: sines, then cosines, of the frequencies exp(-i ln(10000) / (D/2 - 1)).
    """
    half = width // 2
    frequencies = np.exp(np.arange(half) * -np.log(10000.0) / (half - 1)).astype(np.float32)
    angles = time[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ActionHeads(nnx.Module):
    """Linear projections between robot channels and the decoder's embedding space.

    Inputs are concatenated with their channel mask, hence the factor 2. The kernels are propri_proj
    [2 * state_dim, D], w1 [2 * action_dim, D], w2 [2 D, D], w3 [D, D] and proj_back [D, action_dim]; no biases.
    """

    def __init__(self, config: WallXConfig, *, rngs: nnx.Rngs):
        width, action = config.text.hidden_size, config.action
        self.width = width
        self.propri_proj = Linear(2 * action.state_dim, width, bias=False, rngs=rngs)
        self.w1 = Linear(2 * action.action_dim, width, bias=False, rngs=rngs)
        self.w2 = Linear(2 * width, width, bias=False, rngs=rngs)
        self.w3 = Linear(width, width, bias=False, rngs=rngs)
        self.proj_back = Linear(width, action.action_dim, bias=False, rngs=rngs)

    def embed_state(self, state: jax.Array, mask: jax.Array) -> jax.Array:
        """Project the normalised state and its channel mask, [B, C] each, to an embedding [B, D]."""
        return self.propri_proj(jnp.concatenate([state, mask], axis=-1))

    def embed_time(self, time: jax.Array) -> jax.Array:
        """Return the contribution [B, D] of flow time [B] to the action token embeddings, for `embed_actions`.

        The input of w2 is [action | time]; the time half is the same for all action tokens and can be computed before
        sampling starts.
        """
        embedded = time_embedding(time, self.width)
        return self.w2(jnp.concatenate([jnp.zeros_like(embedded), embedded], axis=-1))

    def embed_actions(self, noisy: jax.Array, mask: jax.Array, time_emb: jax.Array) -> jax.Array:
        """Embed noisy actions as action tokens.

        Args:
            noisy: noisy actions [B, A, C].
            mask: channel mask [B, A, C].
            time_emb: embedded time [B, D], from `embed_time`.

        Returns:
            Action token embeddings [B, A, D].
        """
        actions = self.w1(jnp.concatenate([noisy, mask], axis=-1))
        # Pad with zeros instead of slicing the kernel: on a mesh of three axes, XLA's partitioner (jax 0.10) mixes up
        # samples in the gradient of a slice of a kernel sharded over fsdp.
        actions = self.w2(jnp.concatenate([actions, jnp.zeros_like(actions)], axis=-1))
        return self.w3(jax.nn.silu(actions + time_emb[:, None]))

    def velocity(self, hidden: jax.Array) -> jax.Array:
        """Project the hidden states of the action tokens [B, A, D] to a float32 velocity [B, A, C]."""
        return self.proj_back(hidden.astype(jnp.float32))
