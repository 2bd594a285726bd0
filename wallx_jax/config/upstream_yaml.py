"""Translate an upstream (PyTorch) Wall-X YAML configuration (workspace/lerobot_example/config_qact*.yml)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from wallx_jax.config.defaults import SETTINGS, default_config
from wallx_jax.utils.errors import nearest
from wallx_jax.utils.files import read_text

# Upstream's key -> ours. If two map to the same key, the later one wins.
MAPPED = {
    key: key
    for key in (
        "pretrained_wallx_path", "save_path", "use_fast_tokenizer", "action_tokenizer_path", "norm_stats_path",
        "log_name", "log_project", "profile", "profile_save_path", "profile_wait_iters", "profile_warmup_iters",
        "profile_active_iters", "num_warmup_steps", "num_training_steps", "learning_rate", "min_lr", "num_epoch",
        "gradient_accumulation_steps", "batch_size_per_gpu", "eval_batch_size_per_gpu", "num_workers", "max_grad_norm",
        "freeze_vlm", "action_expert_learning_rate", "train_action_expert_only", "flow_loss_weight", "resume.ckpt",
        "resume.load_ckpt_only", "dof_config", "agent_pos_config",
    )
} | {
    "pretrained_qwen_vl_path": "pretrained_wallx_path",
    "customized_robot_config.name": "robot_name",
    "customized_robot_config.customized_dof_config": "dof_config",
    "customized_robot_config.customized_agent_pos_config": "agent_pos_config",
    "data.lerobot_config.repo_id": "repo_id",
    "data.lerobot_config.root": "dataset_root",
    "data.lerobot_config.revision": "dataset_revision",
    "data.lerobot_config.download_videos": "download_videos",
    "data.action_horizon": "action_horizon",
    "data.train_test_split": "train_test_split",
    "data.split_seed": "split_seed",
    "data.max_length": "max_length",
    "data.resolution": "resolution",
    "data.obs_action_keys": "obs_action_keys",
    "data.predict_action_keys": "predict_action_keys",
}  # fmt: skip

_FRAMES = "frames are always read one by one, with action chunks by frame number"
# Upstream's key -> why it has no counterpart here.
WITHOUT_MEANING = {
    "model_type": "WALL-OSS and Qwen2.5-VL weights are told apart by their tensors",
    "qwen_vl_act_config_path": "shapes come from the weights, and action_expert_intermediate_size",
    "processor_path": "tokenizer and image settings come with the weights",
    "enable_customized_robot_config": "a customized_robot_config is used unless this is false",
    "padding_side": "prompts are always padded on the left",
    "epoch_save_interval": "checkpoints are counted in updates, see save_interval",
    "torch_compile": "every step is compiled by XLA",
    "FSDP2": "became mesh.fsdp and mesh.data",
    "resume.validate_first": "validation runs every eval_interval updates",
    "data.use_lerobot": "LeRobot datasets are the only source",
    "data.priority_order": "a LeRobot sample has one instruction, its task",
    "data.resolution.multi_modal": "a LeRobot dataset has no view of this name",
    "data.lerobot_config.episodes": "upstream reads this key nowhere; here `episodes` restricts the dataset",
    "data.lerobot_config.image_transforms": _FRAMES,
    "data.lerobot_config.delta_timestamps": _FRAMES,
    "data.lerobot_config.tolerance_s": _FRAMES,
    "data.lerobot_config.video_backend": _FRAMES,
    "data.lerobot_config.force_cache_sync": "delete the cached dataset to download it again",
}
_ROBOT = "customized_robot_config."


def read_upstream_yaml(path: str | Path) -> tuple[ConfigDict, str]:
    """Read an upstream configuration file and translate its keys.

    Returns:
        The configuration, locked, and a report of the keys whose meaning changed or that have no counterpart here.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, or keys are unknown, duplicated or of the wrong type; one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no upstream configuration at {path}; write configs/upstream_yaml.py:PATH")
    try:
        tree = yaml.load(read_text(path), _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no settings: expected `key: value` lines, as in upstream's config_qact.yml")
    given = _flatten(tree)
    known = [*MAPPED, *WITHOUT_MEANING]
    errors = [f"{key}: no such upstream setting{nearest(key, known)}" for key in given if key not in known]

    config, notes = default_config(), {key: WITHOUT_MEANING[key] for key in given if key in WITHOUT_MEANING}
    if isinstance(given.get("data.resolution"), dict) and "multi_modal" in given["data.resolution"]:
        given["data.resolution"] = {k: v for k, v in given["data.resolution"].items() if k != "multi_modal"}
        notes["data.resolution.multi_modal"] = WITHOUT_MEANING["data.resolution.multi_modal"]
    given = _choose_robot(given, notes)
    for key, target in MAPPED.items():
        if given.get(key) is not None and (message := _assign(config, target, given[key])):
            errors.append(f"{key}: {message}")
    if errors:
        raise ValueError(f"{path}: " + "; ".join(errors))
    config.split_mode = "frame"
    notes["data.train_test_split"] = "with split_mode = 'frame', upstream's split; 'episode' holds out whole episodes"
    if given.get("FSDP2"):
        config.mesh.data, config.mesh.fsdp = 1, -1
    if config.num_training_steps is not None:
        notes["num_training_steps"] = "also ends the run, if num_epoch does not; upstream only stretches the cosine"
    if frozen := [key for key in ("freeze_vlm", "train_action_expert_only") if config[key]]:
        config.train_action_heads = False
        notes[frozen[0]] = "with train_action_heads = False, since upstream freezes the action heads too"
    return config, _report(path, notes)


def _choose_robot(given: Mapping[str, Any], notes: dict[str, str]) -> dict[str, Any]:
    """Keep only one description of the robot: upstream's customized one if enabled, else dof_config.

    With a customized robot, upstream's dof_config and action keys merely record the names of the model's own 20
    channels; they do not describe this robot.
    """
    given = dict(given)
    if given.get("enable_customized_robot_config") is False:
        return {key: value for key, value in given.items() if not key.startswith(_ROBOT)}
    custom = given.get(f"{_ROBOT}customized_dof_config")
    if not custom or not isinstance(custom, Mapping):  # a wrong type is reported by _assign
        return given
    state = given.get(f"{_ROBOT}customized_agent_pos_config")
    state = state if state and isinstance(state, Mapping) else custom
    for key, names in (("data.predict_action_keys", custom), ("data.obs_action_keys", state)):
        if isinstance(given.get(key), list) and not all(name in [*names] for name in given[key]):
            del given[key]
            notes[key] = "names channels of the model, not of customized_robot_config: all of the robot's are used"
    for key in ("dof_config", "agent_pos_config"):
        if given.pop(key, None) is not None:
            notes[key] = "describes the model's channels; customized_robot_config describes the robot"
    return given


def _assign(config: ConfigDict, target: str, value: Any) -> str | None:
    """Set config.target; return an error instead of raising. Numbers may be strings: YAML 1.1 reads 5e-5 as one."""
    *parents, last = target.split(".")
    for parent in parents:
        config = config[parent]
    kind = SETTINGS[target].kind
    try:
        if kind in (int, float) and isinstance(value, str):
            value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if kind in (dict, bool, tuple) and not isinstance(value, list if kind is tuple else kind):
            raise TypeError
        config[last] = tuple(value) if kind is tuple else value
    except (TypeError, ValueError):
        return f"{value!r} is not {_KINDS.get(kind, kind.__name__)}"
    return None


_KINDS = {dict: "a table", tuple: "a list", bool: "true or false", int: "a whole number", float: "a number",
          str: "a text"}  # fmt: skip


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree to {"data.action_horizon": value}; the values of known keys are kept whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in MAPPED and name not in WITHOUT_MEANING:
            flat |= _flatten(value, f"{name}.")
        elif value is not None or not any(other.startswith(f"{name}.") for other in (*MAPPED, *WITHOUT_MEANING)):
            flat[name] = value  # skips empty sections, such as `resume:` with all its lines commented out
    return flat


def _report(path: Path, notes: Mapping[str, str]) -> str:
    """Format the notes as one block; keys with the same reason share a line."""
    reasons: dict[str, list[str]] = {}
    for key, reason in notes.items():
        reasons.setdefault(reason, []).append(key)
    lines = [f"  {', '.join(keys)}: {reason}" for reason, keys in reasons.items()]
    return "\n".join([f"{path}: read, with these differences", *lines])


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)
