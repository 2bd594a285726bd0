import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wallx_jax.models.config import VisionConfig
from wallx_jax.weights.ops import Conv3d, Identity, Linear

size = st.integers(1, 6)
raw = {np.dtype(np.float32): np.uint32, np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(np.float16): np.uint16}


def bits(shape, dtype, seed):
    """Random bit patterns (NaNs, infinities and subnormals among them) as floats."""
    unsigned = raw[np.dtype(dtype)]
    return np.random.default_rng(seed).integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True).view(dtype)


def same_bits(a, b):
    unsigned = raw[a.dtype]
    return a.dtype == b.dtype and np.array_equal(np.array(a).view(unsigned), np.array(b).view(unsigned))


@given(shape=st.tuples(size, size), dtype=st.sampled_from(list(raw)), seed=st.integers(0, 99))
@pytest.mark.parametrize("op", [Linear(), Identity()])
def test_matrices_there_and_back(op, shape, dtype, seed):
    x, vision = bits(shape, dtype, seed), VisionConfig()
    kernel = op.to_jax(x)
    assert op.torch_shape(kernel.shape, vision) == shape
    assert same_bits(op.to_torch(kernel, vision), x)
    assert np.shares_memory(kernel, x)


@given(out=size, c=size, t=size, p=size, dtype=st.sampled_from(list(raw)), seed=st.integers(0, 99))
def test_patch_embedding_there_and_back(out, c, t, p, dtype, seed):
    vision = VisionConfig(in_channels=c, temporal_patch_size=t, patch_size=p)
    x = bits((out, c, t, p, p), dtype, seed)
    kernel = Conv3d().to_jax(x)
    assert kernel.shape == (vision.patch_dim, out)
    assert Conv3d().torch_shape(kernel.shape, vision) == x.shape
    assert same_bits(Conv3d().to_torch(kernel, vision), x)


def test_linear_is_torch_linear():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(5, 3, bias=False)
    x = np.random.default_rng(0).standard_normal((2, 5), np.float32)
    kernel = Linear().to_jax(layer.weight.detach().numpy())
    np.testing.assert_allclose(x @ kernel, layer(torch.from_numpy(x)).detach().numpy(), rtol=1e-6, atol=1e-6)


def test_patch_embedding_is_torch_conv3d():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Conv3d(3, 4, (2, 5, 5), stride=(2, 5, 5), bias=False)
    x = np.random.default_rng(0).standard_normal((6, 3, 2, 5, 5), np.float32)
    kernel = Conv3d().to_jax(layer.weight.detach().numpy())
    expected = layer(torch.from_numpy(x)).detach().numpy().reshape(6, 4)
    np.testing.assert_allclose(x.reshape(6, -1) @ kernel, expected, rtol=1e-5, atol=1e-6)
