"""Reproduce PyTorch's random permutation, which upstream uses to split frames, without PyTorch."""

import numpy as np


def randperm(n: int, seed: int) -> np.ndarray:
    """Return the permutation torch.randperm(n, generator=torch.Generator().manual_seed(seed)), int64 [n].

    It is a Fisher-Yates shuffle whose i-th swap partner is i + (a 32-bit output of the Mersenne Twister) % (n - i), as
    in randperm_cpu of aten/src/ATen/native/TensorFactories.cpp.
    """
    # RandomState seeds the twister as PyTorch does, with Knuth's recurrence from the low 32 bits of the seed.
    outputs = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, max(n - 1, 0), np.uint32)
    order = list(range(n))
    for i, output in enumerate(outputs.tolist()):
        j = i + output % (n - i)
        order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)
