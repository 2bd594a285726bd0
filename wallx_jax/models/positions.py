"""Compute M-RoPE position ids of a left-padded prefix with images and videos.

Follows transformers' `get_rope_index` for Qwen2.5-VL: a text token advances all three rows by one; the tokens of an
image or video of merged grid (t, h, w) get start + (time, row, column); the next token continues after the largest of
these ids; padding gets 1. Tokens are assigned to images by their token ids, so one compilation serves every prompt;
the grids are static.

Legend: B batch, T tokens, M visual tokens of a sample.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wallx_jax.models.config import TokenIds, VisionConfig
from wallx_jax.models.vision_plan import Grid


def visual_offsets(
    grids: Sequence[Grid], config: VisionConfig, seconds_per_frame: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the position offsets of all visual tokens of a sample.

    Args:
        grids: patch grids of all images and videos, in order.
        config: vision tower.
        seconds_per_frame: per grid, 0 for a still image; the time row of a video advances by
            seconds x tokens_per_second. None: all still images.

    Returns:
        offsets: int [M, 3], time, row and column offset of each visual token.
        advances: int [M], by how much the whole image or video of each visual token advances the position.
    """
    offsets, advances = [np.zeros((0, 3), int)], [np.zeros(0, int)]
    for grid, seconds in zip(grids, seconds_per_frame or [0.0] * len(grids), strict=True):
        frames, rows, columns = grid[0], grid[1] // config.spatial_merge_size, grid[2] // config.spatial_merge_size
        time, row, column = np.indices((frames, rows, columns)).reshape(3, -1)
        time = (time.astype(np.float32) * np.float32(seconds) * config.tokens_per_second).astype(int)
        offsets.append(np.stack([time, row, column], axis=1))
        advances.append(np.full(len(time), offsets[-1].max() + 1))
    return np.concatenate(offsets), np.concatenate(advances)


def visual_token_index(tokens: jax.Array, ids: TokenIds) -> tuple[jax.Array, jax.Array]:
    """Locate the visual tokens among tokens int [B, T].

    Returns:
        visual: bool [B, T], True for image and video tokens.
        index: int [B, T], index of each among the visual tokens of its row, 0 for other tokens.
    """
    visual = (tokens == ids.image) | (tokens == ids.video)
    return visual, jnp.where(visual, jnp.cumsum(visual, axis=1) - 1, 0)


def position_ids(
    tokens: jax.Array,
    token_mask: jax.Array,
    grids: Sequence[Grid],
    config: VisionConfig,
    ids: TokenIds,
    seconds_per_frame: Sequence[float] | None = None,
) -> jax.Array:
    """Return the M-RoPE position ids of a prefix.

    Args:
        tokens: int [B, T].
        token_mask: bool [B, T], False at padding.
        grids: patch grids of each sample's images and videos, in order.
        config: vision tower.
        ids: image and video token ids.
        seconds_per_frame: see `visual_offsets`.

    Returns:
        int32 [3, B, T]: time, height and width positions.
    """
    offsets, advances = visual_offsets(grids, config, seconds_per_frame)
    if not len(offsets):
        position = jnp.broadcast_to(jnp.cumsum(token_mask, axis=1) - 1, (3, *tokens.shape))
        return jnp.where(token_mask, position, 1).astype(jnp.int32)
    starts = np.zeros(len(offsets), int)  # 1 at the first token of each image or video, which takes its whole advance
    starts[np.cumsum([0, *(g[0] * g[1] * g[2] // config.spatial_merge_size**2 for g in grids)])[:-1]] = 1

    visual, index = visual_token_index(tokens, ids)
    index = jnp.minimum(index, len(offsets) - 1)
    block_advance = jnp.asarray(advances)[index]
    advance = jnp.where(visual, block_advance * jnp.asarray(starts)[index], 1) * token_mask
    end = jnp.cumsum(advance, axis=1)  # position after this token, or after its whole image or video
    start = jnp.where(visual, end - block_advance, end - 1)
    position = start + jnp.where(visual, jnp.moveaxis(jnp.asarray(offsets)[index], -1, 0), 0)
    return jnp.where(token_mask, position, 1).astype(jnp.int32)


def rope_delta(positions: jax.Array, token_mask: jax.Array) -> jax.Array:
    """Return transformers' `rope_deltas`, int32 [B]: position minus index of the tokens that follow the prefix.

    Text and actions continue one after the largest position of each sample.

    Args:
        positions: int [3, B, T].
        token_mask: bool [B, T], False at padding.
    """
    largest = jnp.max(jnp.where(token_mask, positions, -1), axis=(0, 2))
    return largest + 1 - token_mask.shape[1]


def continue_positions(start: int | jax.Array, length: int, delta: jax.Array) -> jax.Array:
    """Return the positions, int32 [3, B, length], of `length` tokens that follow a prefix.

    Args:
        start: index of the first of them in the sequence.
        length: number of tokens.
        delta: int32 [B], from `rope_delta`.
    """
    row = delta[:, None] + start + jnp.arange(length, dtype=jnp.int32)
    return jnp.broadcast_to(row, (3, *row.shape))
