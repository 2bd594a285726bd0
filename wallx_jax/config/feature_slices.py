"""Parse and resolve feature slices, which define a robot's state or action vector in terms of dataset features.

A vector is written as comma-separated slices: "action[0:6],action.gripper" is dims 0 to 5 of one feature, then all dims
of another. Most vectors are just the name of one feature.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Features = Mapping[str, Mapping[str, Any]]  # from info.json: {key: {"dtype", "shape", "names"}}
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # present in every LeRobot dataset
NUMBER = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")  # dtypes that a vector may have


@dataclass(frozen=True)
class Slice:
    """A range of dims of one feature.

    Attributes:
        feature: name of the feature.
        start: first dim.
        stop: one past the last dim.
    """

    feature: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.feature}[{self.start}:{self.stop}]"


def parse_slice(text: str) -> tuple[str, int, int | None]:
    """Parse one slice, "action[0:6]" or "action.gripper".

    Returns:
        Name of the feature, first dim, and one past the last dim or None for all dims to the feature's end.

    Raises:
        ValueError: the text has neither form, or the slice is empty.
    """
    match = re.fullmatch(r"([^\[\],]+)(?:\[(\d+):(\d+)\])?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not FEATURE or FEATURE[START:STOP]")
    if match[2] is None:
        return match[1], 0, None
    start, stop = int(match[2]), int(match[3])
    if start >= stop:
        raise ValueError(f"{text!r} has no dims: it starts at {start} and stops before {stop}")
    return match[1], start, stop


def widths(features: Features) -> dict[str, int]:
    """Return {feature: number of dims} for a dataset's numeric 1-D features, without BOOKKEEPING."""
    return {
        name: int(feature["shape"][0])
        for name, feature in features.items()
        if len(feature["shape"]) == 1 and NUMBER.fullmatch(feature["dtype"])
        if name not in BOOKKEEPING
    }


def resolve_slice(text: str, features: Features) -> Slice:
    """Parse one slice and fill in its `stop`.

    Raises:
        ValueError: as in `parse_slice`; or the dataset has no such 1-D feature, or it has fewer dims.
    """
    feature, start, stop = parse_slice(text)
    known = widths(features)
    if feature not in known:
        raise ValueError(f"no feature {feature!r} that is a vector")
    dims = known[feature]
    if stop is not None and stop > dims:
        raise ValueError(f"{text.strip()} goes beyond the {dims} dims of {feature!r}")
    return Slice(feature, start, dims if stop is None else stop)


def locate(vector: str, features: Features) -> tuple[Slice, ...]:
    """Parse a vector into its slices.

    Raises:
        ValueError: as in `resolve_slice`.
    """
    return tuple(resolve_slice(text, features) for text in vector.split(","))


def join(parts: Iterable[Slice], features: Features) -> str:
    """Concatenate slices into a vector in its shortest form; the inverse of `locate`."""
    joined: list[Slice] = []
    for part in parts:
        if joined and (joined[-1].feature, joined[-1].stop) == (part.feature, part.start):
            part = Slice(part.feature, joined.pop().start, part.stop)
        joined.append(part)
    whole = {name: Slice(name, 0, dims) for name, dims in widths(features).items()}
    return ",".join(part.feature if part == whole[part.feature] else str(part) for part in joined)


def dim_names(vector: str, features: Features) -> list[str]:
    """Return a name per dim: the dataset's if it has one, else its index ("FEATURE[INDEX]" with several slices)."""
    parts = locate(vector, features)
    joined = len(parts) > 1
    numbers = (
        f"{part.feature}[{dim}]" if joined else str(dim) for part in parts for dim in range(part.start, part.stop)
    )
    return [number if name is None else name for name, number in zip(own_names(vector, features), numbers, strict=True)]


def own_names(vector: str, features: Features) -> list[str | None]:
    """Return the dataset's name for each dim; None for dims without a name."""
    named: list[str | None] = []
    for part in locate(vector, features):
        names, count = features[part.feature].get("names"), widths(features)[part.feature]
        if isinstance(names, Mapping):  # {"motors": [names]}, or {name: index}
            lists = [value for value in names.values() if isinstance(value, list)]
            names = lists[0] if lists else list(names)
        own = [str(name) for name in names] if isinstance(names, list) and len(names) == count else [None] * count
        named += own[part.start : part.stop]
    return named


def place(vector: str, dim: int, features: Features) -> str:
    """Return where one dim of a vector is in the dataset, as a slice such as "action[5:6]"."""
    places = [(part.feature, place) for part in locate(vector, features) for place in range(part.start, part.stop)]
    feature, start = places[dim]
    return f"{feature}[{start}:{start + 1}]"
