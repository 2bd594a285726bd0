"""Compile a function once per input shape, keeping a bounded number of programs."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax

from wallx_jax.utils import jax_flags


class BoundedJitCache:
    """Jit-compiled `function(*options, *arrays)`, one program per combination of options, shapes and dtypes.

    jax.jit never evicts a program. Images of any size and prompts of any length would fill the memory of a server that
    runs for weeks, so only the `limit` most recently used programs are kept. Safe to share between threads.

    Args:
        function: called as `function(*options, *arrays)` while tracing.
        limit: maximum number of programs to keep.

    Attributes:
        compilations: number of programs compiled so far.
    """

    def __init__(self, function: Callable, limit: int = 16):
        self._function, self._limit = function, limit
        self._programs: OrderedDict[Hashable, Callable] = OrderedDict()
        self._lock = threading.Lock()
        self.compilations = 0

    @jax_flags.ours()
    def __call__(self, options: tuple[Hashable, ...], *arrays: Any) -> Any:
        """Run the function, compiling it first if no program fits.

        Args:
            options: static arguments, passed before the arrays.
            *arrays: pytrees of arrays.
        """
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
