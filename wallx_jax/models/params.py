"""Define parameter shapes, dtypes and initialisation, and build a model from its parameters.

Parameters are kept outside the modules, as nested dicts; `from_params` builds a module from them.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from wallx_jax.models import scan
from wallx_jax.models.config import Numerics, WallXConfig
from wallx_jax.models.cpu_ops import resolve_kernels, use_kernels
from wallx_jax.models.lora import is_adapter
from wallx_jax.models.wallx import WallX
from wallx_jax.utils import jax_flags, tree

KEEP_IN_FP32 = ("decoder/norm/", "decoder/layers/input_norm/", "decoder/layers/post_norm/", "action/")


def param_dtype(path: str, numerics: Numerics) -> jnp.dtype:
    """Return the dtype of the parameter at `path`.

    It is float32 for decoder norms and action heads if `float32_islands` (lerobot's list), and always for adapters,
    which are small and trained; otherwise `param_dtype`.
    """
    if is_adapter(path):
        return jnp.dtype("float32")
    if numerics.float32_islands and path.startswith(KEEP_IN_FP32):
        return jnp.dtype("float32")
    return jnp.dtype(numerics.param_dtype)


@functools.cache
@jax_flags.ours()
def _abstract(config: WallXConfig, stacked: bool = True) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: WallX(config, stacked, rngs=nnx.Rngs(0))), nnx.Param)


def from_params(config: WallXConfig, params: tree.Tree) -> WallX:
    """Build the model from parameters (concrete or traced), with layers stacked or unrolled as in `params`.

    Kernels "auto" are those for JAX's default backend. A program that is compiled for other devices must name them.

    Raises:
        ValueError: `config.numerics.kernels` cannot run here.
    """
    unrolled = scan.is_unrolled(params)
    graphdef, state = _abstract(config, not unrolled)
    state = jax.tree.map(lambda x: x, state)  # copy, so that the cached state stays abstract
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(params) if unrolled else params)
    net = nnx.merge(graphdef, state)
    use_kernels(net, resolve_kernels(config.numerics, jax.default_backend()))
    return net


def abstract_params(config: WallXConfig) -> tree.Tree:
    """Return a nested dict of jax.ShapeDtypeStruct: each parameter's shape, and its dtype under config.numerics."""
    shapes = nnx.to_pure_dict(_abstract(config)[1])
    return tree.map_with_path(lambda path, x: jax.ShapeDtypeStruct(x.shape, param_dtype(path, config.numerics)), shapes)


@jax_flags.ours()
def init_params(config: WallXConfig, seed: int) -> tree.Tree:
    """Initialise parameters as Qwen2.5-VL and upstream do: weights normal(0, 0.02), biases 0, norm scales 1."""
    params = nnx.to_pure_dict(nnx.state(WallX(config, rngs=nnx.Rngs(seed)), nnx.Param))
    return tree.map_with_path(lambda path, x: x.astype(param_dtype(path, config.numerics)), params)
