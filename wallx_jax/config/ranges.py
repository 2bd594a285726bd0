"""Ranges of numbers as text: "0:50,60" is 0 to 49 and 60, with slices as Python's."""

import re
from collections.abc import Sequence

import numpy as np


def parse_ranges(text: str) -> tuple[tuple[int, int | None], ...]:
    """Parses "START:STOP" and "NUMBER" entries separated by commas; a missing START is 0, a missing STOP is the end.

    Returns:
        (start, stop) of each entry, stop excluded; None for the end.

    Raises:
        ValueError: an entry has another form or holds no number.
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no text; write e.g. '0:50,60'")
    ranges = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)|(\d*):(\d*)", entry.strip())
        if match is None:
            raise ValueError(f"{entry.strip()!r} is neither NUMBER nor START:STOP; write e.g. '0:50,60'")
        if match[1] is not None:
            start, stop = int(match[1]), int(match[1]) + 1
        else:
            start, stop = int(match[2] or 0), int(match[3]) if match[3] else None
        if stop is not None and start >= stop:
            raise ValueError(f"{entry.strip()!r} holds no number: it starts at {start} and stops before {stop}")
        ranges.append((start, stop))
    return tuple(ranges)


def select(text: str, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Selects the numbers that lie in the ranges.

    Args:
        text: as for `parse_ranges`.
        numbers: int [N], what there is.

    Returns:
        bool [N]: which of the numbers are selected.

    Raises:
        ValueError: the text does not parse, or a range selects nothing.
    """
    numbers = np.asarray(numbers)
    selected = np.zeros(len(numbers), bool)
    for start, stop in parse_ranges(text):
        inside = (numbers >= start) & (numbers < (np.inf if stop is None else stop))
        if not inside.any():
            wanted = str(start) if stop == start + 1 else f"{start}:{'' if stop is None else stop}"
            raise ValueError(f"{wanted!r} selects none of {_span(numbers)}")
        selected |= inside
    return selected


def _span(numbers: np.ndarray) -> str:
    return f"{numbers.min()}..{numbers.max()}" if len(numbers) else "none"
