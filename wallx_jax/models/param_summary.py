"""The parts of a model in words, for tables that people read."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# (part, what its parameter paths look like); the first match counts.
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
    """Parameters of one part that share a label: how many, and their bytes."""

    part: str
    label: str
    count: int
    size: int


def component_of(path: str) -> str:
    """What a parameter belongs to; a path that no pattern knows is a part of its own."""
    return next((part for part, pattern in COMPONENTS if re.search(pattern, path)), path)


def rows(specs: Mapping[str, Any], label: Callable[[str], str] = lambda path: "") -> list[Row]:
    """Specs {path: shape and dtype} summed up by part and label, in the order of `COMPONENTS`."""
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for path, spec in specs.items():
        count, size = totals.get(key := (component_of(path), label(path)), (0, 0))
        elements = math.prod(spec.shape)
        totals[key] = (count + elements, size + elements * np.dtype(spec.dtype).itemsize)
    order = [part for part, _ in COMPONENTS]
    place = {part: order.index(part) if part in order else len(order) for part, _ in totals}
    return [Row(*key, *totals[key]) for key in sorted(totals, key=lambda key: (place[key[0]], key))]


def table(lines: Iterable[Row]) -> list[str]:
    """Aligned text, one line per row and the sum."""
    lines = list(lines)
    total = Row("all", "", sum(row.count for row in lines), sum(row.size for row in lines))
    return [f"{row.part:<24}{row.count:>15,}{gib(row.size):>13}  {row.label}".rstrip() for row in [*lines, total]]


def gib(size: float) -> str:
    """Bytes as "1.50 GiB", or "12.3 MiB" below a tenth of a GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
