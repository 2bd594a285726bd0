"""Parse number ranges such as "0:50,60" (0 to 49, and 60), with slices as in Python."""

import re
from collections.abc import Sequence

import numpy as np


def parse_ranges(text: str) -> tuple[tuple[int, int | None], ...]:
    """Parse comma-separated "START:STOP" and "NUMBER" entries; a missing START is 0, a missing STOP is the end.

    Returns:
        (start, stop) of each entry, with stop exclusive; None for the end.

    Raises:
        ValueError: an entry has another form, or its range is empty.
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no text; write e.g. '0:50,60'")
    ranges: list[tuple[int, int | None]] = []
    stop: int | None
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
    """Select the numbers that fall within the ranges.

    Args:
        text: ranges, as for `parse_ranges`.
        numbers: int [N], the numbers to select from.

    Returns:
        bool [N], whether each number is selected.

    Raises:
        ValueError: the text does not parse, or a range selects no number.
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
