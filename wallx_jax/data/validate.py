"""Check the configuration against the dataset and the prompt, before any weights are loaded."""

import dataclasses

from wallx_jax.config import feature_slices
from wallx_jax.config.schema import Camera, RunConfig
from wallx_jax.config.schema.robot import Groups, Table, sizes
from wallx_jax.data import naming
from wallx_jax.data.metadata import DatasetInfo, is_depth
from wallx_jax.data.prompt import FAST_CLOSING_TOKENS
from wallx_jax.utils.errors import ConfigError, nearest

IMAGE_PREFIX = "observation.images."
Slices = tuple[tuple[str, str], ...]


def check_dataset(run: RunConfig, info: DatasetInfo) -> RunConfig:
    """Check the cameras, state and action of the configuration against a dataset.

    A camera may be written without its "observation.images." prefix. An empty dof_config becomes one group with all of
    the action's dims; an empty agent_pos_config becomes dof_config where that fits the state and its names, else one
    group. If a table gives feature slices, its group sizes are derived from them, and its key becomes the vector of
    those slices. Names at dims that the dataset calls by another of the names are rejected: see `data.naming`.

    Returns:
        `run` with camera keys, state, action and dimension groups filled in.

    Raises:
        ConfigError: listing everything that does not match, and what the dataset offers.
    """
    errors: list[str] = []
    cameras = tuple(_camera(camera, info, errors) for camera in run.data.cameras)
    if not cameras:
        errors.append(
            f"camera_views: empty, and no mapping is known for {run.data.repo_id}; map views to the dataset's cameras, "
            f"e.g. camera_views = {{'face_view': {next(iter(info.camera_keys), '...')!r}}}"
        )
    robot, data = run.robot, run.data
    dof, action_key = _vector("dof_config", robot.dof, "action_key", data.action_key, info, errors)
    agent_pos, state_key = _vector("agent_pos_config", robot.agent_pos, "state_key", data.state_key, info, errors)
    if not robot.agent_pos and not _slices(robot.dof) and _total(agent_pos) in (0, _total(sizes(robot.dof))):
        agent_pos = agent_pos if _total(agent_pos) and naming.misplaced(dof, state_key, info) else dof
    actions, states = dict(dof), dict(agent_pos)
    for setting, keys, table, groups in (
        ("predict_action_keys", robot.predict_keys, "dof_config", actions),
        ("obs_action_keys", robot.obs_keys, "agent_pos_config", states),
        ("relative_action_keys", robot.relative_keys, "agent_pos_config", states),
    ):
        if missing := [key for key in keys if key not in groups]:
            errors.append(f"{setting}: {missing} are not among the names of {table}, {list(groups)}")
    for key in robot.relative_keys:
        if actions.get(key) and states.get(key) and actions[key] != states[key]:
            errors.append(
                f"relative_action_keys: {key!r} has {actions[key]} dims in dof_config and {states[key]} in "
                "agent_pos_config; both must have the same number of dims"
            )
    if not errors and robot.relative_keys:
        relative_to = dataclasses.replace(robot, dof=dof, agent_pos=agent_pos).relative_to()
        if wrong := naming.mistaken(relative_to, action_key, state_key, info):
            errors.append(f"relative_action_keys: {wrong}")
    if not any(task.strip() for task in info.tasks.values()):
        errors.append(f"{info.repo_id} has no instructions: every sample needs a task text")
    if errors:
        raise ConfigError(*errors, offer=offer(info))
    return dataclasses.replace(
        run,
        data=dataclasses.replace(data, cameras=cameras, state_key=state_key, action_key=action_key),
        robot=dataclasses.replace(robot, dof=dof, agent_pos=agent_pos),
    )


def offer(info: DatasetInfo) -> str:
    """Describe what a dataset offers: cameras with their sizes, vectors with the names of their dims."""
    lines = [f"{info.repo_id} offers"]
    for camera in info.camera_keys:
        if not is_depth(info.features[camera]):
            height, width = info.frame_size(camera)
            lines.append(f"  camera {camera}: {height} x {width} (height x width)")
    for feature, dims in feature_slices.widths(info.features).items():
        names = info.dim_names(feature) if info.features[feature].get("names") else []
        lines.append(f"  vector {feature}: {dims} dims{': ' if names else ''}{', '.join(names)}")
    return "\n".join(lines)


def check_horizon(run: RunConfig, prompt_length: int) -> None:
    """Check that prompt and actions fit into max_length.

    Args:
        run: the configuration.
        prompt_length: tokens of the dataset's longest prompt, without actions.

    Raises:
        ConfigError: with the numbers that do not add up.
    """
    if run.model.use_fast_tokenizer:
        name, actions = "max_fast_tokens", run.data.max_fast_tokens + FAST_CLOSING_TOKENS
    else:
        name, actions = "action_horizon", run.data.action_horizon
    if prompt_length + actions > run.data.max_length:
        raise ConfigError(
            f"max_length = {run.data.max_length}: the longest prompt has {prompt_length} tokens and {name} adds "
            f"{actions}; raise max_length to at least {prompt_length + actions}, or lower {name} or the resolution"
        )


def _camera(camera: Camera, info: DatasetInfo, errors: list[str]) -> Camera:
    for key in (camera.key, IMAGE_PREFIX + camera.key):
        if key in info.camera_keys:
            if is_depth(info.features[key]):
                errors.append(f"camera_views.{camera.view} = {key!r}: it contains depth maps; choose a color camera")
            return dataclasses.replace(camera, key=key)
    offered = list(info.camera_keys)
    hint = nearest(camera.key, offered) or nearest(IMAGE_PREFIX + camera.key, offered)
    errors.append(f"camera_views.{camera.view} = {camera.key!r}: no such camera{hint}")
    return camera


def _vector(
    setting: str, table: Table, key_setting: str, key: str, info: DatasetInfo, errors: list[str]
) -> tuple[Groups, str]:
    """Resolve the groups and the vector of a state or action; an empty table becomes a single group.

    Problems are appended to `errors`; groups whose slices are invalid then have 0 dims.
    """
    if slices := _slices(table):
        return _placed(setting, slices, info, errors)
    given = sizes(table)
    try:
        dims = info.dims(key)
    except ValueError:
        hint = nearest(key, list(feature_slices.widths(info.features)))
        errors.append(f"{key_setting} = {key!r}: no such vector{hint}")
        return given, key
    groups = given or ((key_setting.removesuffix("_key"), dims),)
    if _total(groups) != dims:
        errors.append(
            f"{setting} sums to {_total(groups)} dims {dict(groups)}, but {key!r} of {info.repo_id} has {dims}; "
            f"correct {setting}, or leave it empty to use all {dims}"
        )
    elif given and (wrong := naming.misplaced(given, key, info)):
        errors.append(f"{setting}: {wrong}")
    return groups, key


def _placed(setting: str, slices: Slices, info: DatasetInfo, errors: list[str]) -> tuple[Groups, str]:
    """Resolve a table of feature slices, as `_vector`.

    A dim may belong to only one name, since actions of two names could contradict each other.
    """
    groups, parts = [], []
    owners: dict[tuple[str, int], str] = {}
    for name, text in slices:
        try:
            part = feature_slices.resolve_slice(text, info.features)
        except ValueError as error:
            feature, *_ = feature_slices.parse_slice(text)
            known = list(feature_slices.widths(info.features))
            hint = "" if feature in known else nearest(feature, known)
            errors.append(f"{setting}.{name} = {text!r}: {error}{hint}")
            groups.append((name, 0))
            continue
        dims = [(part.feature, dim) for dim in range(part.start, part.stop)]
        if twice := [dim for dim in dims if dim in owners]:
            errors.append(
                f"{setting}: {owners[twice[0]]!r} and {name!r} both have {len(twice)} dims of {part.feature!r}, from "
                f"dim {twice[0][1]} on; a dim may belong to only one name"
            )
        owners |= dict.fromkeys(dims, name)
        groups.append((name, len(dims)))
        parts.append(part)
    return tuple(groups), feature_slices.join(parts, info.features)


def _slices(table: Table) -> Slices:
    return tuple((name, value) for name, value in table if isinstance(value, str))


def _total(groups: Groups) -> int:
    return sum(dims for _, dims in groups)
