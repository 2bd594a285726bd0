"""Qwen2.5-VL's vision tower: patches, windowed and full attention blocks, merger.

Legend: B batch, P patches of all frames of a sample, D width, N heads, H head dim, R frames in a run of equal ones.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wallx_jax.models import scan
from wallx_jax.models.attention import dot_product_attention
from wallx_jax.models.config import IMAGE_MEAN, IMAGE_STD, Kernels, VisionConfig
from wallx_jax.models.layers import Linear, RMSNorm, SwiGLU
from wallx_jax.models.rope import apply_rope
from wallx_jax.models.vision_plan import FrameRun, Grid, frame_runs, plan_frame

_Groups = Sequence[tuple[int, int]]  # (count, size) of the groups of consecutive patches in a frame that attend


def visual_grid(pixels: jax.Array | np.ndarray, config: VisionConfig) -> Grid:
    """Return the patch grid of a still image [B, h, w, 3] or a video [B, F, h, w, 3]."""
    frames = pixels.shape[1] if pixels.ndim == 5 else 1
    height, width = pixels.shape[-3:-1]
    return (-(-frames // config.temporal_patch_size), height // config.patch_size, width // config.patch_size)


def patchify(pixels: jax.Array, config: VisionConfig) -> jax.Array:
    """Normalise images and split them into flat patches, as Qwen2-VL's processor does.

    A patch spans `temporal_patch_size` frames: a still image, or the last frame of a video, is repeated to fill it.

    Args:
        pixels: uint8 RGB image [B, h, w, 3] or video [B, F, h, w, 3].
        config: vision tower.

    Returns:
        float32 [B, P, channels*frames*patch*patch] in merge order.

    Raises:
        ValueError: if h or w is not a multiple of `patch_size` x `spatial_merge_size`.
    """
    patch, merge, span = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    height, width, channels = pixels.shape[-3:]
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"image of {height}x{width} px: both sides must be multiples of {patch * merge}")
    mean, std = np.array(IMAGE_MEAN, np.float32), np.array(IMAGE_STD, np.float32)
    x = (pixels.astype(jnp.float32) / 255 - mean) / std
    x = x if x.ndim == 5 else x[:, None]
    if missing := -x.shape[1] % span:
        x = jnp.concatenate([x, *[x[:, -1:]] * missing], axis=1)
    batch, frames = x.shape[:2]
    x = x.reshape(
        batch, frames // span, span, height // patch // merge, merge, patch, width // patch // merge, merge, patch,
        channels,
    )  # fmt: skip
    # Axes: B, frames; cell row, cell column; row, column in the cell; channel, frame in the patch, y, x.
    x = x.transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return x.reshape(batch, -1, config.patch_dim)


class VisionAttention(nnx.Module):
    """Self-attention within frames or windows, with 2-D RoPE; [B, P, D] -> [B, P, D].

    The projections are qkv [D, 3 D] and proj [D, D], both with biases. `models.cpu_ops.use_kernels` sets `kernels`.
    """

    kernels = Kernels.XLA

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True, rngs=rngs)
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, runs: Sequence[FrameRun], full: bool | jax.Array) -> jax.Array:
        """Attend within each frame, or within each of its windows.

        Args:
            x: [B, P, D], frames in order, the patches of each frame in the order of its `FramePlan`.
            runs: runs of equal frames in x.
            full: attend over the whole frame instead of windows; a traced bool when the blocks are scanned.
        """
        config, heads = self.config, self.config.num_heads
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, heads, config.hidden_size // heads)
        plans = [plan_frame(run.rows, run.columns, config) for run in runs]
        angles = np.concatenate([np.tile(plan.angles, (run.count, 1)) for run, plan in zip(runs, plans, strict=True)])
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        q, k = (apply_rope(y, np.cos(angles), np.sin(angles)) for y in (q, k))
        frames = [((1, run.patches),) for run in runs]
        windows = [plan.windows for plan in plans]
        if isinstance(full, bool):
            return self.proj(self._attend_frames(q, k, v, runs, frames if full else windows))
        branches = (functools.partial(self._attend_frames, runs=runs, groups=groups) for groups in (frames, windows))
        return self.proj(jax.lax.cond(full, *branches, q, k, v))

    def _attend_frames(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        runs: Sequence[FrameRun],
        groups: Sequence[Sequence[tuple[int, int]]],
    ) -> jax.Array:
        """Attend within groups of consecutive patches of each frame: q, k, v [B, P, N, H] -> [B, P, D].

        `groups` has an entry for each run.
        """
        out, start = [], 0
        for run, own in zip(runs, groups, strict=True):
            part = slice(start, start + run.count * run.patches)
            out.append(self._attend_groups(q[:, part], k[:, part], v[:, part], run, own))
            start = part.stop
        return jnp.concatenate(out, axis=1)

    def _attend_groups(self, q: jax.Array, k: jax.Array, v: jax.Array, run: FrameRun, groups: _Groups) -> jax.Array:
        """Attend within groups of patches, in all frames of one run: q, k, v [B, R*P, N, H] -> [B, R*P, D].

        P is the number of patches of one frame here.
        """
        batch, _, heads, head_dim = q.shape
        q, k, v = (y.reshape(batch * run.count, run.patches, heads, head_dim) for y in (q, k, v))
        out, start = [], 0
        for count, size in groups:
            part = slice(start, start + count * size)
            queries, keys, values = (y[:, part].reshape(-1, size, heads, head_dim) for y in (q, k, v))
            attended = dot_product_attention(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), kernels=self.kernels)
            out.append(attended.reshape(batch * run.count, count * size, -1))
            start += count * size
        return jnp.concatenate(out, axis=1).reshape(batch, run.count * run.patches, -1)


class VisionBlock(nnx.Module):
    """Pre-norm transformer block: attention, then a SwiGLU MLP, each with a residual; [B, P, D] -> [B, P, D].

    Arguments of the call as in `VisionAttention`.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = VisionAttention(config, rngs=rngs)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, runs: Sequence[FrameRun], full: bool | jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x), runs, full)
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """Merge each cell of 2x2 consecutive patches into one decoder token: [B, P, D] -> [B, P / 4, out_hidden_size].

    A cell has `spatial_merge_size`^2 patches, 4 in Qwen2.5-VL. They are normalised and concatenated, then pass through
    fc1 [4 D, 4 D], an exact GELU and fc2 [4 D, out_hidden_size].
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.cell = config.spatial_merge_size**2
        width = config.hidden_size * self.cell
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc1 = Linear(width, width, bias=True, rngs=rngs)
        self.fc2 = Linear(width, config.out_hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x).reshape(x.shape[0], x.shape[1] // self.cell, -1)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, transformer blocks and merger: [B, P, patch_dim] -> [B, P / 4, out_hidden_size].

    The blocks are stacked and scanned if `stacked`, else unrolled; see models.scan.
    """

    def __init__(self, config: VisionConfig, remat: str, stacked: bool = True, *, rngs: nnx.Rngs):
        self.config, self.remat = config, remat
        self.patch_embed = Linear(config.patch_dim, config.hidden_size, bias=False, rngs=rngs)
        self.blocks = scan.build(lambda keys: VisionBlock(config, rngs=keys), config.depth, stacked, rngs)
        self.merger = Merger(config, rngs=rngs)

    def __call__(self, patches: jax.Array, grids: tuple[Grid, ...]) -> jax.Array:
        """Encode patches as decoder tokens.

        Args:
            patches: [B, P, patch_dim] in the compute dtype: all images and videos in order, each frame in merge order.
            grids: patch grids of one sample's images and videos.

        Returns:
            [B, P / merge^2, out_hidden_size], row-major within each frame.

        Raises:
            ValueError: if the grids do not add up to P patches.
        """
        runs, cell = frame_runs(grids), self.config.spatial_merge_size**2
        if (expected := sum(run.count * run.patches for run in runs)) != patches.shape[1]:
            raise ValueError(f"grids {grids} make {expected} patches, but {patches.shape[1]} were given")
        plans = [plan_frame(run.rows, run.columns, self.config) for run in runs]
        x = self.patch_embed(_reorder(patches, runs, [plan.order for plan in plans], 1))

        full = [index in self.config.fullatt_block_indexes for index in range(self.config.depth)]

        def body(x: jax.Array, block_and_kind: tuple[Any, Any]) -> tuple[jax.Array, None]:
            block, full = block_and_kind
            return block(x, runs, full), None

        x, _ = scan.run(body, x, self.blocks, self.remat, np.array(full) if scan.is_stacked(self.blocks) else full)
        return _reorder(self.merger(x), runs, [plan.restore for plan in plans], cell)


def _reorder(x: jax.Array, runs: Sequence[FrameRun], orders: Sequence[np.ndarray], cell: int) -> jax.Array:
    """Permute axis 1 of x [B, P / cell, ...] within each frame; `orders` has one permutation per run."""
    index, start = [], 0
    for run, order in zip(runs, orders, strict=True):
        size = run.patches // cell
        index.append((start + np.arange(run.count)[:, None] * size + order).reshape(-1))
        start += run.count * size
    return x[:, np.concatenate(index)]
