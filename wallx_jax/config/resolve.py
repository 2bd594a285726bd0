"""Configuration of a training run: every key with its default, and the checks that turn it into a RunConfig.

`default_config()` is the only place with defaults. Files in configs/ change it, `resolve` checks the result once, and
nothing below train.py sees a ConfigDict. Names and defaults are those of the Wall-X training guide where it has them.
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
    ModelSource,
    OptimConfig,
    RobotConfig,
    RunConfig,
    dataset_name,
)
from wallx_jax.models.config import LoraConfig, Numerics
from wallx_jax.utils.errors import ConfigError, nearest

# Keys whose value is a table with names of the user's own.
TABLES = ("dof_config", "agent_pos_config", "camera_views", "resolution", "prompt.view_names", "datasets")
# What an entry of `datasets` may say besides its weight; and what it does not take over from the first dataset.
PER_DATASET = (
    "repo_id", "dataset_revision", "camera_views", "resolution", "state_key", "action_key", "norm_stats_path",
    "dof_config", "agent_pos_config", "predict_action_keys", "obs_action_keys", "relative_action_keys", "episodes",
)  # fmt: skip
FIRST_ONLY = {"dataset_root": None, "dataset_revision": None, "norm_stats_path": None, "robot_name": None,
              "episodes": None, "datasets": {}}  # fmt: skip


class OrderedConfig(ConfigDict):
    """A ConfigDict that keeps the order in which keys were written: the order of joints and cameras has a meaning."""

    def __init__(self, initial_dictionary=None, type_safe=True, convert_dict=True, **options):
        if type(initial_dictionary) is dict:  # tables in tables too
            initial_dictionary = {
                key: OrderedConfig(value) if type(value) is dict else value for key, value in initial_dictionary.items()
            }
        super().__init__(initial_dictionary, type_safe, convert_dict, **{"sort_keys": False, **options})


def default_config() -> OrderedConfig:
    """All keys and their defaults, locked. None means "not given"; what follows from that is said beside the key."""
    c = OrderedConfig()

    # Model: a local directory or a hub repo id. WALL-OSS and Qwen2.5-VL are told apart by their tensors.
    c.pretrained_wallx_path = placeholder(str)  # required
    c.pretrained_revision = placeholder(str)  # hub branch, tag or commit; None: the default branch
    c.action_expert_intermediate_size = 2048  # MLP channels of the new action expert, when starting from Qwen2.5-VL
    c.use_fast_tokenizer = False  # True: actions are FAST text tokens; False: flow matching
    c.action_tokenizer_path = placeholder(str)  # FAST tokenizer directory or repo id; required with use_fast_tokenizer
    # Numerics, see models.config.Numerics. None: as the checkpoint says, else the default there.
    c.numerics = OrderedConfig()
    c.numerics.action_attention = placeholder(str)  # "bidirectional" or "causal" among action tokens
    c.numerics.mrope_layout = placeholder(str)  # "qwen" or "upstream_cuda"
    c.numerics.flow_loss = placeholder(str)  # mean over "all" channels or over the "valid" ones
    c.numerics.masked_dims = placeholder(str)  # channels that the robot lacks "drift" or are "held" while sampling
    c.numerics.param_dtype = placeholder(str)  # "float32" or "bfloat16", parameters and moments
    c.numerics.compute_dtype = placeholder(str)  # "float32" or "bfloat16", activations
    c.numerics.float32_islands = placeholder(bool)  # norms and action heads in float32
    c.numerics.remat = placeholder(str)  # what the backward pass recomputes: "full", "dots" or "none"

    # Robot
    c.robot_name = placeholder(str)  # upstream's customized_robot_config.name; must equal repo_id when given
    # {name: what} of the action; empty: all dims of action_key under one name. What: a number of dims, in the order of
    # action_key; or where they are in the dataset, "FEATURE[START:STOP]" or "FEATURE" (all of it), which may reorder,
    # drop and join: {"arm": "action[0:6]", "gripper": "action.gripper"}. One or the other throughout a table.
    c.dof_config = OrderedConfig()
    c.agent_pos_config = OrderedConfig()  # the same of the state, with state_key
    c.predict_action_keys = ()  # names in dof_config that are predicted, the others are masked; empty: all
    c.obs_action_keys = ()  # names in agent_pos_config that the policy sees; empty: all
    # Names whose actions are trained as the difference from the state at the chunk's start (openpi's delta actions),
    # which acting adds again.
    c.relative_action_keys = ()  # in dof_config and, with as many dims, in agent_pos_config; empty: none

    # Dataset: LeRobot v3.0
    c.repo_id = placeholder(str)  # required; a hub repo id or a local directory
    c.dataset_root = placeholder(str)  # local directory of repo_id, which then only names the key mapping
    c.dataset_revision = placeholder(str)  # hub branch, tag or commit; None: the newest v3.0 tag
    c.download_videos = True  # fetch video files when downloading
    c.episodes = placeholder(str)  # episodes to use, by episode_index: "0:50,60" is 0 to 49 and 60; None: all
    c.unreadable_frames = "stop"  # a frame that cannot be decoded ends the run; "skip": another one takes its place
    c.camera_views = OrderedConfig()  # {view: camera key} in prompt order; empty: the mapping known for repo_id
    # Features with the state and the action, and their names in norm_stats.json; not used where agent_pos_config or
    # dof_config say places themselves.
    c.state_key = placeholder(str)  # None: the mapping known for repo_id, else "observation.state"
    c.action_key = placeholder(str)  # None: the mapping known for repo_id, else "action"
    views = ("face_view", "left_wrist_view", "right_wrist_view", "move1_view", "move2_view", "top_view", "wall_view")
    c.resolution = OrderedConfig(dict.fromkeys(views, 256))  # {view: pixels of the longer side}; -1 keeps the size
    # The prompt, of all datasets; the defaults are the words that Wall-X's weights were trained on. Each placeholder
    # must be there once; {{ and }} are braces.
    words = PromptTemplate()
    c.prompt = OrderedConfig()
    c.prompt.system = words.system  # what the system turn says
    c.prompt.view_names = OrderedConfig(VIEW_NAMES)  # {view: words}, added to these; others keep their own name
    c.prompt.image = words.image  # one camera: {view} is its words, {image} its picture
    c.prompt.action = words.action  # asks for actions: {images} of all cameras, {instruction}, {proprioception}
    c.prompt.language = words.language  # asks for the next subtask in words: {images}, {instruction}
    c.norm_stats_path = placeholder(str)  # norm_stats.json; None: computed from the dataset's tables
    # More datasets to mix in: {name: {"repo_id": "...", "weight": 1.0, ...}}. The weight is how many of its samples
    # there are for one of the first dataset's. An entry may also set, for itself, what PER_DATASET lists; what it does
    # not set is as for the first, except statistics, which are its own.
    c.datasets = OrderedConfig()
    c.train_test_split = 0.95  # share of the data that is trained on, in (0, 1]
    c.split_mode = "episode"  # hold out whole "episode"s, or "frame"s of trained episodes as upstream does
    c.split_seed = 42  # of the frame split
    c.action_horizon = 32  # future actions per sample, in frames; the first is the current frame's
    c.max_length = 768  # tokens of prompt and actions together; what does not fit is an error
    c.max_fast_tokens = 256  # room for FAST tokens within max_length
    c.augment = OrderedConfig()  # random changes of training images; strengths as openpi's
    c.augment.enabled = False  # True: drawn anew each time a sample is trained on
    c.augment.crop = 0.95  # share of the sides that a random window keeps, stretched to the whole; 1: no crop
    c.augment.rotate_deg = 5.0  # largest angle, either way
    c.augment.brightness = 0.3  # factor drawn from 1 - x to 1 + x; 0: as it is
    c.augment.contrast = 0.4  # likewise
    c.augment.saturation = 0.5  # likewise
    c.augment.wrist_geometry = False  # crop and rotate wrist views too: their geometry says where the hand is
    c.frame_cache = placeholder(str)  # directory to keep decoded, resized frames in; None: decode every time
    c.num_workers = 4  # data processes; 0 reads in the training process

    # Optimisation. Steps are optimizer updates.
    c.optimizer = "adamw"  # or "adafactor", whose second moments are factored: 8 GiB less per moment at the 3B size
    c.learning_rate = 9e-5  # peak
    c.min_lr = 5e-5  # learning_rate at the end of the cosine; other peaks fall to the same share of themselves
    c.num_warmup_steps = 100  # from 0 to the peak, linear
    c.batch_size_per_gpu = 8  # samples per device and micro-batch
    c.gradient_accumulation_steps = 1  # micro-batches per update
    c.num_training_steps = placeholder(int)  # end of run and cosine; None: num_epoch decides
    # An epoch of several datasets has as many samples as they have frames together.
    c.num_epoch = 100  # passes over the training frames; 0: no limit; with num_training_steps, whichever ends first
    c.weight_decay = 0.1  # on every parameter, as upstream
    c.max_grad_norm = 1.0  # global norm that gradients are clipped to
    c.flow_loss_weight = 1.0  # factor of the flow loss beside the cross-entropy
    c.mask_padded_actions = False  # leave actions past the episode's end out of the flow loss; upstream trains them
    c.action_expert_learning_rate = placeholder(float)  # peak for the action expert; None: learning_rate
    c.learning_rates = ()  # other peaks, "PATTERN=RATE": a regular expression found in a parameter's path; first match
    c.freeze_vlm = False  # train the action side only
    c.train_action_expert_only = False  # upstream's second name for the same
    c.train_action_heads = True  # with one of these two: also the action heads, which upstream freezes
    c.stochastic_rounding = True  # bfloat16 parameters and moments round up or down at random; False: to the nearest
    c.ema_decay = placeholder(float)  # checkpoints hold this moving average of what is trained, to act with; None: none
    c.lora = OrderedConfig()  # low-rank adapters, trained in place of the layers that they adapt; see models.lora
    c.lora.rank = 0  # 0: none
    c.lora.alpha = 32.0  # their output is multiplied by alpha / rank
    c.lora.targets = ("decoder/layers/",)  # regular expressions for the paths of the linear layers that get one
    c.max_nonfinite_steps = 10  # skipped updates that stop the run
    c.seed = 42  # of initialisation, sample order and noise

    # Devices
    c.platform = placeholder(str)  # "cpu", "gpu" or "tpu"; None: JAX's choice, but never the CPU beside an NVIDIA GPU
    # With layers apart compiling grows with depth (at the 3B size out of hand on a GPU), a save holds a second copy of
    # the state for a moment, and adafactor clips each layer by itself.
    c.scan_layers = True  # compile one layer and run it over the stack of all; False: each apart, for speed on a CPU
    c.compile_cache = "auto"  # directory to keep compiled programs in, "auto" (see compile_cache.enable) or "off"
    # Along each mesh axis; -1 on one of them takes the rest.
    c.mesh = OrderedConfig()
    c.mesh.data = -1  # copies of the model
    c.mesh.fsdp = 1  # parameters and optimizer state cut along a width
    c.mesh.tensor = 1  # heads and MLP width cut

    # Many processes: all three, the same in every process but for its number. None: as JAX_COORDINATOR_ADDRESS,
    # JAX_NUM_PROCESSES and JAX_PROCESS_ID, SLURM or Open MPI say, else one process.
    c.distributed = OrderedConfig()
    c.distributed.coordinator = placeholder(str)  # "HOST:PORT" of process 0
    c.distributed.num_processes = placeholder(int)  # of the whole run
    c.distributed.process_id = placeholder(int)  # from 0

    # Saving, resuming, evaluating, logging
    c.save_path = placeholder(str)  # required; output directory, --workdir overrides it
    c.save_interval = 1000  # steps between checkpoints; there is always one at the end
    c.max_to_keep = 2  # newest checkpoints kept
    c.resume = OrderedConfig()
    # A run that goes on must have the settings that have shaped it as they were, see training.resume.
    c.resume.ckpt = placeholder(str)  # to continue from; "latest": the newest of save_path, a new run if it has none
    c.resume.load_ckpt_only = False  # take its weights only: step, optimizer and data start anew
    c.eval_interval = 1000  # steps between validations; 0: never
    c.eval_frames = 256  # held-out frames per validation, of each dataset, spread evenly; all where it has fewer
    # With this limit the frames, and so the loss, depend on the batch size and the number of devices.
    c.eval_batches = placeholder(int)  # at most so many batches of these frames; None: as many as it takes
    c.eval_batch_size_per_gpu = placeholder(int)  # samples per device; None: batch_size_per_gpu
    c.log_interval = 10  # steps between log lines
    c.use_wandb = False  # also log to Weights & Biases
    c.log_project = "wallx_jax"  # its project
    c.log_name = placeholder(str)  # its run name; None: the last part of save_path
    c.profile = False  # write a profiler trace
    c.profile_save_path = placeholder(str)  # None: save_path/profile
    c.profile_wait_iters = 10  # steps before it
    c.profile_warmup_iters = 5  # and further steps before it
    c.profile_active_iters = 2  # steps in the trace
    return c.lock()


def resolve(config: ConfigDict) -> RunConfig:
    """Checks a configuration and freezes it.

    Raises:
        ConfigError: listing every setting that is wrong.
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
    """Flat values, and everything that is wrong with them."""
    values, errors = _read(given)
    return values, errors + _value_errors(values) + _relation_errors(values)


def _run_config(v: Mapping[str, Any]) -> RunConfig:
    _, state_key, action_key = KEY_MAPPINGS.get(v["repo_id"], ({}, "observation.state", "action"))
    return RunConfig(
        model=_build(
            ModelSource,
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
    """{view: camera key} in prompt order."""
    return v["camera_views"] or KEY_MAPPINGS.get(v["repo_id"], ({},))[0]


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"resume.ckpt": value, ...}; the tables of `TABLES` stay together, as ordinary dicts."""
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
    """The flat values of a configuration that a checkpoint keeps as JSON. What it does not say was not to be chosen
    when it was written, and has the default."""
    return _read({key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})[0]


def _plain(value: Any) -> Any:
    """Tables in tables as ordinary dicts, in their order."""
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, ConfigDict) else value


SLIP = 0.85  # likeness (difflib) from which on a name is taken for a misspelt one: a letter or two are wrong
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
    """Flat values and what is wrong with their names and types; a wrong value is replaced by its default, so that the
    checks that follow can go on. ConfigDict itself lets through None, bools for numbers and any table."""
    defaults, errors = default_config(), []
    known = flatten(defaults)
    for key in given.keys() - known.keys():
        hint = nearest(key, list(known)) or "; wallx_jax/config/resolve.py lists them all"
        errors.append(f"{key} = {given[key]!r}: no such setting{hint}")
    values = known | {key: value for key, value in given.items() if key in known}
    for key, default in known.items():
        if default is None and values[key] == "None":  # how the command line says it of a text
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
    """The form of an entry of `datasets`; what its settings say is checked like the first dataset's."""
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
    """Each setting on its own."""
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
    """Settings against each other."""
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

    # Without a table of its own the state is named like the action, unless that says places of its own.
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
    """The known view whose name or words in the prompt are closest: "front_view" is called "face_view"."""
    names = {text: name for name, words in VIEW_NAMES.items() for text in (words, name)}
    close = difflib.get_close_matches(view, names, 1, cutoff)
    return names[close[0]] if close else None


def _view_name_errors(*datasets: Mapping[str, Any]) -> list[str]:
    """Words for views that none of the datasets has."""
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
    """ "^vision/=1e-5" -> ("^vision/", 1e-5)."""
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
    """The entries "name.*" of flat values."""
    return {key[len(name) + 1 :]: value for key, value in values.items() if key.startswith(f"{name}.")}


def _build(kind: type, values: Mapping[str, Any], **fields: Any) -> Any:
    """Dataclass `kind` from `fields`, and the rest from the settings of the same name."""
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values} | fields)
