"""Check the entries of a config.json against the dataclass fields that they fill."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin

MOST = 2**31 - 1  # largest size accepted
LEAST = {"rank": 0, "fullatt_block_indexes": 0}  # smallest accepted integer of a field, where it is not 1


def section(owner: Mapping[str, Any], name: str, errors: list[str], prefix: str = "") -> Mapping[str, Any]:
    """Return the nested object `owner[name]`, or {} if it is absent; report a value of another type in `errors`."""
    value = owner.get(name)
    if value is None or isinstance(value, Mapping):
        return value or {}
    errors.append(f"{prefix}{name} is {json.dumps(value)}; expected an object")
    return {}


def field_errors(kind: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one error per value that does not fit its field of the dataclass `kind`. null counts as absent."""
    return [
        f"{prefix}{field.name} is {json.dumps(values[field.name])}; expected {expected}"
        for field in dataclasses.fields(kind)
        if values.get(field.name) is not None
        if (expected := mismatch(values[field.name], field.type, LEAST.get(field.name, 1)))
    ]


def mismatch(value: Any, kind: Any, least: int = 1) -> str | None:
    """Return what was expected if a value does not fit the type of a dataclass field, else None.

    Args:
        value: value from the JSON file.
        kind: type of the field: bool, int (at least `least`), float (above 0), str, or a tuple of these. Other types
            are not checked.
        least: smallest accepted integer.
    """
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind in (int, int | None):
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST
        return None if fits else f"a whole number of at least {least}"
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        return None if fits else "a number above 0"
    if kind is str:
        return None if isinstance(value, str) else "a string"
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(value, list | tuple) and not any(mismatch(x, item, least) for x in value):
            return None
        return "a list of strings" if item is str else f"a list of whole numbers of at least {least}"
    return None
