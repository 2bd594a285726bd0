"""The Wall-X model: Qwen2.5-VL with an action expert, trained with cross-entropy and flow matching.

A sample is `[left pad | prompt with image and proprioception tokens | A action tokens]`. The prefix never attends to
the action tokens, so it can be encoded once (`encode_prefix`) and the suffix run many times over its keys and values
(`suffix_velocity`); training runs both in one pass (`forward`).

Legend: B batch, T prefix tokens, M visual tokens, A horizon, C model channels, D width, W labels, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wallx_jax.models import flow, lora, losses
from wallx_jax.models.action import ActionHeads
from wallx_jax.models.attention import prefix_mask, sequence_mask, suffix_mask
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.decoder import AllKV, Decoder, DecoderOutput, KVCache, pad_cache
from wallx_jax.models.layers import INIT, Linear
from wallx_jax.models.positions import continue_positions, position_ids, rope_delta, visual_token_index
from wallx_jax.models.vision import VisionTower, patchify, visual_grid
from wallx_jax.models.vision_plan import Grid


class Embedding(nnx.Module):
    """Token embedding table [V, D]."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(INIT(rngs.params(), (rows, width)))


class Prefix(NamedTuple):
    """A prompt as input for the decoder.

    Attributes:
        embeddings: [B, T, D] in the compute dtype.
        mask: bool [B, T], False at padding.
        positions: int32 [3, B, T], M-RoPE position ids.
    """

    embeddings: jax.Array
    mask: jax.Array
    positions: jax.Array


class PrefixCache(NamedTuple):
    """An encoded prefix, to be continued by a suffix.

    Attributes:
        kv: keys and values of the prefix, padded for the suffix.
        mask: bool [B, T], token mask of the prefix.
        rope_delta: int32 [B], position minus index of the tokens of the suffix.
    """

    kv: AllKV
    mask: jax.Array
    rope_delta: jax.Array


class FlowTarget(NamedTuple):
    """Inputs of the flow loss.

    Attributes:
        actions: normalised actions, float32 [B, A, C].
        mask: channel mask, float32 [B, A, C].
        noise: float32 [B, A, C].
        time: flow time, float32 [B].
        is_pad: bool [B, A], actions that are input to the model but excluded from the loss; None excludes none.
    """

    actions: jax.Array
    mask: jax.Array
    noise: jax.Array
    time: jax.Array
    is_pad: jax.Array | None = None


class LossTotals(NamedTuple):
    """Numerators of the losses and of the action token accuracy; float32 scalars, or [B] per sample.

    Attributes:
        cross_entropy: summed negative log-likelihood.
        flow: summed squared velocity error.
        action_correct: number of FAST action tokens that greedy prediction gets right; None if actions are not tokens.
    """

    cross_entropy: jax.Array
    flow: jax.Array
    action_correct: jax.Array | None = None


class WallX(nnx.Module):
    """Vision tower, token embedding, decoder with two experts, and action heads.

    The action expert and heads are left out if `config.action.intermediate_size` is None, and the output projection
    `lm_head` if it is tied to the embedding. Layers are stacked and scanned if `stacked`, else unrolled; see
    models.scan.
    """

    def __init__(self, config: WallXConfig, stacked: bool = True, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.text.vocab_size, config.text.hidden_size, rngs=rngs)
        self.vision = VisionTower(config.vision, config.numerics.remat, stacked, rngs=rngs)
        self.decoder = Decoder(config, stacked, rngs=rngs)
        if config.has_action_head:
            self.action = ActionHeads(config, rngs=rngs)
        if not config.text.tie_word_embeddings:
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False, rngs=rngs)
        if config.lora.rank:
            lora.attach(self, config.lora, rngs)

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.numerics.compute_dtype)

    # Inputs

    def encode_images(self, images: Sequence[jax.Array]) -> tuple[jax.Array, tuple[Grid, ...]]:
        """Encode images with the vision tower.

        Args:
            images: uint8 RGB [B, h, w, 3] per camera, or [B, F, h, w, 3] for a video.

        Returns:
            Features [B, M, D], and the patch grid of each image.
        """
        grids = tuple(visual_grid(image, self.config.vision) for image in images)
        patches = jnp.concatenate([patchify(image, self.config.vision) for image in images], axis=1)
        return self.encode_patches(patches, grids), grids

    def encode_patches(self, patches: jax.Array, grids: tuple[Grid, ...]) -> jax.Array:
        """Encode normalised patches [B, P, patch_dim], in merge order, as features [B, M, D]."""
        return self.vision(patches.astype(self.dtype), grids)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Look up the embeddings [B, T, D], in the compute dtype, of token ids int [B, T]."""
        return self.embed.embedding[...][tokens].astype(self.dtype)

    def embed_prefix(
        self,
        tokens: jax.Array,
        token_mask: jax.Array,
        features: jax.Array | None,
        grids: Sequence[Grid],
        state: jax.Array | None = None,
        state_mask: jax.Array | None = None,
        seconds_per_frame: Sequence[float] | None = None,
    ) -> Prefix:
        """Embed a prompt, replacing image, video and proprioception tokens by visual features and the embedded state.

        Args:
            tokens: int [B, T], left padded.
            token_mask: bool [B, T], False at padding.
            features: visual features [B, M, D] for the image and video tokens, in order; None without images.
            grids: patch grids of one sample's images and videos.
            state: normalised state [B, C]; None leaves the proprioception tokens as they are.
            state_mask: channel mask of the state [B, C].
            seconds_per_frame: per grid, see `positions.visual_offsets`.
        """
        x = self.embed_tokens(tokens)
        if features is not None:
            visual, index = visual_token_index(tokens, self.config.tokens)
            placed = jnp.take_along_axis(features, jnp.minimum(index, features.shape[1] - 1)[..., None], axis=1)
            x = jnp.where(visual[..., None], placed.astype(x.dtype), x)
        if state is not None:
            if state_mask is None:
                raise ValueError("a state was given without its state_mask; give both")
            embedded = self.action.embed_state(state, state_mask).astype(x.dtype)
            x = jnp.where((tokens == self.config.tokens.propri)[..., None], embedded[:, None], x)
        ids = position_ids(tokens, token_mask, grids, self.config.vision, self.config.tokens, seconds_per_frame)
        return Prefix(x, token_mask, ids)

    def embed_batch(self, batch: Any, seconds_per_frame: Sequence[float] | None = None) -> Prefix:
        """Embed the prompt of a data.batch.Batch; a model without action heads ignores the state."""
        features, grids = self.encode_images(batch.images) if batch.images else (None, ())
        state, state_mask = (batch.state, batch.state_mask) if self.config.has_action_head else (None, None)
        return self.embed_prefix(
            batch.tokens, batch.token_mask, features, grids, state, state_mask, seconds_per_frame=seconds_per_frame
        )

    # Forward passes

    def forward(
        self,
        prefix: Prefix,
        actions: tuple[jax.Array, jax.Array, jax.Array] | None = None,
        tokens_to_keep: int | None = None,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Run prefix and suffix through the decoder in one pass.

        Args:
            prefix: embedded prompt.
            actions: (noisy actions [B, A, C], channel mask [B, A, C], flow time [B]); None for no suffix.
            tokens_to_keep: number of tokens at the end of the sequence to return; None: all.
            output_hidden_states: return the output of each layer.

        Returns:
            Decoder output with hidden [B, T + A, D], or [B, tokens_to_keep, D]; the last A tokens are the action
            tokens.
        """
        if actions is None:
            return self.decoder(
                prefix.embeddings,
                prefix.positions,
                prefix_mask(prefix.mask),
                tokens_to_keep=tokens_to_keep,
                output_hidden_states=output_hidden_states,
            )
        noisy, mask, time = actions
        suffix = self.action.embed_actions(noisy, mask, self.action.embed_time(time)).astype(self.dtype)
        length, horizon = prefix.mask.shape[1], suffix.shape[1]
        suffix_positions = continue_positions(length, horizon, rope_delta(prefix.positions, prefix.mask))
        return self.decoder(
            jnp.concatenate([prefix.embeddings, suffix], axis=1),
            jnp.concatenate([prefix.positions, suffix_positions], axis=-1),
            sequence_mask(prefix.mask, horizon, self.config.numerics.action_attention),
            num_actions=horizon,
            tokens_to_keep=tokens_to_keep,
            output_hidden_states=output_hidden_states,
        )

    def encode_prefix(self, prefix: Prefix, cache_length: int) -> tuple[PrefixCache, jax.Array]:
        """Run only the prefix through the decoder.

        Args:
            prefix: embedded prompt.
            cache_length: number of tokens, at least T, to pad the cache to; the rest is for the suffix.

        Returns:
            The cache, and the hidden states [B, T, D].
        """
        out = self.decoder(prefix.embeddings, prefix.positions, prefix_mask(prefix.mask), cache=KVCache())
        delta = rope_delta(prefix.positions, prefix.mask)
        return PrefixCache(pad_cache(out.cached(), cache_length), prefix.mask, delta), out.hidden

    def suffix_velocity(
        self, cache: PrefixCache, noisy: jax.Array, mask: jax.Array, time_emb: jax.Array
    ) -> tuple[jax.Array, AllKV]:
        """Predict the velocity of noisy actions, given an encoded prefix.

        Args:
            cache: encoded prefix, padded by at least A tokens.
            noisy: noisy actions [B, A, C].
            mask: channel mask [B, A, C].
            time_emb: embedded flow time [B, D] or, if equal for all samples, [1, D], from `ActionHeads.embed_time`.

        Returns:
            Velocity, float32 [B, A, C], and the keys and values of the cache including the suffix, which the next call
            overwrites.
        """
        x = self.action.embed_actions(noisy, mask, time_emb).astype(self.dtype)
        start, horizon = cache.mask.shape[1], x.shape[1]
        out = self.decoder(
            x,
            continue_positions(start, horizon, cache.rope_delta),
            suffix_mask(cache.mask, horizon, self.config.numerics.action_attention),
            num_actions=horizon,
            cache=KVCache(cache.kv, start),
        )
        return self.action.velocity(out.hidden), out.cached()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Project hidden states [..., D] to logits [..., V] in the same dtype."""
        if self.config.text.tie_word_embeddings:
            return hidden @ self.embed.embedding[...].astype(hidden.dtype).T
        return self.lm_head(hidden)

    # Training loss and action sampling

    def loss_sums(
        self,
        prefix: Prefix,
        labels: jax.Array,
        flow_target: FlowTarget | None,
        action_ids: tuple[int, int] | None = None,
        per_sample: bool = False,
    ) -> LossTotals:
        """Compute the numerators of cross-entropy and flow loss; see models.losses and models.flow for the counts.

        Args:
            prefix: embedded prompt.
            labels: int [B, W], targets of the last W prefix positions (see data.batch.Batch); W = 0 for none.
            flow_target: inputs of the flow loss; None for no suffix.
            action_ids: half-open range of FAST token ids, to count correct predictions among them; None: do not.
            per_sample: return [B] each instead of scalars.
        """
        suffix = None
        if flow_target is not None:
            actions, mask, noise, time, is_pad = flow_target
            suffix = (flow.interpolate(actions, noise, time), mask, time)
        window, horizon = labels.shape[1], 0 if suffix is None else actions.shape[1]
        predicting = window + 1 if window else 0  # the position before a label predicts it
        hidden = self.forward(prefix, suffix, tokens_to_keep=predicting + horizon).hidden

        cross_entropy = flow_error = jnp.zeros(len(labels) if per_sample else (), jnp.float32)
        correct = None if action_ids is None else cross_entropy
        if window:
            logits = self.logits(hidden[:, :window])
            cross_entropy = losses.cross_entropy_sum(logits, labels, per_sample)
            if action_ids is not None:
                correct = losses.correct_count(logits, labels, action_ids, per_sample)
        if flow_target is not None:
            velocity = self.action.velocity(hidden[:, predicting:])
            target = flow.target_velocity(actions, noise)
            flow_error = flow.flow_error_sum(velocity, target, mask, is_pad, per_sample)
        return LossTotals(cross_entropy, flow_error, correct)

    def sample_actions(self, prefix: Prefix, noise: jax.Array, action_mask: jax.Array, steps: int = 10) -> jax.Array:
        """Sample a normalised action chunk, encoding the prefix once.

        Args:
            prefix: embedded prompt.
            noise: float32 [B, A, C].
            action_mask: channel mask [B, A, C].
            steps: number of Euler steps.

        Returns:
            float32 [B, A, C].
        """
        cache, _ = self.encode_prefix(prefix, cache_length=prefix.mask.shape[1] + noise.shape[1])
        times = flow.euler_times(steps)

        def velocity(x: jax.Array, time_emb: jax.Array, kv: AllKV) -> tuple[jax.Array, AllKV]:
            return self.suffix_velocity(cache._replace(kv=kv), x, action_mask, time_emb[None])

        time_embs = self.action.embed_time(times[:-1])
        return flow.integrate(
            velocity, noise, times, time_embs, cache.kv, action_mask, self.config.numerics.masked_dims
        )
