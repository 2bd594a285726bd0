"""JAX's global switches, as the programs of this package are written for.

A program that acts with a policy may have set them for arithmetic of its own: 64-bit numbers, strict promotion, another
random generator. JAX reads them while it traces a function, so ours would compute something else there, or stop.
"""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """JAX's defaults, in this thread and until the block ends; as a decorator, while the function runs or is traced.

    The precision of matrix products and the default device stay the caller's choice.
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
