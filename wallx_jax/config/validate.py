"""Check each value of a configuration against the setting that the schema declares."""

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

from wallx_jax.config.defaults import PER_DATASET, SETTINGS
from wallx_jax.utils.errors import nearest
from wallx_jax.utils.settings import Setting

REFERENCE = "; docs/configuration.md lists them all"


def read_types(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Check names and types of flat values; ConfigDict itself accepts None, bools for numbers and any table.

    Returns:
        All settings, with values of the wrong type replaced by defaults so that later checks can proceed; and errors.
    """
    errors = [
        f"{key} = {given[key]!r}: no such setting{nearest(key, list(SETTINGS)) or REFERENCE}"
        for key in given.keys() - SETTINGS.keys()
    ]
    values = {}
    for key, setting in SETTINGS.items():
        default = copy.copy(setting.default)
        value = given.get(key, default)
        if setting.optional and value == "None":  # a None string setting on the command line
            value = None
        if problem := setting.type_problem(value):
            errors.append(f"{key} = {value!r}: {problem}")
            value = default
        elif setting.kind in (tuple, dict):
            errors += _item_errors(setting, value)
        values[key] = value
    found = {name: _dataset_errors(name, entry) for name, entry in values["datasets"].items()}
    values["datasets"] = {name: entry for name, entry in values["datasets"].items() if not found[name]}
    return values, sorted(errors + [error for of_entry in found.values() for error in of_entry])


def value_errors(v: Mapping[str, Any]) -> list[str]:
    """Check flat values of the right types against choices and bounds, and that what is required is there."""
    errors = []
    for key, setting in SETTINGS.items():
        value, is_used = v[key], not setting.only_with or v[setting.only_with]
        if setting.required and not value:
            errors.append(f"{key}: required; set it in the file or with --config.{key}=...")
        elif problem := setting.value_problem(value):
            errors.append(f"{key} = {value!r}: {problem}")
        elif isinstance(value, str) and value.startswith("/path/to/") and is_used:
            errors.append(f"{key} = {value!r}: replace the placeholder by a real path")
    return errors


def _item_errors(setting: Setting, value: Any) -> list[str]:
    """Check the items of a tuple, which are strings, or the entries of a table."""
    if setting.kind is dict:
        is_valid, expected = setting.entry or (lambda entry: True, "")
        return [
            f"{setting.key}.{name} = {entry!r}: expected {expected}"
            for name, entry in value.items()
            if not is_valid(entry)
        ]
    if wrong := [item for item in value if not isinstance(item, str)]:
        return [f"{setting.key} = {value}: {wrong} are not strings; write them in quotes"]
    if twice := sorted({item for item in value if value.count(item) > 1}):
        return [f"{setting.key} = {value}: {twice} are given twice; name each once"]
    return []


def _dataset_errors(name: str, entry: Any) -> list[str]:
    """Check the keys and the weight of a `datasets` entry; its values are checked like the first dataset's."""
    if not isinstance(entry, Mapping) or not entry.get("repo_id"):
        return [f"datasets.{name} = {entry!r}: expected a table with a repo_id, a hub repo id or local directory"]
    errors = []
    if not re.fullmatch(r"[\w-]+", name):
        errors.append(f"datasets.{name}: a name has letters, digits, _ and - only")
    for key in entry:
        if key not in (*PER_DATASET, "weight"):
            close = nearest(key, [*PER_DATASET, "weight"])
            errors.append(
                f"datasets.{name}.{key} = {entry[key]!r}: not a setting of one dataset{close}; those are {PER_DATASET}"
            )
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        errors.append(f"datasets.{name}.weight = {weight!r}: must be a number above 0")
    return errors
