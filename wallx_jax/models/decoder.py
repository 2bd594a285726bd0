"""Qwen2.5's decoder with Wall-X's two experts.

All tokens share attention and norms; prefix tokens use the MLP of expert "vlm", the action tokens of the suffix that
of expert "action". The start of the suffix is static, so routing is a slice.

Legend: B batch, T tokens of this call, S keys, N query heads, K key heads, H head dim, D width, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wallx_jax.models import scan
from wallx_jax.models.attention import dot_product_attention
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.layers import Linear, RMSNorm, SwiGLU
from wallx_jax.models.rope import apply_rope, mrope_angles


class KV(NamedTuple):
    """Keys (after RoPE) and values of one layer, [B, K, S, H] each, or of all stacked layers, [L, B, K, S, H]."""

    keys: jax.Array
    values: jax.Array


Cache = KV | list[KV]  # all layers: stacked, or a list with one entry per layer


def pad_cache(cache: Cache, places: int) -> Cache:
    """Extend the S axis of the cache by `places` zeros, to be written later."""
    return jax.tree.map(lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, places), (0, 0)]), cache)


class DecoderOutput(NamedTuple):
    """Output of the decoder.

    Attributes:
        hidden: [B, T, D] after the final norm; only the `last` tokens if that was given.
        kv: with `keep_kv`, keys and values of this call's tokens, or the whole cache including them; else None.
        layers: with `keep_layers`, output of each layer before the final norm, [L, B, T, D]; else None.
    """

    hidden: jax.Array
    kv: Cache | None
    layers: jax.Array | None


class Attention(nnx.Module):
    """Grouped-query self-attention with M-RoPE and an optional KV cache, [B, T, D] -> [B, T, D].

    The projections are q [D, N*H], k and v [D, K*H], all with biases, and o [N*H, D] without.
    """

    def __init__(self, config: WallXConfig, *, rngs: nnx.Rngs):
        text = config.text
        self.heads, self.kv_heads, self.head_dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        self.q = Linear(text.hidden_size, self.heads * self.head_dim, bias=True, rngs=rngs)
        self.k = Linear(text.hidden_size, self.kv_heads * self.head_dim, bias=True, rngs=rngs)
        self.v = Linear(text.hidden_size, self.kv_heads * self.head_dim, bias=True, rngs=rngs)
        self.o = Linear(self.heads * self.head_dim, text.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x, cos, sin, mask, cache: KV | None, start, last: int) -> tuple[jax.Array, KV]:
        """Compute the attention output of the last `last` tokens of x; keys and values cover all of x.

        Args:
            x: [B, T, D].
            cos: float32 [B, T, H].
            sin: float32 [B, T, H].
            mask: bool [B, T, S], True where a token may attend.
            cache: keys and values [B, K, S, H], written from `start` on; None: S = T.
            start: index in the cache of the first token of x.
            last: number of tokens at the end of x to compute.

        Returns:
            Output [B, last, D], and the keys and values attended to, [B, K, S, H].
        """
        q = self.q(x[:, -last:]).reshape(len(x), last, self.heads, self.head_dim)
        q = apply_rope(q, cos[:, -last:], sin[:, -last:])
        k = apply_rope(self.k(x).reshape(*x.shape[:2], self.kv_heads, self.head_dim), cos, sin)
        v = self.v(x).reshape(*x.shape[:2], self.kv_heads, self.head_dim)
        kv = KV(k.swapaxes(1, 2), v.swapaxes(1, 2))
        if cache is not None:
            kv = jax.tree.map(lambda x, own: jax.lax.dynamic_update_slice_in_dim(x, own, start, axis=2), cache, kv)
        return self.o(dot_product_attention(q, *kv, mask[:, -last:])), kv


class Experts(nnx.Module):
    """The SwiGLU MLPs of the two experts, "vlm" and "action", [B, T, D] -> [B, T, D].

    A plain Qwen2.5-VL has only expert "vlm".
    """

    def __init__(self, config: WallXConfig, *, rngs: nnx.Rngs):
        text, action = config.text, config.action
        self.vlm = SwiGLU(text.hidden_size, text.intermediate_size, bias=False, rngs=rngs)
        if action.intermediate_size is not None:
            self.action = SwiGLU(text.hidden_size, action.intermediate_size, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, num_actions: int) -> jax.Array:
        """Apply the action expert to the last `num_actions` tokens of x [B, T, D], expert "vlm" to the others."""
        if num_actions == 0:
            return self.vlm(x)
        if num_actions == x.shape[1]:
            return self.action(x)
        start = x.shape[1] - num_actions
        return jnp.concatenate([self.vlm(x[:, :start]), self.action(x[:, start:])], axis=1)


class DecoderLayer(nnx.Module):
    """Pre-norm transformer layer: attention, then the experts, each with a residual; [B, T, D] -> [B, T, D]."""

    def __init__(self, config: WallXConfig, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.text.hidden_size, config.text.rms_norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.post_norm = RMSNorm(config.text.hidden_size, config.text.rms_norm_eps)
        self.mlp = Experts(config, rngs=rngs)

    def __call__(self, x, cos, sin, mask, num_actions: int, cache: KV | None, start, last: int) -> tuple[jax.Array, KV]:
        """Return the layer's output [B, last, D] for the last `last` tokens of x, and the keys and values of all.

        Arguments as in `Attention` and `Experts`.
        """
        attended, kv = self.attn(self.input_norm(x), cos, sin, mask, cache, start, last)
        x = x[:, -last:] + attended
        return x + self.mlp(self.post_norm(x), num_actions), kv


class Decoder(nnx.Module):
    """All decoder layers and the final norm, [B, T, D] -> [B, T, D].

    The layers are stacked and scanned if `stacked`, else unrolled; see models.scan.
    """

    def __init__(self, config: WallXConfig, stacked: bool = True, *, rngs: nnx.Rngs):
        self.config = config
        layers = config.text.num_hidden_layers
        self.layers = scan.build(lambda keys: DecoderLayer(config, rngs=keys), layers, stacked, rngs)
        self.norm = RMSNorm(config.text.hidden_size, config.text.rms_norm_eps)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        *,
        num_actions: int = 0,
        cache: Cache | None = None,
        start: int | jax.Array = 0,
        keep_kv: bool = False,
        keep_layers: bool = False,
        last: int | None = None,
    ) -> DecoderOutput:
        """Run the embeddings x through all layers.

        Args:
            x: [B, T, D].
            positions: int [3, B, T].
            mask: bool [B, T, S], True where a token may attend.
            num_actions: number of action tokens, at the end of x.
            cache: keys and values of length S, of which this call writes T from `start` on. None: tokens attend only
                to each other, and S = T.
            start: index in the cache of the first token of x.
            keep_kv: return keys and values.
            keep_layers: return the output of each layer.
            last: number of tokens at the end of x to return; None: all. If layers are unrolled, the last layer computes
                only keys and values for the other tokens.
        """
        angles = mrope_angles(positions, self.config.text, self.config.numerics.mrope_layout)
        # The barrier keeps XLA from recomputing both for every head of every layer.
        cos, sin = jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))

        length, remat = x.shape[1], self.config.numerics.remat
        last = last or length

        def body(x, layer_and_rest):
            layer, (kv, last) = layer_and_rest
            x, kv = layer(x, cos, sin, mask, num_actions, kv, start, last or length)
            return x, (kv if keep_kv else None, x if keep_layers else None)

        if scan.is_stacked(self.layers):
            x, outputs = scan.run(body, x, self.layers, remat, (cache, None))
            return DecoderOutput(self.norm(x[:, -last:]), *outputs)
        count = len(self.layers)
        rest = zip(cache or [None] * count, [length] * (count - 1) + [last], strict=True)
        x, outputs = scan.run(body, x, self.layers, remat, list(rest))
        kv = [kv for kv, _ in outputs] if keep_kv else None
        layers = jnp.stack([x for _, x in outputs]) if keep_layers else None
        return DecoderOutput(self.norm(x), kv, layers)
