"""Settings of the robot: named groups of state and action dims."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from wallx_jax.config.feature_slices import parse_slice
from wallx_jax.utils.errors import nearest
from wallx_jax.utils.settings import setting

Table = tuple[tuple[str, int | str], ...]  # (name, number of dims or feature slice)
Groups = tuple[tuple[str, int], ...]  # (name, number of dims)


def _is_group(dims: Any) -> bool:
    """Return whether a value is a number of dims or a feature slice."""
    if not isinstance(dims, str):
        return isinstance(dims, int) and not isinstance(dims, bool) and dims >= 1
    try:
        return bool(parse_slice(dims))
    except ValueError:
        return False


GROUPS = (
    _is_group,
    "a number of dims, at least 1, or a place in the dataset, 'FEATURE[START:STOP]' or 'FEATURE'",
)


@dataclass(frozen=True, kw_only=True)
class RobotConfig:
    """Named groups of state and action dims, in vector order.

    `wallx_jax.data.validate.check_dataset` replaces an empty table by one group of all dims, and feature slices such as
    "action[0:6]" by their number of dims.

    Attributes:
        dof: (name, number of dims or feature slice) of each action group.
        agent_pos: the same for the state.
    """

    robot_name: ClassVar[str | None] = setting(
        None, "upstream's customized_robot_config.name; if set, it must equal repo_id", derived=True, inherited=False
    )
    dof: Table = setting(
        {},
        "{name: dims} of the action groups, in order: numbers of dims of action_key, or slices that reorder, drop or "
        'join dims, as in {"arm": "action[0:6]", "gripper": "action.gripper"}; empty: one group of all dims',
        key="dof_config",
        derived=True,
        entry=GROUPS,
        per_dataset=True,
    )
    agent_pos: Table = setting(
        {},
        "the same for the state groups, with state_key; empty: as dof_config if that fits",
        key="agent_pos_config",
        derived=True,
        entry=GROUPS,
        per_dataset=True,
    )
    predict_keys: tuple[str, ...] = setting(
        (),
        "groups of dof_config to predict, the others are masked; empty: all",
        key="predict_action_keys",
        per_dataset=True,
    )
    obs_keys: tuple[str, ...] = setting(
        (),
        "groups of agent_pos_config that the policy observes, the others are masked; empty: all",
        key="obs_action_keys",
        per_dataset=True,
    )
    relative_keys: tuple[str, ...] = setting(
        (),
        "groups trained as the difference from the state at the start of the chunk (openpi's delta actions), which "
        "inference adds again; each must be in dof_config and, with as many dims, in agent_pos_config; empty: all "
        "actions are absolute",
        key="relative_action_keys",
        per_dataset=True,
    )

    def predicted(self) -> tuple[bool, ...]:
        """Return one flag per action dim: True if it is predicted, False if it is masked."""
        return _used(sizes(self.dof), self.predict_keys)

    def observed(self) -> tuple[bool, ...]:
        """Return one flag per state dim: True if the policy observes it, False if it is masked."""
        return _used(sizes(self.agent_pos), self.obs_keys)

    def relative_to(self) -> tuple[int, ...]:
        """Return, per action dim, the state dim that it is relative to, or -1; empty if no action is relative."""
        if not self.relative_keys:
            return ()
        first_of: dict[str, int] = {}
        first = 0
        for name, dims in sizes(self.agent_pos):
            first_of[name], first = first, first + dims
        return tuple(
            first_of[name] + dim if name in self.relative_keys else -1
            for name, dims in sizes(self.dof)
            for dim in range(dims)
        )

    @staticmethod
    def errors(v: Mapping[str, Any]) -> list[str]:
        """Check the section's settings against each other, given all settings by key."""
        errors = []
        for key in ("dof_config", "agent_pos_config"):
            places = [name for name, dims in v[key].items() if isinstance(dims, str)]
            if counts := [name for name in v[key] if places and name not in places]:
                errors.append(
                    f"{key}: {places} say places in the dataset, {counts} numbers of dims; use one for all names"
                )
        # Without its own table, the state has the names of the action, unless those are feature slices.
        has_places = any(isinstance(dims, str) for dims in v["dof_config"].values())
        names_in = {"dof_config": list(v["dof_config"])}
        names_in["agent_pos_config"] = list(v["agent_pos_config"] or ({} if has_places else v["dof_config"]))
        for keys, tables in (
            ("predict_action_keys", ["dof_config"]),
            ("obs_action_keys", ["agent_pos_config"]),
            ("relative_action_keys", ["dof_config", "agent_pos_config"]),
        ):
            for key in (key for key in dict.fromkeys(v[keys]) if isinstance(key, str)):
                if table := next((table for table in tables if key not in names_in[table]), None):
                    names = names_in[table]
                    errors.append(f"{keys}: {key!r} is not in {table}{nearest(key, names)}; it has {names}")
        return errors


def sizes(table: Table) -> Groups:
    """Return the groups of a table whose entries are numbers of dims, as all are after `check_dataset`."""
    return tuple((name, value) for name, value in table if isinstance(value, int))


def _used(table: Groups, keys: tuple[str, ...]) -> tuple[bool, ...]:
    return tuple(not keys or name in keys for name, dims in table for _ in range(dims))
