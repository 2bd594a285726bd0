"""Do a robot's names of dims mean those that the dataset calls by them? Otherwise another joint would be trained."""

from collections.abc import Sequence

from wallx_jax.config import feature_slices
from wallx_jax.data.metadata import DatasetInfo

SEPARATORS = "._-/ "  # between the words of a dim's name


def misplaced(groups: Sequence[tuple[str, int]], vector: str, info: DatasetInfo) -> str | None:
    """The first name that stands for a dim which the dataset calls by another of the names; None if all fit.

    A dim is of a name if the dataset calls it that, perhaps with ".pos" or the like behind; of a name for several dims
    also if it begins with that ("left_waist" is of "left"); and of a name that is of no dim so far, if it is the only
    one that ends with it ("main_gripper" is of "gripper").

    Args:
        groups: (name, dims) in the order of the vector, all of its dims.
        vector: a state or action, see wallx_jax.config.feature_slices.
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
                f"{name!r} stands at dim {dim}, which the dataset calls {called[dim]!r}{found}; write the names in the "
                f"dataset's order, or say where all of them are: {{{name!r}: {example!r}, ...}}"
            )
    return None


def mistaken(relative_to: Sequence[int], action: str, state: str, info: DatasetInfo) -> str | None:
    """The first action dim that is relative to a state of another name, though there is one of its own.

    Args:
        relative_to: per action dim the state dim, or -1.
        action, state: vectors.
    """
    actions, states = feature_slices.own_names(action, info.features), feature_slices.own_names(state, info.features)
    for name, dim in zip(actions, relative_to, strict=False):  # empty where no action is relative
        if dim >= 0 and name is not None and name != states[dim] and name in states:
            own = states.index(name)
            return (
                f"{name!r} would be relative to the state {states[dim]!r}, its own is dim {own}; give agent_pos_config "
                f"the order of dof_config, with places: {feature_slices.place(state, own, info.features)!r}"
            )
    return None


def _dims_of(name: str, dims: int, called: Sequence[str | None]) -> list[int]:
    """The dims that `misplaced` takes for those of a name."""
    name, known = name.casefold(), [(dim, text.casefold()) for dim, text in enumerate(called) if text is not None]
    behind = SEPARATORS if dims > 1 else "."
    found = [dim for dim, text in known if text == name or text.startswith(tuple(name + mark for mark in behind))]
    ending = [dim for dim, text in known if text.split(".")[0].endswith(tuple(mark + name for mark in SEPARATORS))]
    return found or (ending if len(ending) == 1 else [])
