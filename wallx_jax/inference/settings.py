"""What callers of `predict` and `chat` give, checked; each error names the setting, or the input that it is about."""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np

HOTTEST = float(np.finfo(np.float32).max)


@contextlib.contextmanager
def naming(what: str, row: int, count: int) -> Iterator[None]:
    """ValueErrors inside begin with "`what` `row`: ", where there are several."""
    try:
        yield
    except ValueError as error:
        if count == 1:
            raise
        raise type(error)(f"{what} {row}: {error}") from None


def whole(name: str, value: Any, least: int) -> int:
    """An integer.

    Raises:
        ValueError: it is none, or below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} is {value!r}; give an integer, at least {least}")
    return number


def seeds(seed: Any, count: int) -> list[int]:
    """One seed for each of `count` rows, from one for all of them or from as many.

    Raises:
        ValueError: it is neither, or holds what is no integer of at least 0.
    """
    if isinstance(seed, str | bytes) or not isinstance(seed, Sequence | np.ndarray) or np.shape(seed) == ():
        return [whole("seed", seed, 0)] * count
    if len(seed) != count:
        raise ValueError(f"seed has {len(seed)} entries; give one for all, or one for each of {count}")
    return [whole("seed", each, 0) for each in seed]


def warmth(temperature: Any) -> np.float32 | None:
    """What logits are divided by before a token is drawn; None takes the likeliest.

    Raises:
        ValueError: it is not a finite number of at least 0.
    """
    if not isinstance(temperature, Real) or not 0 <= temperature <= HOTTEST:
        raise ValueError(f"temperature is {temperature!r}; give 0 (the likeliest token) or more")
    return np.float32(temperature) or None
