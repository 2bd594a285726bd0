"""Run the package's code under JAX's default global flags.

A program that embeds a policy may have changed these flags for its own computations: 64-bit types, strict promotion,
another random number generator. JAX reads them while tracing, so our functions would compute something else, or fail.
"""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """Set JAX's default flags in this thread within the `with` block or, as a decorator, while the function runs.

    Matmul precision and the default device stay as the caller set them.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
        jax.transfer_guard("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.debug_key_reuse(False),
        jax.disable_jit(False),
    ):
        yield
