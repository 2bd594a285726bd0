"""Attention: every implementation computes the same."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallx_jax.models.attention import dot_product_attention
from wallx_jax.models.config import Kernels
from wallx_jax.utils.devices import nvidia_gpus

BATCH, HEAD_DIM = 2, 16
# (query tokens, key tokens, query heads, key heads, masked)
SHAPES = {
    "grouped": (8, 8, 4, 2, True),
    "one key head, odd lengths": (5, 9, 6, 1, True),
    "one query": (1, 7, 4, 2, True),
    "ungrouped, no mask": (6, 6, 3, 3, False),
}


def inputs(shape, dtype):
    """Queries, keys, values, a mask whose first row is all False in one sample, and weights that leave that row out."""
    length, key_length, heads, kv_heads, masked = shape
    rng = np.random.default_rng(0)
    q = rng.normal(size=(BATCH, length, heads, HEAD_DIM))
    k, v = rng.normal(size=(2, BATCH, kv_heads, key_length, HEAD_DIM))
    mask, weights = None, rng.normal(size=(BATCH, length, heads * HEAD_DIM))
    if masked:
        mask = rng.random((BATCH, length, key_length)) < 0.7
        mask[..., -1] = True
        mask[1, 0] = False
        weights[1, 0] = 0
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), mask, jnp.asarray(weights, jnp.float32)


def reference(q, k, v, mask):
    """The formula, with one key head per query head."""
    groups = q.shape[2] // k.shape[1]
    k, v = (jnp.repeat(x.astype(jnp.float32), groups, axis=1) for x in (k, v))
    scores = jnp.einsum("btnh,bnsh->bnts", q.astype(jnp.float32), k) / HEAD_DIM**0.5
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -1e9)
    return jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores), v).reshape(*q.shape[:2], -1)


def check(kernels: Kernels, dtype: str) -> None:
    """Compare output and gradients with the formula, for all shapes."""
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for name, shape in SHAPES.items():
        *qkv, mask, weights = inputs(shape, dtype)

        def loss(q, k, v, attention, mask=mask, weights=weights):
            out = attention(q, k, v, mask)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        def run(attention, qkv=qkv, loss=loss):
            function = jax.value_and_grad(lambda *qkv: loss(*qkv, attention), argnums=(0, 1, 2), has_aux=True)
            (_, out), grads = jax.jit(function)(*qkv)
            return out, *grads

        found = run(lambda q, k, v, mask: dot_product_attention(q, k, v, mask, kernels))
        expected = run(reference)
        for part, a, b in zip(("output", "q", "k", "v"), found, expected, strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            a, b = (np.asarray(x, np.float32) for x in (a, b))
            scale = max(1.0, np.abs(b).max())
            if part == "output" and shape[-1]:
                assert np.isfinite(a[1, 0]).all(), f"{name}: a fully masked row"
                a, b = (np.delete(x.reshape(-1, x.shape[-1]), shape[0], axis=0) for x in (a, b))
            np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=f"{name}: {part}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", [Kernels.XLA, Kernels.CPU])
def test_output_and_gradients_are_those_of_the_formula(kernels, dtype):
    check(kernels, dtype)


@pytest.mark.skipif(not nvidia_gpus(), reason="cuDNN needs an NVIDIA GPU")
def test_output_and_gradients_of_cudnn_are_those_of_the_formula():
    """In a process of its own: this one computes on the CPU."""
    code = "import test_attention; test_attention.check(test_attention.Kernels.CUDNN, 'bfloat16')"
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_fully_masked_rows_are_the_same_mean_of_all_values():
    q, k, v, mask, _ = inputs(SHAPES["grouped"], "float32")
    cpu, xla = (dot_product_attention(q, k, v, mask, kernels)[1, 0] for kernels in (Kernels.CPU, Kernels.XLA))
    mean = np.repeat(np.asarray(v[1]).mean(axis=1), 2, axis=0).reshape(-1)
    np.testing.assert_allclose(cpu, mean, atol=1e-6)
    np.testing.assert_allclose(xla, mean, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cudnn_gets_even_lengths_under_a_mask(shape, monkeypatch):
    """cuDNN's gradient needs them; the result is that of the lengths given."""
    plain, seen = jax.nn.dot_product_attention, []

    def in_its_place(q, k, v, mask, implementation):
        seen.append((implementation, q.shape[1], k.shape[1]))
        return plain(q, k, v, mask=mask, implementation="xla")

    q, k, v, mask, _ = inputs(shape, "float32")
    expected = dot_product_attention(q, k, v, mask)
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    found = dot_product_attention(q, k, v, mask, Kernels.CUDNN)
    ((implementation, *lengths),) = seen
    assert implementation == "cudnn"
    assert lengths == [n + n % 2 if shape[-1] else n for n in shape[:2]]
    rows = np.ones(found.shape[:2], bool)
    rows[1, 0] = mask is None  # the mean over all keys depends on their number
    np.testing.assert_allclose(np.asarray(found)[rows], np.asarray(expected)[rows], atol=1e-6)


def test_what_cudnn_does_not_support_names_the_setting(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("The head dim must be <= 256 and a multiple of 8, but got 20.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    q, k, v, mask, _ = inputs(SHAPES["grouped"], "bfloat16")
    with pytest.raises(ValueError, match="numerics.kernels is 'cudnn', but .*multiple of 8, but got 20.*'xla'"):
        dot_product_attention(q, k, v, mask, Kernels.CUDNN)
