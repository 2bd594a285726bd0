"""Proprioception and action heads (upstream's action_preprocessor), computed in float32.

Legend: B batch, A horizon, C model channels, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wallx_jax.models.config import WallXConfig
from wallx_jax.models.layers import Linear


def time_embedding(time: jax.Array, width: int) -> jax.Array:
    """Sinusoidal embedding of flow time in [0, 1]: float32 [B] -> [B, width], sines then cosines.

    Frequencies exp(-i ln(10000) / (width/2 - 1)); the time is not scaled (upstream's action_head.py).
    """
    half = width // 2
    frequencies = np.exp(np.arange(half) * -np.log(10000.0) / (half - 1)).astype(np.float32)
    angles = time[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ActionHeads(nnx.Module):
    def __init__(self, config: WallXConfig, *, rngs: nnx.Rngs):
        width, action = config.text.hidden_size, config.action
        self.width = width
        self.propri_proj = Linear(2 * action.state_dim, width, bias=False, rngs=rngs)
        self.w1 = Linear(2 * action.action_dim, width, bias=False, rngs=rngs)
        self.w2 = Linear(2 * width, width, bias=False, rngs=rngs)
        self.w3 = Linear(width, width, bias=False, rngs=rngs)
        self.proj_back = Linear(width, action.action_dim, bias=False, rngs=rngs)

    def embed_state(self, state: jax.Array, mask: jax.Array) -> jax.Array:
        """Normalised state and channel mask, [B, C] each -> [B, D]."""
        return self.propri_proj(jnp.concatenate([state, mask], axis=-1))

    def embed_time(self, time: jax.Array) -> jax.Array:
        """Flow time [B] -> its share of the action tokens' embedding, [B, D], for `embed_actions`.

        w2 reads [action | time]; the time's part is the same for all tokens, and known before sampling starts.
        """
        embedded = time_embedding(time, self.width)
        return self.w2(jnp.concatenate([jnp.zeros_like(embedded), embedded], axis=-1))

    def embed_actions(self, noisy: jax.Array, mask: jax.Array, time_emb: jax.Array) -> jax.Array:
        """Noisy actions and channel mask [B, A, C], embedded time [B, D] -> action token embeddings [B, A, D]."""
        actions = self.w1(jnp.concatenate([noisy, mask], axis=-1))
        # Zeros instead of a slice of the kernel: XLA's partitioner (jax 0.10) mixes samples up in the gradient of a
        # slice that is cut over fsdp, on a mesh of three axes.
        actions = self.w2(jnp.concatenate([actions, jnp.zeros_like(actions)], axis=-1))
        return self.w3(jax.nn.silu(actions + time_emb[:, None]))

    def velocity(self, hidden: jax.Array) -> jax.Array:
        """Hidden states of the action tokens [B, A, D] -> float32 velocity [B, A, C]."""
        return self.proj_back(hidden.astype(jnp.float32))
