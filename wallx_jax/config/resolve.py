"""Define all settings of a training run with their defaults, and validate them into a RunConfig.

`default_config` is the only place that defines defaults. Files in configs/ modify them, `resolve` validates the result
once, and no code below train.py sees a ConfigDict. Names and defaults follow the Wall-X training guide where it has
them.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from wallx_jax.config.feature_slices import parse_slice
from wallx_jax.config.prompt_template import VIEW_NAMES, PromptTemplate, template_errors
from wallx_jax.config.ranges import parse_ranges
from wallx_jax.config.robots import KEY_MAPPINGS
from wallx_jax.config.schema import (
    AugmentConfig,
    Camera,
    DataConfig,
    DistributedConfig,
    LoopConfig,
    MeshConfig,
    MixedDataset,
    ModelSettings,
    OptimConfig,
    RobotConfig,
    RunConfig,
    dataset_name,
)
from wallx_jax.models.config import LoraConfig, Numerics
from wallx_jax.utils.errors import ConfigError, nearest

# Keys whose value is a table with user-defined names.
TABLES = ("dof_config", "agent_pos_config", "camera_views", "resolution", "prompt.view_names", "datasets")
# PER_DATASET: what an entry of `datasets` may set besides its weight. FIRST_ONLY: settings of the first dataset that an
# entry does not inherit, and their values there.
PER_DATASET = (
    "repo_id", "dataset_revision", "camera_views", "resolution", "state_key", "action_key", "norm_stats_path",
    "dof_config", "agent_pos_config", "predict_action_keys", "obs_action_keys", "relative_action_keys", "episodes",
)  # fmt: skip
FIRST_ONLY = {"dataset_root": None, "dataset_revision": None, "norm_stats_path": None, "robot_name": None,
              "episodes": None, "datasets": {}}  # fmt: skip


class OrderedConfig(ConfigDict):
    """A ConfigDict that preserves insertion order, because the order of joints and cameras matters."""

    def __init__(self, initial_dictionary=None, type_safe=True, convert_dict=True, **options):
        if type(initial_dictionary) is dict:  # nested tables too
            initial_dictionary = {
                key: OrderedConfig(value) if type(value) is dict else value for key, value in initial_dictionary.items()
            }
        super().__init__(initial_dictionary, type_safe, convert_dict, **{"sort_keys": False, **options})


def default_config() -> OrderedConfig:
    """Return all settings with their defaults, locked. None means "not set"; the comment says what applies then."""
    c = OrderedConfig()

    # Model. WALL-OSS and Qwen2.5-VL weights are distinguished by their tensors.
    c.pretrained_wallx_path = placeholder(str)  # required; local directory or Hub repo id
    c.pretrained_revision = placeholder(str)  # Hub branch, tag or commit; None: the default branch
    c.action_expert_intermediate_size = 2048  # MLP width of the new action expert when starting from Qwen2.5-VL
    c.use_fast_tokenizer = False  # True: autoregressive FAST action tokens; False: flow matching
    c.action_tokenizer_path = placeholder(str)  # FAST tokenizer, directory or repo id; for use_fast_tokenizer
    # Numerics, see models.config.Numerics. None: the checkpoint's value if it has one, else the default there.
    c.numerics = OrderedConfig()
    c.numerics.action_attention = placeholder(str)  # attention among action tokens: "bidirectional" or "causal"
    c.numerics.mrope_layout = placeholder(str)  # M-RoPE: "qwen" (as transformers) or "upstream_cuda"
    c.numerics.flow_loss = placeholder(str)  # mean over "all" channels (masked ones are 0) or the "valid" ones
    c.numerics.masked_dims = placeholder(str)  # sampling of channels the robot lacks: "drift", or "held" on a line to 0
    c.numerics.param_dtype = placeholder(str)  # of parameters and optimizer moments: "float32" or "bfloat16"
    c.numerics.compute_dtype = placeholder(str)  # of activations: "float32" or "bfloat16"
    c.numerics.float32_islands = placeholder(bool)  # keep norms and action heads in float32
    c.numerics.remat = placeholder(str)  # rematerialization per layer: "full", "dots" (keep matmul outputs) or "none"

    # Robot
    c.robot_name = placeholder(str)  # upstream's customized_robot_config.name; if set, must equal repo_id
    # Action groups, in order: {name: number of dims of action_key}; or {name: feature slice}, "FEATURE[START:STOP]" or
    # "FEATURE" (all dims), to reorder, drop or join dims: {"arm": "action[0:6]", "gripper": "action.gripper"}. Do not
    # mix numbers and slices in one table.
    c.dof_config = OrderedConfig()  # empty: one group with all dims of action_key
    c.agent_pos_config = OrderedConfig()  # state groups, likewise with state_key; empty: as dof_config if that fits
    c.predict_action_keys = ()  # dof_config groups to predict, the others are masked; empty: all
    c.obs_action_keys = ()  # agent_pos_config groups the policy observes, the others are masked; empty: all
    # Groups trained as the difference from the state at the start of the chunk (openpi's delta actions); inference adds
    # the state back. Each must be in dof_config and, with the same number of dims, in agent_pos_config.
    c.relative_action_keys = ()  # empty: all actions are absolute

    # Dataset: LeRobot v3.0
    c.repo_id = placeholder(str)  # required; Hub repo id or local directory
    c.dataset_root = placeholder(str)  # local directory to read instead; repo_id then only selects the key mapping
    c.dataset_revision = placeholder(str)  # Hub branch, tag or commit; None: the newest v3.0 tag
    c.download_videos = True  # also download video files
    c.episodes = placeholder(str)  # episode_index ranges to use: "0:50,60" is 0 to 49, and 60; None: all
    c.unreadable_frames = "stop"  # on a frame that cannot be decoded: "stop" the run or "skip" to another frame
    c.camera_views = OrderedConfig()  # {view: camera feature} in prompt order; empty: the known mapping for repo_id
    # State and action features, also their keys in norm_stats.json; ignored if agent_pos_config or dof_config has
    # feature slices.
    c.state_key = placeholder(str)  # None: the known mapping for repo_id, else "observation.state"
    c.action_key = placeholder(str)  # None: the known mapping for repo_id, else "action"
    views = ("face_view", "left_wrist_view", "right_wrist_view", "move1_view", "move2_view", "top_view", "wall_view")
    c.resolution = OrderedConfig(dict.fromkeys(views, 256))  # {view: longer side in pixels}; -1: as recorded
    # Prompt text of all datasets; the defaults are what the Wall-X weights were trained with. Each placeholder must
    # occur exactly once; write literal braces as {{ and }}.
    words = PromptTemplate()
    c.prompt = OrderedConfig()
    c.prompt.system = words.system  # system turn
    c.prompt.view_names = OrderedConfig(VIEW_NAMES)  # {view: text}, added to these; other views use their own name
    c.prompt.image = words.image  # per camera: {view} is its text, {image} its image tokens
    c.prompt.action = words.action  # request for actions; placeholders {images}, {instruction}, {proprioception}
    c.prompt.language = words.language  # request for the next subtask; placeholders {images}, {instruction}
    c.norm_stats_path = placeholder(str)  # norm_stats.json to use; None: computed from the dataset
    # Additional datasets: {name: {"repo_id": "...", "weight": 1.0, ...}}. `weight` is the sampling ratio relative to
    # the first dataset. An entry may also set any key in PER_DATASET; other keys are inherited from the first dataset,
    # except those in FIRST_ONLY (normalization statistics are always its own).
    c.datasets = OrderedConfig()
    c.train_test_split = 0.95  # fraction of the episodes to train on, in (0, 1]
    c.split_mode = "episode"  # hold out whole "episode"s, or random "frame"s of the trained episodes as upstream does
    c.split_seed = 42  # for split_mode "frame"
    c.action_horizon = 32  # actions per chunk, in frames, starting at the current frame
    c.max_length = 768  # max tokens of prompt plus actions; a longer sample is an error
    c.max_fast_tokens = 256  # tokens of max_length reserved for FAST actions
    c.augment = OrderedConfig()  # random augmentation of training images; strengths as in openpi
    c.augment.enabled = False  # True: augment every training sample
    c.augment.crop = 0.95  # side of the random crop as a fraction of the image, resized back to full size; 1: no crop
    c.augment.rotate_deg = 5.0  # max rotation in either direction, degrees
    c.augment.brightness = 0.3  # x: factor drawn from [1 - x, 1 + x]; 0: off
    c.augment.contrast = 0.4  # as brightness
    c.augment.saturation = 0.5  # as brightness
    c.augment.wrist_geometry = False  # also crop and rotate wrist views, whose geometry encodes the hand's pose
    c.frame_cache = placeholder(str)  # cache directory for decoded, resized frames; None: decode every time
    c.num_workers = 4  # data loading processes; 0: load in the training process

    # Optimization. Steps are optimizer updates.
    c.optimizer = "adamw"  # or "adafactor": factored second moment, no first; saves 8 GiB per moment at 3B
    c.learning_rate = 9e-5  # peak, after warmup
    c.min_lr = 5e-5  # learning rate at the end of the cosine decay; other peaks decay by the same factor
    c.num_warmup_steps = 100  # steps of linear warmup from 0 to the peak
    c.batch_size_per_gpu = 8  # samples per device and micro-batch
    c.gradient_accumulation_steps = 1  # micro-batches per update
    c.num_training_steps = placeholder(int)  # steps of the run and of the cosine decay; None: from num_epoch
    # With several datasets, an epoch has as many samples as the datasets have training frames in total.
    c.num_epoch = 100  # epochs over the training frames, if num_training_steps does not end first; 0: no limit
    c.weight_decay = 0.1  # decoupled (AdamW), on every trained parameter as upstream
    c.max_grad_norm = 1.0  # clip gradients to this global norm
    c.flow_loss_weight = 1.0  # weight of the flow loss relative to the cross-entropy
    c.mask_padded_actions = False  # exclude actions past the end of the episode from the flow loss; upstream does not
    c.action_expert_learning_rate = placeholder(float)  # peak for the action expert; None: learning_rate
    c.learning_rates = ()  # peaks by parameter path, "REGEX=RATE"; the first match applies
    c.freeze_vlm = False  # train only the action expert and the action heads
    c.train_action_expert_only = False  # upstream's alias of freeze_vlm
    c.train_action_heads = True  # False: freeze the action heads too, as upstream (needs freeze_vlm or lora.rank)
    c.stochastic_rounding = True  # of bfloat16 parameters and moments; False: round to nearest
    c.ema_decay = placeholder(float)  # keep a moving average of trained parameters for inference, e.g. 0.999; None: off
    c.lora = OrderedConfig()  # low-rank adapters, trained instead of the layers that they adapt; see models.lora
    c.lora.rank = 0  # rank of the adapters; 0: no adapters
    c.lora.alpha = 32.0  # adapter outputs are scaled by alpha / rank
    c.lora.targets = ("decoder/layers/",)  # regular expressions for the paths of the linear layers to adapt
    c.max_nonfinite_steps = 10  # stop the run after this many skipped (NaN or Inf) updates in total
    c.seed = 42  # for parameter initialization, sample order and noise

    # Devices
    c.platform = placeholder(str)  # "cpu", "gpu" or "tpu"; None: JAX's choice, but not the CPU of a GPU machine
    # Unrolled layers make compile time grow with depth (prohibitive on a GPU at the 3B size), each save briefly holds a
    # second copy of the state, and adafactor clips updates per layer.
    c.scan_layers = True  # scan over stacked layers; False: unroll them, which is faster on a CPU
    c.compile_cache = "auto"  # directory for compiled programs, "auto" (see compile_cache.enable) or "off"
    # Devices along each mesh axis; -1 on at most one axis takes the remaining devices.
    c.mesh = OrderedConfig()
    c.mesh.data = -1  # data parallelism: copies of the model
    c.mesh.fsdp = 1  # shards of parameters and optimizer state
    c.mesh.tensor = 1  # tensor parallelism: shards of attention heads and MLP width

    # Multi-process runs: set all three; they are the same in every process except process_id. None: from
    # JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, SLURM or Open MPI, else a single process.
    c.distributed = OrderedConfig()
    c.distributed.coordinator = placeholder(str)  # "HOST:PORT" of process 0
    c.distributed.num_processes = placeholder(int)  # number of processes of the run
    c.distributed.process_id = placeholder(int)  # index of this process, from 0

    # Checkpoints, resuming, validation, logging. Intervals are in steps (optimizer updates).
    c.save_path = placeholder(str)  # required; output directory, overridden by --workdir
    c.save_interval = 1000  # steps between checkpoints; the last step is always saved
    c.max_to_keep = 2  # number of newest checkpoints to keep
    c.resume = OrderedConfig()
    # A resumed run must keep the settings that determine its model, data and optimizer state, see training.resume.
    c.resume.ckpt = placeholder(str)  # checkpoint to resume; "latest": the newest in save_path, or a new run if none
    c.resume.load_ckpt_only = False  # load only the weights; step, optimizer state and data order start over
    c.eval_interval = 1000  # steps between validations; 0: never
    c.eval_frames = 256  # held-out frames per dataset and validation, evenly spaced; all if there are fewer
    # With this limit, the frames and thus the loss depend on batch size and number of devices.
    c.eval_batches = placeholder(int)  # max batches per dataset and validation; None: only eval_frames limits it
    c.eval_batch_size_per_gpu = placeholder(int)  # validation samples per device; None: batch_size_per_gpu
    c.log_interval = 10  # steps between log lines
    c.use_wandb = False  # also log to Weights & Biases
    c.log_project = "wallx_jax"  # W&B project
    c.log_name = placeholder(str)  # W&B run name; None: the last component of save_path
    c.profile = False  # record a JAX profiler trace
    c.profile_save_path = placeholder(str)  # trace directory; None: save_path/profile
    c.profile_wait_iters = 10  # steps before the warmup of the trace
    c.profile_warmup_iters = 5  # steps between the wait and the trace; not recorded either
    c.profile_active_iters = 2  # steps to record
    return c.lock()


def resolve(config: ConfigDict) -> RunConfig:
    """Validate a configuration.

    Args:
        config: a modified `default_config`.

    Returns:
        The configuration as frozen dataclasses.

    Raises:
        ConfigError: settings are invalid; the message lists all of them.
    """
    given = flatten(config)
    values, errors = _checked(given)
    others = {}
    for name, entry in values["datasets"].items():
        others[name], found = _checked(given | FIRST_ONLY | {k: v for k, v in entry.items() if k in PER_DATASET})
        errors += [f"datasets.{name}.{error}" for error in found if error not in errors]
    errors += _view_name_errors(values, *others.values())
    if errors:
        raise ConfigError(*errors)
    runs = {name: _run_config(other) for name, other in others.items()}
    mixed = tuple(
        MixedDataset(name, float(values["datasets"][name].get("weight", 1.0)), run.data, run.robot)
        for name, run in runs.items()
    )
    return dataclasses.replace(_run_config(values), mixed=mixed)


def _checked(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return flat values, with invalid ones replaced by defaults where needed, and all their errors."""
    values, errors = _read(given)
    return values, errors + _value_errors(values) + _relation_errors(values)


def _run_config(v: Mapping[str, Any]) -> RunConfig:
    _, state_key, action_key = KEY_MAPPINGS.get(v["repo_id"], ({}, "observation.state", "action"))
    return RunConfig(
        model=_build(
            ModelSettings,
            v,
            path=v["pretrained_wallx_path"],
            revision=v["pretrained_revision"],
            numerics=tuple((name, value) for name, value in _section(v, "numerics").items() if value is not None),
        ),
        robot=RobotConfig(
            dof=tuple(v["dof_config"].items()),
            agent_pos=tuple(v["agent_pos_config"].items()),
            predict_keys=v["predict_action_keys"],
            obs_keys=v["obs_action_keys"],
            relative_keys=v["relative_action_keys"],
        ),
        data=_build(
            DataConfig,
            v,
            root=v["dataset_root"],
            revision=v["dataset_revision"],
            cameras=tuple(Camera(view, key, v["resolution"][view]) for view, key in _cameras(v).items()),
            prompt=PromptTemplate(**_section(v, "prompt")),
            state_key=v["state_key"] or state_key,
            action_key=v["action_key"] or action_key,
            augment=_build(AugmentConfig, _section(v, "augment")) if v["augment.enabled"] else None,
            batch_size=v["batch_size_per_gpu"],
            eval_batch_size=v["eval_batch_size_per_gpu"] or v["batch_size_per_gpu"],
        ),
        optim=_build(
            OptimConfig,
            v,
            warmup_steps=v["num_warmup_steps"],
            learning_rates=tuple(map(_pattern_and_rate, v["learning_rates"])),
            lora=LoraConfig(**_section(v, "lora")),
        ),
        loop=_build(
            LoopConfig,
            v,
            resume_ckpt=v["resume.ckpt"],
            load_ckpt_only=v["resume.load_ckpt_only"],
            log_name=v["log_name"] or v["save_path"].rstrip("/").rsplit("/", 1)[-1],
            profile_save_path=v["profile_save_path"] or f"{v['save_path']}/profile",
        ),
        mesh=MeshConfig(**_section(v, "mesh")),
        platform=v["platform"],
        compile_cache=v["compile_cache"],
        distributed=DistributedConfig(**_section(v, "distributed")),
    )


def _cameras(v: Mapping[str, Any]) -> Mapping[str, str]:
    """Return {view: camera key} in prompt order."""
    return v["camera_views"] or KEY_MAPPINGS.get(v["repo_id"], ({},))[0]


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Flatten a configuration to {"resume.ckpt": value, ...}; the tables in TABLES stay whole, as plain dicts."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if not isinstance(value, ConfigDict):
            flat[name] = value
        elif name in TABLES:
            flat[name] = _plain(value)
        else:
            flat |= flatten(value, f"{name}.")
    return flat


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat values of a configuration stored as JSON in a checkpoint.

    Settings that did not exist when the checkpoint was written have their defaults.
    """
    return _read({key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})[0]


def _plain(value: Any) -> Any:
    """Convert nested tables to plain dicts, preserving their order."""
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, ConfigDict) else value


SLIP = 0.85  # difflib similarity above which a name counts as misspelled: one or two wrong letters
OPTIMIZERS = ("adamw", "adafactor")
PLATFORMS = ("cpu", "gpu", "tpu")
REQUIRED = ("pretrained_wallx_path", "repo_id", "save_path")
POSITIVE = (
    "action_expert_intermediate_size", "action_horizon", "max_length", "max_fast_tokens", "learning_rate",
    "action_expert_learning_rate", "batch_size_per_gpu", "eval_batch_size_per_gpu", "gradient_accumulation_steps",
    "num_training_steps", "max_grad_norm", "max_nonfinite_steps", "save_interval", "max_to_keep",
    "eval_frames", "eval_batches", "log_interval", "profile_active_iters", "lora.alpha",
)  # fmt: skip
NOT_NEGATIVE = (
    "min_lr", "num_warmup_steps", "num_workers", "weight_decay", "flow_loss_weight", "seed", "split_seed",
    "eval_interval", "num_epoch", "profile_wait_iters", "profile_warmup_iters", "lora.rank",
)  # fmt: skip


def _read(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Check names and types of flat values; ConfigDict itself accepts None, bools for numbers and any table.

    Returns:
        All settings, with values of the wrong type replaced by defaults so that later checks can proceed; and errors.
    """
    defaults, errors = default_config(), []
    known = flatten(defaults)
    for key in given.keys() - known.keys():
        hint = nearest(key, list(known)) or "; wallx_jax/config/resolve.py lists them all"
        errors.append(f"{key} = {given[key]!r}: no such setting{hint}")
    values = known | {key: value for key, value in given.items() if key in known}
    for key, default in known.items():
        if default is None and values[key] == "None":  # a None string setting on the command line
            values[key] = None
        value, kind = values[key], _type(defaults, key)
        if value is None and default is None:
            continue
        if value == "" and default is None and key not in REQUIRED:
            errors.append(f"{key} = '': is empty; leave it out, or give None, where no value is meant")
            values[key] = default
            continue
        number_is_bool = isinstance(value, bool) and kind is not bool
        if number_is_bool or not isinstance(value, (int, float) if kind is float else kind):
            errors.append(f"{key} = {value!r}: expected {kind.__name__}, got {type(value).__name__}")
            values[key] = default
        elif isinstance(value, float) and not math.isfinite(value):
            errors.append(f"{key} = {value!r}: expected a finite number")
            values[key] = default
    wrong_entries = {name: _entry_errors(name, entry) for name, entry in values["datasets"].items()}
    errors += [error for found in wrong_entries.values() for error in found]
    values["datasets"] = {name: entry for name, entry in values["datasets"].items() if not wrong_entries[name]}
    for key in TABLES:
        for name, value in values[key].items():
            if key == "datasets":
                continue
            elif key == "camera_views":
                ok, expected = isinstance(value, str), "a camera key of the dataset"
            elif key == "prompt.view_names":
                ok, expected = isinstance(value, str) and value.strip() != "", "the words for this view"
            elif key == "resolution":
                ok, expected = _is_int(value) and (value == -1 or value >= 28), "pixels, at least 28, or -1"
            else:
                ok = _is_place(value) if isinstance(value, str) else _is_int(value) and value >= 1
                expected = "a number of dims, at least 1, or a place in the dataset, 'FEATURE[START:STOP]' or 'FEATURE'"
            if not ok:
                errors.append(f"{key}.{name} = {value!r}: expected {expected}")
    for key in ("dof_config", "agent_pos_config"):
        places = [name for name, value in values[key].items() if isinstance(value, str)]
        if counts := [name for name in values[key] if places and name not in places]:
            errors.append(f"{key}: {places} say places in the dataset, {counts} numbers of dims; use one for all names")
    for key in (
        "obs_action_keys", "predict_action_keys", "relative_action_keys", "lora.targets", "learning_rates",
    ):  # fmt: skip
        if wrong := [item for item in values[key] if not isinstance(item, str)]:
            errors.append(f"{key} = {values[key]}: {wrong} are not strings; write them in quotes")
        elif len(set(values[key])) != len(values[key]):
            twice = sorted({item for item in values[key] if values[key].count(item) > 1})
            errors.append(f"{key} = {values[key]}: {twice} are given twice; name each once")
    return values, sorted(errors)


def _entry_errors(name: str, entry: Any) -> list[str]:
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


def _value_errors(v: Mapping[str, Any]) -> list[str]:
    """Check each setting individually."""
    errors = [f"{key}: required; set it in the file or with --config.{key}=..." for key in REQUIRED if not v[key]]
    errors += [f"{key} = {v[key]!r}: must be above 0" for key in POSITIVE if v[key] is not None and v[key] <= 0]
    errors += [f"{key} = {v[key]!r}: must not be negative" for key in NOT_NEGATIVE if v[key] < 0]
    unused = {"action_tokenizer_path": not v["use_fast_tokenizer"], "profile_save_path": not v["profile"]}
    errors += [
        f"{key} = {value!r}: replace the placeholder by a real path"
        for key, value in v.items()
        if isinstance(value, str) and value.startswith("/path/to/") and not unused.get(key)
    ]
    if not 0 < v["train_test_split"] <= 1:
        errors.append(f"train_test_split = {v['train_test_split']}: must be above 0 and at most 1")
    for name, most in (("rotate_deg", 180), ("brightness", 1), ("contrast", 1), ("saturation", 1)):
        if not 0 <= v[f"augment.{name}"] <= most:
            errors.append(f"augment.{name} = {v[f'augment.{name}']}: must be from 0 to {most}")
    if not 0 < v["augment.crop"] <= 1:
        errors.append(f"augment.crop = {v['augment.crop']}: must be above 0 and at most 1")
    if v["seed"] >= 2**32:
        errors.append(f"seed = {v['seed']}: must be below 2**32, which the order of the samples is drawn from")
    if v["split_mode"] not in ("episode", "frame"):
        errors.append(f"split_mode = {v['split_mode']!r}: choose 'episode' or 'frame'")
    if v["unreadable_frames"] not in ("stop", "skip"):
        errors.append(f"unreadable_frames = {v['unreadable_frames']!r}: choose 'stop' or 'skip'")
    if v["episodes"] is not None:
        try:
            parse_ranges(v["episodes"])
        except ValueError as error:
            errors.append(f"episodes = {v['episodes']!r}: {error}")
    words = {view: words for view, words in v["prompt.view_names"].items() if isinstance(words, str)}
    errors += template_errors(**_section(v, "prompt") | {"view_names": words})
    for name, value in _section(v, "numerics").items():
        try:
            if value is not None:
                Numerics(**{name: value})
        except ValueError as error:
            errors.append(str(error))
    if v["optimizer"] not in OPTIMIZERS:
        errors.append(f"optimizer = {v['optimizer']!r}: choose one of {list(OPTIMIZERS)}")
    if v["ema_decay"] is not None and not 0 < v["ema_decay"] < 1:
        errors.append(f"ema_decay = {v['ema_decay']}: must be between 0 and 1, e.g. 0.999")
    for entry in v["learning_rates"]:
        try:
            pattern, rate = _pattern_and_rate(str(entry))
            re.compile(pattern)
            ok = 0 < rate < math.inf
        except (ValueError, re.error):
            ok = False
        if not ok:
            errors.append(f"learning_rates: {entry!r} is not PATTERN=RATE, e.g. '^vision/=1e-5'")
    for target in v["lora.targets"]:
        try:
            re.compile(target if isinstance(target, str) else "")
        except re.error as error:
            errors.append(f"lora.targets: {target!r} is not a regular expression: {error}")
    if v["platform"] not in (None, *PLATFORMS):
        hint = nearest(v["platform"], PLATFORMS)
        errors.append(f"platform = {v['platform']!r}: choose one of {list(PLATFORMS)}{hint}")
    if not v["compile_cache"]:
        errors.append("compile_cache = '': give a directory, 'auto' or 'off'")
    axes = _section(v, "mesh")
    if list(axes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in axes.values()):
        errors.append(f"mesh = {axes}: give each axis a size of at least 1, or -1 (the rest) on one of them")
    errors += _distributed_errors(_section(v, "distributed"))
    return errors


def _distributed_errors(processes: Mapping[str, Any]) -> list[str]:
    missing = [f"distributed.{name}" for name, value in processes.items() if value is None]
    if len(missing) == len(processes):
        return []
    if missing:
        return [f"{' and '.join(missing)}: required as well, when one setting of distributed is given"]
    address, count, index = processes.values()
    errors = []
    if not re.fullmatch(r".+:\d+", address):
        errors.append(f"distributed.coordinator = {address!r}: expected HOST:PORT of process 0")
    if not 0 <= index < count:
        errors.append(
            f"distributed.process_id = {index} of distributed.num_processes = {count}: must be 0 or more, and below it"
        )
    return errors


def _relation_errors(v: Mapping[str, Any]) -> list[str]:
    """Check settings against each other."""
    errors = []
    if v["min_lr"] > v["learning_rate"]:
        errors.append(f"min_lr = {v['min_lr']:g} exceeds learning_rate = {v['learning_rate']:g}: lower min_lr")
    if v["num_training_steps"] is None and v["num_epoch"] == 0:
        errors.append("num_epoch = 0 needs num_training_steps, set it: without one of them the run has no end")
    if v["use_fast_tokenizer"] and not v["action_tokenizer_path"]:
        errors.append("action_tokenizer_path: required by use_fast_tokenizer = True, e.g. 'physical-intelligence/fast'")
    if v["use_fast_tokenizer"] and v["mask_padded_actions"]:
        errors.append(
            "mask_padded_actions = True has no meaning with use_fast_tokenizer, a FAST chunk is whole: switch one off"
        )
    frozen = [key for key in ("freeze_vlm", "train_action_expert_only") if v[key]]
    if frozen and v["use_fast_tokenizer"]:
        errors.append(
            f"{frozen[0]} = True leaves nothing to train with use_fast_tokenizer, FAST actions are text: switch one off"
        )
    if not v["train_action_heads"] and not frozen and not v["lora.rank"]:
        errors.append(
            "train_action_heads = False has a meaning only with freeze_vlm, train_action_expert_only or lora.rank: set "
            "one of them, or leave it True"
        )
    if v["resume.load_ckpt_only"] and not v["resume.ckpt"]:
        errors.append("resume.load_ckpt_only = True needs resume.ckpt: name the checkpoint there")
    if v["robot_name"] is not None and v["robot_name"] != v["repo_id"]:
        errors.append(
            f"robot_name = {v['robot_name']!r} is not repo_id = {v['repo_id']!r}: they must be the same, or robot_name "
            "unset"
        )
    if v["repo_id"] and dataset_name(v["repo_id"]) in v["datasets"]:
        errors.append(f"datasets.{dataset_name(v['repo_id'])}: the first dataset has this name; choose another")
    actions = "max_fast_tokens" if v["use_fast_tokenizer"] else "action_horizon"
    if v[actions] >= v["max_length"]:
        errors.append(
            f"{actions} = {v[actions]} leaves no room for a prompt in max_length = {v['max_length']}: raise "
            f"max_length, or lower {actions}"
        )

    # Without its own table, the state has the names of the action, unless those are feature slices.
    places = any(isinstance(value, str) for value in v["dof_config"].values())
    names_in = {"dof_config": list(v["dof_config"])}
    names_in["agent_pos_config"] = list(v["agent_pos_config"] or ({} if places else v["dof_config"]))
    for keys, tables in (
        ("predict_action_keys", ["dof_config"]),
        ("obs_action_keys", ["agent_pos_config"]),
        ("relative_action_keys", ["dof_config", "agent_pos_config"]),
    ):
        for key in (key for key in dict.fromkeys(v[keys]) if isinstance(key, str)):
            if table := next((table for table in tables if key not in names_in[table]), None):
                names = names_in[table]
                errors.append(f"{keys}: {key!r} is not in {table}{nearest(key, names)}; it has {names}")

    cameras = _cameras(v)
    known = list(dict.fromkeys([*default_config().resolution, *cameras]))
    for view, pixels in v["resolution"].items():
        if view not in known:
            hint = nearest(view, known)
            errors.append(f"resolution.{view} = {pixels!r}: no camera has this view{hint}; known are {known}")
    for view in cameras:
        if view not in VIEW_NAMES and view not in v["prompt.view_names"] and (meant := _nearest_view(view, SLIP)):
            errors.append(
                f'camera_views.{view}: did you mean "{meant}"? A view of your own needs its words in the prompt, '
                f"prompt.view_names.{view}, and its pixels, resolution.{view}"
            )
        elif view not in v["resolution"]:
            hint = f' (did you mean "{meant}"?)' if (meant := _nearest_view(view, 0.5)) else ""
            errors.append(f"resolution.{view}: missing; camera_views has this view{hint}, set its pixels, e.g. 256")
    if len(set(v["camera_views"].values())) < len(v["camera_views"]):
        errors.append(f"camera_views = {v['camera_views']}: one camera has two views; give each its own")
    return errors


def _nearest_view(view: str, cutoff: float) -> str | None:
    """Return the known view whose name or prompt text is closest: "face_view" for "front_view"."""
    names = {text: name for name, words in VIEW_NAMES.items() for text in (words, name)}
    close = difflib.get_close_matches(view, names, 1, cutoff)
    return names[close[0]] if close else None


def _view_name_errors(*datasets: Mapping[str, Any]) -> list[str]:
    """Report prompt texts for views that no dataset has."""
    known = list(dict.fromkeys([*VIEW_NAMES, *(view for v in datasets for view in _cameras(v))]))
    return [
        f"prompt.view_names.{view} = {words!r}: no camera has this view{nearest(view, known)}; known are {known}"
        for view, words in datasets[0]["prompt.view_names"].items()
        if view not in known
    ]


def _type(defaults: ConfigDict, key: str) -> type:
    if key in TABLES:
        return dict
    *parents, last = key.split(".")
    for parent in parents:
        defaults = defaults[parent]
    return defaults.get_type(last)


def _pattern_and_rate(entry: str) -> tuple[str, float]:
    """Parse "^vision/=1e-5" into ("^vision/", 1e-5)."""
    pattern, _, rate = entry.rpartition("=")
    return pattern, float(rate)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_place(text: str) -> bool:
    try:
        return bool(parse_slice(text))
    except ValueError:
        return False


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the entries "name.*" of flat values, without the prefix."""
    return {key[len(name) + 1 :]: value for key, value in values.items() if key.startswith(f"{name}.")}


def _build(kind: type, values: Mapping[str, Any], **fields: Any) -> Any:
    """Build dataclass `kind` from `fields` and, for all other fields, from the settings of the same name."""
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values} | fields)
