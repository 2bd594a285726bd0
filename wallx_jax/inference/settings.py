"""Validate the arguments of `predict` and `chat`; each error names the setting or the input at fault."""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np

HOTTEST = float(np.finfo(np.float32).max)


@contextlib.contextmanager
def naming(what: str, row: int, count: int) -> Iterator[None]:
    """Prefix the message of a ValueError raised inside with "`what` `row`: ", unless `count` is 1."""
    try:
        yield
    except ValueError as error:
        if count == 1:
            raise
        raise type(error)(f"{what} {row}: {error}") from None


def whole(name: str, value: Any, least: int) -> int:
    """Return the value as an int.

    Raises:
        ValueError: the value is not an integer, or is below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} is {value!r}; give an integer, at least {least}")
    return number


def seeds(seed: Any, count: int) -> list[int]:
    """Return one seed for each of `count` rows.

    Args:
        seed: one seed for all rows, or one for each.
        count: number of rows.

    Raises:
        ValueError: the number of seeds does not match, or a seed is not an integer of at least 0.
    """
    if isinstance(seed, str | bytes) or not isinstance(seed, Sequence | np.ndarray) or np.shape(seed) == ():
        return [whole("seed", seed, 0)] * count
    if len(seed) != count:
        raise ValueError(f"seed has {len(seed)} entries; give one for all, or one for each of {count}")
    return [whole("seed", each, 0) for each in seed]


def warmth(temperature: Any) -> np.float32 | None:
    """Return the temperature that logits are divided by before sampling; None for greedy decoding.

    Raises:
        ValueError: the temperature is not a finite number of at least 0.
    """
    if not isinstance(temperature, Real) or not 0 <= temperature <= HOTTEST:  # type: ignore[operator]  # typeshed has no Real <= float
        raise ValueError(f"temperature is {temperature!r}; give 0 (the likeliest token) or more")
    return np.float32(temperature) or None
