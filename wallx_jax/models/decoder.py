"""Qwen2.5's decoder with Wall-X's two experts.

All tokens share attention and norms; prefix tokens use the MLP of expert "vlm", the action tokens of the suffix that
of expert "action". The start of the suffix is static, so routing is a slice.

Legend: B batch, T tokens of this call, S keys, N query heads, K key heads, H head dim, D width, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wallx_jax.models import cpu_ops, scan
from wallx_jax.models.attention import dot_product_attention
from wallx_jax.models.config import Kernels, WallXConfig
from wallx_jax.models.layers import Linear, RMSNorm, SwiGLU
from wallx_jax.models.rope import apply_rope, mrope_angles


class KV(NamedTuple):
    """Keys (after RoPE) and values of one layer, [B, K, S, H] each, or of all stacked layers, [L, B, K, S, H]."""

    keys: jax.Array
    values: jax.Array


AllKV = KV | list[KV]  # all layers: stacked, or a list with one entry per layer


class KVCache(NamedTuple):
    """Keys and values of the tokens before those of a call.

    Attributes:
        kv: of length S, of which the call writes its own T from `start` on. None: the cache is empty, and S = T.
        start: index in the cache of the first token of the call.
    """

    kv: AllKV | None = None
    start: int | jax.Array = 0


def pad_cache(kv: AllKV, length: int) -> AllKV:
    """Extend the S axis of keys and values with zeros, to be written later, to `length`."""
    return jax.tree.map(lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, length - x.shape[-2]), (0, 0)]), kv)


class DecoderOutput(NamedTuple):
    """Output of the decoder.

    Attributes:
        hidden: [B, T, D] after the final norm; only the `tokens_to_keep` last tokens if that was given.
        kv: keys and values of the cache, including this call's tokens; None without a cache.
        hidden_states: [L, B, T, D], output of each layer before the final norm; None unless asked for.
    """

    hidden: jax.Array
    kv: AllKV | None
    hidden_states: jax.Array | None

    def cached(self) -> AllKV:
        """Return the keys and values of a call with a cache.

        Raises:
            ValueError: the call had none.
        """
        if self.kv is None:
            raise ValueError("the decoder was called without a cache; give it cache=KVCache()")
        return self.kv


class LayerInputs(NamedTuple):
    """Inputs of a layer besides x and its own keys and values.

    Attributes:
        cos: float32 [B, T, H], rotary table of x.
        sin: float32 [B, T, H].
        mask: bool [B, T, S], True where a token may attend.
        num_actions: number of action tokens, at the end of x.
        start: index in the cache of the first token of x.
        tokens_to_keep: number of tokens at the end of x to compute; keys and values cover all of x.
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array
    num_actions: int
    start: int | jax.Array
    tokens_to_keep: int


class Attention(nnx.Module):
    """Grouped-query self-attention with M-RoPE and an optional KV cache, [B, T, D] -> [B, T, D].

    The projections are q [D, N*H], k and v [D, K*H], all with biases, and o [N*H, D] without.
    `models.cpu_ops.use_kernels` sets `kernels`.
    """

    kernels = Kernels.XLA

    def __init__(self, config: WallXConfig, *, rngs: nnx.Rngs):
        text = config.text
        self.heads, self.kv_heads, self.head_dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        self.q = Linear(text.hidden_size, self.heads * self.head_dim, bias=True, rngs=rngs)
        self.k = Linear(text.hidden_size, self.kv_heads * self.head_dim, bias=True, rngs=rngs)
        self.v = Linear(text.hidden_size, self.kv_heads * self.head_dim, bias=True, rngs=rngs)
        self.o = Linear(self.heads * self.head_dim, text.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, inputs: LayerInputs, cache: KV | None) -> tuple[jax.Array, KV]:
        """Compute the attention output of the tokens to keep.

        Args:
            x: [B, T, D].
            inputs: rotary tables, mask and place in the cache of x.
            cache: this layer's keys and values [B, K, S, H]; None: S = T.

        Returns:
            Output [B, tokens_to_keep, D], and the keys and values attended to, [B, K, S, H].
        """
        cos, sin, keep = inputs.cos, inputs.sin, inputs.tokens_to_keep
        q = self.q(x[:, -keep:]).reshape(len(x), keep, self.heads, self.head_dim)
        k = self.k(x).reshape(*x.shape[:2], self.kv_heads, self.head_dim)
        v = self.v(x).reshape(*x.shape[:2], self.kv_heads, self.head_dim)
        q, k = apply_rope(q, cos[:, -keep:], sin[:, -keep:]), apply_rope(k, cos, sin)
        kv = KV(k.swapaxes(1, 2), v.swapaxes(1, 2))
        if cache is not None:
            kv = jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, inputs.start, axis=2), cache, kv
            )
        return self.o(dot_product_attention(q, *kv, inputs.mask[:, -keep:], self.kernels)), kv


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

    def __call__(self, x: jax.Array, inputs: LayerInputs, cache: KV | None) -> tuple[jax.Array, KV]:
        """Return the layer's output [B, tokens_to_keep, D], and its keys and values; arguments as in `Attention`."""
        attended, kv = self.attn(self.input_norm(x), inputs, cache)
        x = x[:, -inputs.tokens_to_keep :] + attended
        return x + self.mlp(self.post_norm(x), inputs.num_actions), kv


class Decoder(nnx.Module):
    """All decoder layers and the final norm, [B, T, D] -> [B, T, D].

    The layers are stacked and scanned if `stacked`, else unrolled; see models.scan. `models.cpu_ops.use_kernels` sets
    `kernels`.
    """

    kernels = Kernels.XLA

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
        cache: KVCache | None = None,
        tokens_to_keep: int | None = None,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Run the embeddings x through all layers.

        Args:
            x: [B, T, D].
            positions: int [3, B, T].
            mask: bool [B, T, S], True where a token may attend; S = T without a cache, or with an empty one.
            num_actions: number of action tokens, at the end of x.
            cache: keys and values of earlier tokens, to be returned with those of x; None: there are no earlier
                tokens, and keys and values are not returned.
            tokens_to_keep: number of tokens at the end of x to return; None: all. If layers are unrolled, the last
                layer computes only keys and values for the other tokens.
            output_hidden_states: return the output of each layer.
        """
        angles = mrope_angles(positions, self.config.text, self.config.numerics.mrope_layout)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if self.kernels == Kernels.CPU:
            cos, sin = cpu_ops.materialize((cos, sin))

        length, remat, count = x.shape[1], self.config.numerics.remat, self.config.text.num_hidden_layers
        keep = tokens_to_keep or length
        past = cache or KVCache()
        inputs = LayerInputs(cos, sin, mask, num_actions, past.start, length)

        def body(x: jax.Array, layer_and_extra: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            layer, (kv, layer_keep) = layer_and_extra
            x, kv = layer(x, inputs._replace(tokens_to_keep=layer_keep or length), kv)
            return x, (None if cache is None else kv, x if output_hidden_states else None)

        if scan.is_stacked(self.layers):
            x, outputs = scan.run(body, x, self.layers, remat, (past.kv, None))
            return DecoderOutput(self.norm(x[:, -keep:]), *outputs)
        empty: list[None] = [None] * count
        extra = zip(past.kv or empty, [length] * (count - 1) + [keep], strict=True)
        x, outputs = scan.run(body, x, self.layers, remat, list(extra))
        kv = None if cache is None else [kv for kv, _ in outputs]
        hidden_states = jnp.stack([x for _, x in outputs]) if output_hidden_states else None
        return DecoderOutput(self.norm(x), kv, hidden_states)
