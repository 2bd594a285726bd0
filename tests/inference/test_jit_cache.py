import numpy as np

from wallx_jax.inference.jit_cache import BoundedJitCache


def test_forgotten_programs_are_compiled_again():
    cache, x = BoundedJitCache(lambda factor, x: factor * x, limit=2), np.arange(3)
    compilations = []
    for factor in (1, 2, 1, 3, 1, 3, 2):
        np.testing.assert_array_equal(cache((factor,), x), factor * x)
        compilations.append(cache.compilations)
    assert compilations == [1, 2, 2, 3, 3, 3, 4], "the one used least recently goes, here 2"
