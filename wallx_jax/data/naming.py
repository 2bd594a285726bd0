"""Check that a robot's dim names agree with the dataset's own names for the same dims.

A mismatch would silently train another joint.
"""

from collections.abc import Sequence

from wallx_jax.config import feature_slices
from wallx_jax.data.metadata import DatasetInfo

SEPARATORS = "._-/ "  # between the parts of a dim's name


def misplaced(groups: Sequence[tuple[str, int]], vector: str, info: DatasetInfo) -> str | None:
    """Describe the first name that covers the wrong dims according to the dataset's own dim names.

    Case is ignored. A dim matches a name if the dataset gives it that name, optionally followed by a suffix such as
    ".pos". A name for several dims also matches dims that begin with it ("left_waist" matches "left"). A name without
    such a match takes the only dim that ends with it, if there is exactly one ("main_gripper" matches "gripper").

    Args:
        groups: (name, number of dims) in the order of the vector, covering all of its dims.
        vector: feature slices of a state or action, see wallx_jax.config.feature_slices.
        info: the dataset.

    Returns:
        The message, or None if all names fit.
    """
    called = feature_slices.own_names(vector, info.features)
    owned, first = {name: _dims_of(name, dims, called) for name, dims in groups}, 0
    for name, dims in groups:
        own, mine = range(first, first + dims), owned[name]
        first += dims
        of_others = [dim for dim in own if dim not in mine and any(dim in its for its in owned.values())]
        if of_others or (mine and not set(mine) & set(own)):
            dim = of_others[0] if of_others else own.start
            elsewhere = [place for place in mine if place not in own]
            found = f"; its {called[elsewhere[0]]!r} is dim {elsewhere[0]}" if elsewhere else ""
            example = feature_slices.place(vector, elsewhere[0] if elsewhere else own.start, info.features)
            return (
                f"{name!r} covers dim {dim}, which the dataset calls {called[dim]!r}{found}; list the names in the "
                f"dataset's order, or give a feature slice for each: {{{name!r}: {example!r}, ...}}"
            )
    return None


def mistaken(relative_to: Sequence[int], action: str, state: str, info: DatasetInfo) -> str | None:
    """Describe the first action dim that is relative to a state dim of another name although its own name exists there.

    Args:
        relative_to: state dim per action dim, or -1.
        action: feature slices of the action.
        state: feature slices of the state.
        info: the dataset.

    Returns:
        The message, or None if there is no such dim.
    """
    actions, states = feature_slices.own_names(action, info.features), feature_slices.own_names(state, info.features)
    for name, dim in zip(actions, relative_to, strict=False):  # empty where no action is relative
        if dim >= 0 and name is not None and name != states[dim] and name in states:
            own = states.index(name)
            return (
                f"{name!r} would be relative to the state {states[dim]!r}, but the state of the same name is dim "
                f"{own}; give agent_pos_config the order of dof_config, with feature slices such as "
                f"{feature_slices.place(state, own, info.features)!r}"
            )
    return None


def _dims_of(name: str, dims: int, called: Sequence[str | None]) -> list[int]:
    """Return the dims that match a name, by the rules in `misplaced`."""
    name, known = name.casefold(), [(dim, text.casefold()) for dim, text in enumerate(called) if text is not None]
    behind = SEPARATORS if dims > 1 else "."
    found = [dim for dim, text in known if text == name or text.startswith(tuple(name + mark for mark in behind))]
    ending = [dim for dim, text in known if text.split(".")[0].endswith(tuple(mark + name for mark in SEPARATORS))]
    return found or (ending if len(ending) == 1 else [])
