"""Rotary embeddings: Qwen2.5-VL's 2-D vision rotary and the decoder's multimodal rotary (M-RoPE).

Angles, cos and sin are float32 whatever the compute dtype: bfloat16 cannot represent every integer above 256, so
positions would collide. Source: Qwen2-VL (arXiv 2409.12191) and transformers' modeling_qwen2_5_vl.py.

Legend: B batch, T tokens, N heads, H head dim, P patches.
"""

import jax
import jax.numpy as jnp
import numpy as np

from wallx_jax.models.config import TextConfig


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """Return the frequencies theta^(-2i/dim) for i < dim/2; float32 [dim/2]."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)


def vision_angles(rows_cols: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """Return the rotary angles of vision patches.

    Args:
        rows_cols: patch coordinates (row, column), [P, 2].
        head_dim: H.
        theta: rotary base.

    Returns:
        float32 [P, H]: H/4 row angles and H/4 column angles, then both repeated.
    """
    angles = rows_cols[:, :, None].astype(np.float32) * inverse_frequencies(head_dim // 2, theta)  # [P, 2, H/4]
    angles = angles.reshape(len(rows_cols), -1)
    return np.concatenate([angles, angles], axis=-1)


def mrope_axes(config: TextConfig, layout: str) -> np.ndarray:
    """Return the position row (0 time, 1 height, 2 width) that rotates each channel; int [H].

    Layout "qwen" repeats the sections over both halves, so the two channels of a pair share a row. "upstream_cuda"
    follows upstream wall-x's rotary kernel (csrc/rope.cu): each doubled section is contiguous, so the channels of a
    pair may use different rows.

    Raises:
        ValueError: if `mrope_section` does not sum to H/2.
    """
    sections = config.mrope_section
    if 2 * sum(sections) != config.head_dim:
        raise ValueError(f"mrope_section {sections} must sum to half of the head dimension {config.head_dim}")
    if layout == "qwen":
        return np.tile(np.repeat([0, 1, 2], sections), 2)
    return np.repeat([0, 1, 2], [2 * s for s in sections])


def mrope_angles(positions: jax.Array, config: TextConfig, layout: str) -> jax.Array:
    """Return the M-RoPE angles, float32 [B, T, H], of positions int [3, B, T]; for `layout` see `mrope_axes`."""
    frequencies = np.tile(inverse_frequencies(config.head_dim, config.rope_theta), 2)  # [H]
    per_channel = jnp.moveaxis(positions.astype(jnp.float32), 0, -1)[..., mrope_axes(config, layout)]
    return per_channel * frequencies


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the channel pairs (d, d + H/2) of x.

    Args:
        x: [..., T, N, H].
        cos: float32 [..., T, H].
        sin: float32 [..., T, H].

    Returns:
        [..., T, N, H] in the dtype of x; the rotation is computed in float32.
    """
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    turned = x32 * cos[..., None, :] + jnp.concatenate([-second, first], axis=-1) * sin[..., None, :]
    return turned.astype(x.dtype)
