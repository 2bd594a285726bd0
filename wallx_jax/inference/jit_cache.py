"""Functions compiled once per shape, for a bounded number of shapes."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax

from wallx_jax.utils import jax_flags


class BoundedJitCache:
    """`function(*options, *arrays)` under XLA: one program for each combination of options and array shapes.

    jax.jit keeps every program for ever. Images of any size and prompts of any length would fill the memory of a server
    that runs for weeks, so only the `limit` programs used last are kept. Threads may share one.

    Attributes:
        compilations: how many programs have been compiled so far.
    """

    def __init__(self, function: Callable, limit: int = 16):
        self._function, self._limit = function, limit
        self._programs: OrderedDict[Hashable, Callable] = OrderedDict()
        self._lock = threading.Lock()
        self.compilations = 0

    @jax_flags.ours()
    def __call__(self, options: tuple[Hashable, ...], *arrays: Any) -> Any:
        """Args: `options`, static arguments that go before the arrays; `arrays`, pytrees of arrays."""
        leaves, structure = jax.tree.flatten(arrays)
        key = (options, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            program = self._programs.pop(key, None)
            if program is None:
                self.compilations += 1
                program = jax.jit(functools.partial(self._function, *options)).lower(*arrays).compile()
            self._programs[key] = program
            if len(self._programs) > self._limit:
                self._programs.popitem(last=False)
        return program(*arrays)
