"""Summarise a model's parameters by component, as rows of a printed table."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# (component, pattern of its parameter paths); the first match applies.
COMPONENTS: tuple[tuple[str, str], ...] = (
    ("adapters", r"/lora_[ab]$"),
    ("vision tower", r"^vision/"),
    ("vocabulary", r"^(embed|lm_head)/"),
    ("decoder, VLM expert", r"^decoder/layers/mlp/vlm/"),
    ("decoder, action expert", r"^decoder/layers/mlp/action/"),
    ("decoder, shared", r"^decoder/"),
    ("action heads", r"^action/"),
)


@dataclass(frozen=True)
class Row:
    """Parameters of one component that share a label.

    Attributes:
        part: name of the component, see COMPONENTS.
        label: label given by the caller, such as the optimizer group.
        count: number of parameters.
        size: their size in bytes.
    """

    part: str
    label: str
    count: int
    size: int


def component_of(path: str) -> str:
    """Return the component of a parameter; a path that matches no pattern is its own component."""
    return next((part for part, pattern in COMPONENTS if re.search(pattern, path)), path)


def rows(specs: Mapping[str, Any], label: Callable[[str], str] = lambda path: "") -> list[Row]:
    """Sum parameters by component and label.

    Args:
        specs: {path: anything with `shape` and `dtype`}.
        label: maps a path to its label.

    Returns:
        Rows in the order of `COMPONENTS`, then by label.
    """
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for path, spec in specs.items():
        count, size = totals.get(key := (component_of(path), label(path)), (0, 0))
        elements = math.prod(spec.shape)
        totals[key] = (count + elements, size + elements * np.dtype(spec.dtype).itemsize)
    order = [part for part, _ in COMPONENTS]
    place = {part: order.index(part) if part in order else len(order) for part, _ in totals}
    return [Row(*key, *totals[key]) for key in sorted(totals, key=lambda key: (place[key[0]], key))]


def table(lines: Iterable[Row]) -> list[str]:
    """Format rows as aligned lines of text, followed by their total."""
    lines = list(lines)
    total = Row("all", "", sum(row.count for row in lines), sum(row.size for row in lines))
    return [f"{row.part:<24}{row.count:>15,}{gib(row.size):>13}  {row.label}".rstrip() for row in [*lines, total]]


def gib(size: float) -> str:
    """Format a size in bytes as "1.50 GiB", or as "12.3 MiB" below a tenth of a GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
