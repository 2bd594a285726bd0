"""Wall-X: Qwen2.5-VL with an action expert, as calls over one set of parameters.

A sample is `[left pad | prompt with image and proprioception tokens | A action tokens]`. The prefix never looks at the
action tokens, so it can be encoded once (`encode_prefix`) and the suffix run many times over its keys and values
(`suffix_velocity`); training runs both in one pass (`forward`).

Legend: B batch, T prefix tokens, M visual tokens, A horizon, C model channels, D width, W labels, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wallx_jax.models import flow, lora, losses
from wallx_jax.models.action import ActionHeads
from wallx_jax.models.attention import prefix_mask, sequence_mask, suffix_mask
from wallx_jax.models.config import WallXConfig
from wallx_jax.models.decoder import Cache, Decoder, DecoderOutput, pad_cache
from wallx_jax.models.layers import INIT, Linear
from wallx_jax.models.positions import continue_positions, next_position, position_ids, visual_token_index
from wallx_jax.models.vision import VisionTower, patchify, visual_grid
from wallx_jax.models.vision_plan import Grid


class Embedding(nnx.Module):
    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(INIT(rngs.params(), (rows, width)))


class Prefix(NamedTuple):
    """The prompt ready for the decoder: embeddings [B, T, D], mask bool [B, T], positions int [3, B, T]."""

    embeddings: jax.Array
    mask: jax.Array
    positions: jax.Array


class PrefixCache(NamedTuple):
    """What the suffix needs of an encoded prefix: keys and values with room for it, mask bool [B, T], next position id
    int [B]."""

    kv: Cache
    mask: jax.Array
    next_position: jax.Array


class FlowTarget(NamedTuple):
    """Normalised actions and channel mask [B, A, C], noise [B, A, C] and flow time [B]; float32. is_pad: bool [B, A],
    actions that the model sees but no loss counts; None: none."""

    actions: jax.Array
    mask: jax.Array
    noise: jax.Array
    time: jax.Array
    is_pad: jax.Array | None = None


class LossTotals(NamedTuple):
    """Numerators of the two losses, and how many action tokens greedy prediction hits (None where actions are no
    text); float32, scalars or [B] for each sample."""

    cross_entropy: jax.Array
    flow: jax.Array
    action_hits: jax.Array | None = None


class WallX(nnx.Module):
    """`stacked`: whether layers are stacked and scanned, or apart and unrolled, see models.scan."""

    def __init__(self, config: WallXConfig, stacked: bool = True, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.text.vocab_size, config.text.hidden_size, rngs=rngs)
        self.vision = VisionTower(config.vision, config.numerics.remat, stacked, rngs=rngs)
        self.decoder = Decoder(config, stacked, rngs=rngs)
        if config.action.intermediate_size is not None:
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
        """uint8 RGB [B, h, w, 3] per camera (a video [B, F, h, w, 3]) -> (features [B, M, D], their grids)."""
        grids = tuple(visual_grid(image, self.config.vision) for image in images)
        patches = jnp.concatenate([patchify(image, self.config.vision) for image in images], axis=1)
        return self.encode_patches(patches, grids), grids

    def encode_patches(self, patches: jax.Array, grids: tuple[Grid, ...]) -> jax.Array:
        """Normalised patches [B, P, patch_dim] in merge order -> features [B, M, D]."""
        return self.vision(patches.astype(self.dtype), grids)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """int [B, T] -> [B, T, D]."""
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
        """Token embeddings [B, T, D] with visual features and the state put in their places, and positions."""
        x = self.embed_tokens(tokens)
        if features is not None:
            visual, rank = visual_token_index(tokens, self.config.tokens)
            placed = jnp.take_along_axis(features, jnp.minimum(rank, features.shape[1] - 1)[..., None], axis=1)
            x = jnp.where(visual[..., None], placed.astype(x.dtype), x)
        if state is not None:
            embedded = self.action.embed_state(state, state_mask).astype(x.dtype)
            x = jnp.where((tokens == self.config.tokens.propri)[..., None], embedded[:, None], x)
        ids = position_ids(tokens, token_mask, grids, self.config.vision, self.config.tokens, seconds_per_frame)
        return Prefix(x, token_mask, ids)

    def embed_batch(self, batch, seconds_per_frame: Sequence[float] | None = None) -> Prefix:
        """Prefix of a data.batch.Batch; a model without an action side leaves the state out."""
        features, grids = self.encode_images(batch.images) if batch.images else (None, ())
        acts = self.config.action.intermediate_size is not None
        state = (batch.state, batch.state_mask) if acts else (None, None)
        return self.embed_prefix(batch.tokens, batch.token_mask, features, grids, *state, seconds_per_frame)

    # Passes

    def forward(
        self,
        prefix: Prefix,
        actions: tuple[jax.Array, jax.Array, jax.Array] | None = None,
        keep_layers: bool = False,
        last: int | None = None,
    ) -> DecoderOutput:
        """Prefix and suffix in one pass; `actions`: (noisy [B, A, C], mask [B, A, C], time [B]), or None for no suffix.

        hidden [B, T + A, D], or of the `last` tokens only: the last A rows belong to the action tokens.
        """
        if actions is None:
            mask = prefix_mask(prefix.mask)
            return self.decoder(prefix.embeddings, prefix.positions, mask, keep_layers=keep_layers, last=last)
        noisy, mask, time = actions
        suffix = self.action.embed_actions(noisy, mask, self.action.embed_time(time)).astype(self.dtype)
        horizon = suffix.shape[1]
        suffix_ids = continue_positions(next_position(prefix.positions, prefix.mask), horizon)
        return self.decoder(
            jnp.concatenate([prefix.embeddings, suffix], axis=1),
            jnp.concatenate([prefix.positions, suffix_ids], axis=-1),
            sequence_mask(prefix.mask, horizon, self.config.numerics.action_attention),
            num_actions=horizon,
            keep_layers=keep_layers,
            last=last,
        )

    def encode_prefix(self, prefix: Prefix, room: int) -> tuple[PrefixCache, jax.Array]:
        """Runs the prefix alone; returns what goes on after it, with room for so many tokens, and hidden states
        [B, T, D]."""
        out = self.decoder(prefix.embeddings, prefix.positions, prefix_mask(prefix.mask), keep_kv=True)
        kv = pad_cache(out.kv, room)
        return PrefixCache(kv, prefix.mask, next_position(prefix.positions, prefix.mask)), out.hidden

    def suffix_velocity(
        self, cache: PrefixCache, noisy: jax.Array, mask: jax.Array, time_emb: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Velocity [B, A, C] of noisy actions [B, A, C] at an embedded time [B, D] (ActionHeads.embed_time), over an
        encoded prefix with room for A; and the cache's keys and values, for the next call to write over."""
        x = self.action.embed_actions(noisy, mask, time_emb).astype(self.dtype)
        horizon = x.shape[1]
        out = self.decoder(
            x,
            continue_positions(cache.next_position, horizon),
            suffix_mask(cache.mask, horizon, self.config.numerics.action_attention),
            num_actions=horizon,
            cache=cache.kv,
            start=cache.mask.shape[1],
            keep_kv=True,
        )
        return self.action.velocity(out.hidden), out.kv

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> logits [..., V] in their dtype."""
        if self.config.text.tie_word_embeddings:
            return hidden @ self.embed.embedding[...].astype(hidden.dtype).T
        return self.lm_head(hidden)

    # What training and acting ask for

    def loss_sums(
        self,
        prefix: Prefix,
        labels: jax.Array,
        flow_target: FlowTarget | None,
        action_ids: tuple[int, int] | None = None,
        per_sample: bool = False,
    ) -> LossTotals:
        """Numerators of cross-entropy over `labels` and of the flow loss; models.losses has the counts to divide by.

        labels: int [B, W] of the last W prefix positions (see data.batch.Batch), W = 0 for none.
        action_ids: first id of the FAST tokens and the one after the last, to count hits among them.
        per_sample: [B] each, instead of scalars.
        """
        suffix = None
        if flow_target is not None:
            actions, mask, noise, time, is_pad = flow_target
            suffix = (flow.interpolate(actions, noise, time), mask, time)
        window, horizon = labels.shape[1], 0 if suffix is None else actions.shape[1]
        predicting = window + 1 if window else 0  # the position before a label predicts it
        hidden = self.forward(prefix, suffix, last=predicting + horizon).hidden

        cross_entropy = flow_error = jnp.zeros(len(labels) if per_sample else (), jnp.float32)
        hits = None if action_ids is None else cross_entropy
        if window:
            logits = self.logits(hidden[:, :window])
            cross_entropy = losses.cross_entropy_sum(logits, labels, per_sample)
            if action_ids is not None:
                hits = losses.correct_count(logits, labels, action_ids, per_sample)
        if flow_target is not None:
            velocity = self.action.velocity(hidden[:, predicting:])
            flow_error = flow.flow_error_sum(velocity, actions - noise, mask, is_pad, per_sample)
        return LossTotals(cross_entropy, flow_error, hits)

    def sample_actions(self, prefix: Prefix, noise: jax.Array, action_mask: jax.Array, steps: int = 10) -> jax.Array:
        """Normalised action chunk [B, A, C] from noise of that shape; the prefix is encoded once."""
        cache, _ = self.encode_prefix(prefix, room=noise.shape[1])
        times = flow.euler_times(steps)

        def velocity(x, time_emb, kv):
            return self.suffix_velocity(cache._replace(kv=kv), x, action_mask, time_emb[None])

        time_embs = self.action.embed_time(times[:-1])
        return flow.integrate(
            velocity, noise, times, time_embs, cache.kv, action_mask, self.config.numerics.masked_dims
        )
