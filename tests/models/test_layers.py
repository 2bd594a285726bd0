"""Layers whose gradients are written out: those that JAX works out by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wallx_jax.models.layers import Linear, RMSNorm


def plain_norm(params, x, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * params["scale"].astype(jnp.float32)).astype(x.dtype)


def plain_linear(params, x, _):
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "make, plain",
    [
        (lambda: RMSNorm(24, 1e-3), plain_norm),
        (lambda: Linear(24, 10, bias=True, rngs=nnx.Rngs(0)), plain_linear),
    ],
    ids=["norm", "linear"],
)
def test_gradients_are_those_of_the_formula(make, plain, dtype):
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(make(), nnx.Param)
    params = {key: jnp.asarray(rng.normal(size=x.shape), dtype) for key, x in nnx.to_pure_dict(state).items()}
    x = jnp.asarray(rng.normal(size=(2, 7, 24)), dtype)

    def ours(params, x):
        own = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(own, params)
        return nnx.merge(graphdef, own)(x)

    def loss(layer, params, x):
        y = layer(params, x)
        return jnp.sum(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape) * y)

    def expected(params, x):
        return plain(params, x, 1e-3)

    assert ours(params, x).dtype == dtype
    np.testing.assert_allclose(ours(params, x), expected(params, x), rtol=1e-6 if dtype == "float32" else 1e-2)
    (ours_params, ours_x), (plain_params, plain_x) = (
        jax.jit(jax.grad(lambda p, x, layer=layer: loss(layer, p, x), argnums=(0, 1)))(params, x)
        for layer in (ours, expected)
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 4e-2}
    for name, gradient in {**ours_params, "x": ours_x}.items():
        assert gradient.dtype == dtype
        wanted = {**plain_params, "x": plain_x}[name]
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32), np.asarray(wanted, np.float32), **tolerance, err_msg=name
        )
