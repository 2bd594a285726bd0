"""The choice of kernels, and layers with custom gradients: those that JAX derives from the formulae."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wallx_jax.models import scan
from wallx_jax.models.config import TINY, Kernels, Numerics
from wallx_jax.models.cpu_ops import CpuLinear, CpuRMSNorm, resolve_kernels, rms_norm, use_kernels
from wallx_jax.models.decoder import Attention, Decoder
from wallx_jax.models.layers import Linear, RMSNorm
from wallx_jax.models.params import abstract_params, from_params, init_params
from wallx_jax.models.vision import VisionAttention


def formula_of_norm(params, x):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-3)
    return (x32 * inverse * params["scale"].astype(jnp.float32)).astype(x.dtype)


def formula_of_linear(params, x):
    y = x @ params["kernel"].astype(x.dtype)
    if "lora_a" in params:
        y = y + (x @ params["lora_a"].astype(x.dtype)) @ params["lora_b"].astype(x.dtype) * 0.5
    return y + params["bias"].astype(x.dtype)


def adapted() -> Linear:
    layer = Linear(24, 10, bias=True, rngs=nnx.Rngs(0))
    layer.lora_a, layer.lora_b = nnx.Param(jnp.zeros((24, 3))), nnx.Param(jnp.zeros((3, 10)))
    layer.lora_scale = 0.5
    return layer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", [Kernels.XLA, Kernels.CPU])
@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (lambda: RMSNorm(24, 1e-3), formula_of_norm),
        (lambda: Linear(24, 10, bias=True, rngs=nnx.Rngs(0)), formula_of_linear),
        (adapted, formula_of_linear),
    ],
    ids=["norm", "linear", "adapted"],
)
def test_output_and_gradients_are_those_of_the_formula(make, formula, kernels, dtype):
    rng = np.random.default_rng(0)
    layer = make()
    use_kernels(layer, kernels)
    assert (type(layer) in (CpuLinear, CpuRMSNorm)) == (kernels == Kernels.CPU)
    graphdef, state = nnx.split(layer, nnx.Param)
    params = {key: jnp.asarray(rng.normal(size=x.shape), dtype) for key, x in nnx.to_pure_dict(state).items()}
    x = jnp.asarray(rng.normal(size=(2, 7, 24)), dtype)

    def ours(params, x):
        own = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(own, params)
        return nnx.merge(graphdef, own)(x)

    def loss(layer, params, x):
        y = layer(params, x)
        return jnp.sum(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape) * y)

    assert ours(params, x).dtype == dtype
    tolerance = {"rtol": 1e-6, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-2, "atol": 1e-1}
    np.testing.assert_allclose(*(np.asarray(layer(params, x), np.float32) for layer in (ours, formula)), **tolerance)
    (ours_params, ours_x), (plain_params, plain_x) = (
        jax.jit(jax.grad(lambda p, x, layer=layer: loss(layer, p, x), argnums=(0, 1)))(params, x)
        for layer in (ours, formula)
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 1e-1}
    for name, gradient in {**ours_params, "x": ours_x}.items():
        assert gradient.dtype == dtype
        wanted = {**plain_params, "x": plain_x}[name]
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32), np.asarray(wanted, np.float32), **tolerance, err_msg=name
        )


@pytest.mark.parametrize(
    ("kernels", "platform", "resolved"),
    [("auto", "cpu", "cpu"), ("auto", "gpu", "xla"), ("auto", "tpu", "xla"), ("cudnn", "gpu", "cudnn"),
     *((kernels, platform, kernels) for kernels in ("cpu", "xla") for platform in ("cpu", "gpu", "tpu"))],
)  # fmt: skip
def test_auto_depends_on_the_platform(kernels, platform, resolved):
    assert resolve_kernels(Numerics(kernels=kernels), platform) == resolved


@pytest.mark.parametrize(
    ("platform", "dtype", "message"),
    [
        ("cpu", "bfloat16", "numerics.kernels is 'cudnn', which needs an NVIDIA GPU, but JAX uses the CPU; set 'auto'"),
        ("tpu", "bfloat16", "numerics.kernels is 'cudnn', which needs an NVIDIA GPU, but JAX uses the TPU; set 'auto'"),
        (
            "gpu",
            "float32",
            "numerics.kernels is 'cudnn', which needs bfloat16, but numerics.compute_dtype is 'float32'",
        ),
    ],
)
def test_cudnn_where_it_cannot_run_is_refused(platform, dtype, message):
    with pytest.raises(ValueError, match=message):
        resolve_kernels(Numerics(kernels="cudnn", compute_dtype=dtype), platform)


@pytest.mark.parametrize("layers", ["stacked", "unrolled"])
def test_a_model_is_switched_as_a_whole(layers, monkeypatch):
    """As its config says, or by the platform; the config itself stays as it is."""
    params = init_params(TINY, 0)
    params = params if layers == "stacked" else scan.unstack_layers(params)

    def built(kernels: str) -> tuple[Kernels, set[type]]:
        net = from_params(TINY.replace(numerics={"kernels": kernels}), params)
        assert net.config.numerics.kernels == kernels
        modules = [module for _, module in nnx.iter_modules(net)]
        chosen = {m.kernels for m in modules if isinstance(m, Attention | VisionAttention | Decoder)}
        assert len(chosen) == 1
        return *chosen, {type(m) for m in modules if isinstance(m, Linear | RMSNorm)}

    on_cpu, elsewhere = (Kernels.CPU, {CpuLinear, CpuRMSNorm}), (Kernels.XLA, {Linear, RMSNorm})
    assert built("cpu") == built("auto") == on_cpu
    assert built("xla") == elsewhere
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert built("auto") == elsewhere and built("cpu") == on_cpu


def test_parameters_of_a_model_with_other_kernels_can_be_read_anywhere():
    """Converting a checkpoint that was trained with cuDNN needs no GPU."""
    cudnn = TINY.replace(numerics={"kernels": "cudnn"})
    assert jax.tree.structure(abstract_params(cudnn)) == jax.tree.structure(abstract_params(TINY))
    with pytest.raises(ValueError, match="numerics.kernels"):
        from_params(cudnn, init_params(cudnn, 0))


def test_norm_of_zeros_has_finite_gradients():
    grads = jax.grad(lambda x: rms_norm(x, jnp.ones(4), 1e-6).sum())(jnp.zeros((2, 4)))
    assert np.isfinite(grads).all()
