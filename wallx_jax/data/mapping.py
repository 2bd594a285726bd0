"""Does the configuration fit the dataset and the prompt? Asked before any weight is loaded."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from wallx_jax.config import ConfigError, nearest
from wallx_jax.run_config import Camera, RunConfig

IMAGE_PREFIX = "observation.images."


class Info(Protocol):
    """The part of data.lerobot.DatasetInfo that is needed here."""

    repo_id: str
    features: Mapping[str, Mapping[str, Any]]
    camera_keys: Sequence[str]
    tasks: Sequence[str]


def check_dataset(run: RunConfig, info: Info) -> RunConfig:
    """Checks cameras, state and action of a dataset against the configuration.

    A camera may be written without its "observation.images." prefix. An empty dof_config becomes one group of all the
    action's dimensions; an empty agent_pos_config becomes dof_config where that fits the state, else one group.

    Returns:
        `run` with camera keys and dimension groups completed.

    Raises:
        ConfigError: listing everything that does not match, with what the dataset offers.
    """
    errors: list[str] = []
    cameras = tuple(_camera(camera, info, errors) for camera in run.data.cameras)
    if not cameras:
        errors.append(
            f"camera_views: empty, and no mapping is known for {run.data.repo_id}; map views to the dataset's cameras "
            f"{list(info.camera_keys)}, e.g. camera_views = {{'face_view': {next(iter(info.camera_keys), '...')!r}}}"
        )
    robot = run.robot
    action_dims = _dims("action_key", run.data.action_key, info, errors)
    state_dims = _dims("state_key", run.data.state_key, info, errors)
    dof = robot.dof or (("action", action_dims or 0),)
    agent_pos = robot.agent_pos or (robot.dof if _total(robot.dof) == state_dims else (("state", state_dims or 0),))
    _check_total("dof_config", dof, run.data.action_key, action_dims, info, errors)
    _check_total("agent_pos_config", agent_pos, run.data.state_key, state_dims, info, errors)
    for setting, keys, groups in (
        ("predict_action_keys", robot.predict_keys, dict(dof)),
        ("obs_action_keys", robot.obs_keys, dict(agent_pos)),
    ):
        if missing := [key for key in keys if key not in groups]:
            errors.append(f"{setting}: {missing} are not among the names {list(groups)}")
    if not any(task.strip() for task in info.tasks):
        errors.append(f"{info.repo_id} has no instructions: every sample needs a task text")
    if errors:
        raise ConfigError(*errors)
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, cameras=cameras),
        robot=dataclasses.replace(robot, dof=dof, agent_pos=agent_pos),
    )


def check_horizon(run: RunConfig, prompt_length: int) -> None:
    """Do prompt and actions fit max_length?

    Args:
        run: the configuration.
        prompt_length: tokens of the longest prompt of the dataset, without actions.

    Raises:
        ConfigError: with the numbers that do not add up.
    """
    if run.model.use_fast_tokenizer:
        name, actions = "max_fast_tokens", run.data.max_fast_tokens
    else:
        name, actions = "action_horizon", run.data.action_horizon
    if prompt_length + actions > run.data.max_length:
        raise ConfigError(
            f"max_length = {run.data.max_length}: the longest prompt has {prompt_length} tokens and {name} adds "
            f"{actions}; raise max_length to at least {prompt_length + actions}, or lower {name} or the resolution"
        )


def _camera(camera: Camera, info: Info, errors: list[str]) -> Camera:
    for key in (camera.key, IMAGE_PREFIX + camera.key):
        if key in info.camera_keys:
            return dataclasses.replace(camera, key=key)
    offered = list(info.camera_keys)
    hint = nearest(camera.key, offered) or nearest(IMAGE_PREFIX + camera.key, offered)
    errors.append(f"camera_views.{camera.view} = {camera.key!r}: no such camera{hint}; {info.repo_id} has {offered}")
    return camera


def _dims(setting: str, key: str, info: Info, errors: list[str]) -> int | None:
    """Width of a vector feature, or None with an error."""
    vectors = [name for name, feature in info.features.items() if len(feature["shape"]) == 1]
    if key in vectors:
        return int(info.features[key]["shape"][0])
    errors.append(f"{setting} = {key!r}: no such vector{nearest(key, vectors)}; {info.repo_id} has {vectors}")
    return None


def _check_total(
    table: str, groups: tuple[tuple[str, int], ...], key: str, dims: int | None, info: Info, errors: list[str]
) -> None:
    if dims is not None and _total(groups) != dims:
        names = info.features[key].get("names")
        called = f", named {names}" if names else ""
        errors.append(
            f"{table} sums to {_total(groups)} dims {dict(groups)}, but {key!r} of {info.repo_id} has {dims}{called}; "
            f"correct {table}, or leave it empty to use all {dims}"
        )


def _total(groups: tuple[tuple[str, int], ...]) -> int:
    return sum(dims for _, dims in groups)
