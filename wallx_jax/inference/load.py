"""Load policies and VLMs from wallx_jax checkpoints, Wall-X or Qwen2.5-VL directories, and hub repositories."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wallx_jax.checkpoints.checkpointer import restore_params
from wallx_jax.checkpoints.layout import CheckpointError
from wallx_jax.checkpoints.source import ModelSource, open_source
from wallx_jax.data import images
from wallx_jax.data import processor as processors
from wallx_jax.data.fast import FastTokenizer
from wallx_jax.data.normalize import NormStats, Stats, load_norm_stats
from wallx_jax.data.processor import Processor, ProcessorConfig
from wallx_jax.data.prompt import FAST_CLOSING_TOKENS
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.inference.policy import Policy
from wallx_jax.inference.vlm import VLM
from wallx_jax.models.config import LoraConfig, WallXConfig
from wallx_jax.models.lora import merge_params
from wallx_jax.models.scan import unstack_layers
from wallx_jax.utils import hub, jax_flags, tree
from wallx_jax.utils.files import read_json_object
from wallx_jax.weights.load import load_params, read_normalizers
from wallx_jax.weights.safetensors_io import WeightsError

VIEWS = ("face_view", "left_wrist_view", "right_wrist_view")
RESOLUTION = 256
HORIZON = 32
CAMERA = (480, 640)  # assumed (height, width) of a frame until the first image arrives
FAST_TOKENS = 256  # token budget of an action chunk in FAST tokens
LISTED = 5  # maximum number of parameters named in an error


class Model(NamedTuple):
    """A model ready for inference.

    Attributes:
        config: shapes and numerics.
        params: parameters with unrolled layers (models.scan) and merged adapters.
        files: directory of the tokenizer and preprocessing files.
    """

    config: WallXConfig
    params: tree.Tree
    files: Path


@jax_flags.ours()
def load_model(
    path_or_repo: str | Path, *, revision: str | None = None, numerics: Mapping[str, Any] | None = None
) -> Model:
    """Load a model from anything that `open_source` accepts.

    Args:
        path_or_repo: path or hub repo id.
        revision: git revision on the hub.
        numerics: fields of models.config.Numerics to override.

    Raises:
        FileNotFoundError, CheckpointError, WeightsError: the model is missing, does not fit, or has parameters with NaN
            or infinity; the message names them.
    """
    return _load_source(open_source(path_or_repo, revision), numerics)


def _load_source(source: ModelSource, numerics: Mapping[str, Any] | None) -> Model:
    if not source.is_checkpoint:
        config, params = load_params(source.folder, numerics=numerics)
        return Model(config, unstack_layers(params), source.assets)
    config, params = source.read_config(numerics), restore_params(source.folder)
    _check_finite(source.folder, params)
    if config.lora.rank:
        config, params = dataclasses.replace(config, lora=LoraConfig()), merge_params(params, config.lora)
    return Model(config, unstack_layers(params, free=True), source.assets)


def _check_finite(folder: Path, params: tree.Tree) -> None:
    """Raise CheckpointError if any parameters contain NaN or infinity, naming them."""
    flat = tree.flatten(params)
    finite = jax.device_get(jax.jit(lambda leaves: jax.tree.map(lambda x: jnp.isfinite(x).all(), leaves))(flat))
    if broken := [path for path in flat if not finite[path]]:
        shown = ", ".join(broken[:LISTED]) + (f" and {len(broken) - LISTED} more" if len(broken) > LISTED else "")
        raise CheckpointError(f"{folder}: NaN or infinity in {shown}: act with an earlier step, or train again")


def load_vlm(
    path_or_repo: str | Path, *, revision: str | None = None, numerics: Mapping[str, Any] | None = None
) -> VLM:
    """Load the vision-language model of a wallx_jax checkpoint, or of a Wall-X or Qwen2.5-VL directory or hub repo.

    Args:
        path_or_repo: path or hub repo id.
        revision: git revision on the hub.
        numerics: fields of models.config.Numerics to override.

    Raises:
        FileNotFoundError, CheckpointError, WeightsError: as `load_model`.
    """
    model = load_model(path_or_repo, revision=revision, numerics=numerics)
    tokenizer = Tokenizer.from_dir(model.files)
    return VLM(_with_ids(model.config, tokenizer), model.params, tokenizer, read_limits(model.files))


def load_policy(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    numerics: Mapping[str, Any] | None = None,
    norm_stats: NormStats | str | Path | None = None,
    robot: str | None = None,
    views: Sequence[str] | None = None,
    resolution: int | None = None,
    horizon: int | None = None,
    action_tokenizer: str | Path | None = None,
) -> Policy:
    """Load a policy from a wallx_jax checkpoint or a Wall-X directory.

    A trained checkpoint stores its robot's settings; if it was trained on several datasets, `robot` must name one of
    them. A published or converted Wall-X directory does not store them: give `norm_stats` or `robot`, and where the
    defaults do not fit, `views`, `resolution`, `horizon` and `action_tokenizer`.

    Args:
        path_or_repo: path or hub repo id; a run directory stands for its newest checkpoint.
        revision: git revision on the hub.
        numerics: fields of models.config.Numerics to override.
        norm_stats: the robot's statistics, or the path of its norm_stats.json.
        robot: name of the training dataset (checkpoint trained on several), or of the statistics to use among those
            stored with the weights (Wall-X directory). A wrong name raises an error that lists the valid ones.
        views: cameras in prompt order; default: VIEWS.
        resolution: length in pixels to which the longer side of an image is resized, as in the training of these
            weights; default: 256.
        horizon: actions per chunk; default: 32.
        action_tokenizer: directory or repo id of the FAST tokenizer for WALL-OSS-FAST; None selects flow matching.

    Raises:
        FileNotFoundError, CheckpointError, WeightsError: as `load_model`.
        ValueError: an argument is missing or does not fit the model.
    """
    source = open_source(path_or_repo, revision)
    folder = source.folder
    if source.has_processor:
        known = source.robots
        if known and robot not in known:
            raise ValueError(f"robot = {robot!r}: {folder} was trained on several; name the one to control: {known}")
        given = {"norm_stats": norm_stats, "robot": None if known else robot, "views": views, "resolution": resolution,
                 "horizon": horizon, "action_tokenizer": action_tokenizer}  # fmt: skip
        if surplus := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{folder} knows its robot: leave out {', '.join(surplus)}")
        model = load_model(folder, numerics=numerics)
        processor = Processor.from_dir(model.files, robot)
        return Policy(_with_ids(model.config, processor.tokenizer), model.params, processor)

    config, tokenizer = source.read_config(numerics), Tokenizer.from_dir(source.assets)
    if not config.has_action_head:
        raise WeightsError(
            f"{folder} is a Qwen2.5-VL without an action side, it cannot act: train from it, or ask it with load_vlm"
        )
    fast = None if action_tokenizer is None else FastTokenizer.from_dir(hub.resolve(action_tokenizer))
    stats = _robot_stats(source.assets, norm_stats, robot)
    resolution = RESOLUTION if resolution is None else resolution
    horizon = HORIZON if horizon is None else horizon
    processor = _new_processor(config, tokenizer, stats, tuple(views or VIEWS), resolution, horizon, fast)
    params = load_model(folder, numerics=numerics).params
    return Policy(_with_ids(config, tokenizer), params, processor)


def _with_ids(config: WallXConfig, tokenizer: Tokenizer) -> WallXConfig:
    """Return the config with the tokenizer's token ids; config.json does not list all of them."""
    return config.replace(tokens=dataclasses.asdict(tokenizer.token_ids()))


def read_limits(files: Path) -> images.Limits:
    """Read the smallest and largest image size, in pixels, from a directory's preprocessor_config.json."""
    file = files / "preprocessor_config.json"
    found = read_json_object(file) if file.is_file() else {}
    size = found.get("size") or {}
    size = size if isinstance(size, dict) else {}
    smallest = found.get("min_pixels") or size.get("shortest_edge") or images.IMAGE_LIMITS.smallest
    largest = found.get("max_pixels") or size.get("longest_edge") or images.IMAGE_LIMITS.largest
    if not all(isinstance(pixels, int) and pixels > 0 for pixels in (smallest, largest)):
        raise ValueError(f"{file}: min_pixels {smallest!r} and max_pixels {largest!r} must be numbers of pixels")
    return images.Limits(smallest, largest)


def _new_processor(
    config: WallXConfig,
    tokenizer: Tokenizer,
    stats: NormStats,
    views: tuple[str, ...],
    resolution: int,
    horizon: int,
    fast: FastTokenizer | None,
) -> Processor:
    """Build the preprocessing of a model directory that stores none.

    Image sizes and prompt length are provisional: at inference they follow the images and the instruction.

    Raises:
        ValueError: resolution is -1, horizon is not a positive integer, or `Processor` or `images.target_size` rejects
            its arguments.
    """
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise ValueError(f"horizon = {horizon!r}: give the actions per chunk, 1 or more")
    if resolution == -1:
        raise ValueError(
            "resolution is -1: a model directory does not record the image size used in training; give the pixels "
            "of their longer side"
        )
    sizes = (images.target_size(*CAMERA, resolution),) * len(views)
    tokens = [images.image_token_count(*size) for size in sizes]
    window = 0 if fast is None else FAST_TOKENS + FAST_CLOSING_TOKENS
    length = processors.required_prompt_length(tokenizer, ["pick up the block"], views, tokens)
    length = -(-length // processors.PROMPT_STEP) * processors.PROMPT_STEP + window
    layout = ProcessorConfig(
        views=views,
        camera_keys=views,
        resolutions=(resolution,) * len(views),
        image_sizes=sizes,
        horizon=horizon,
        prompt_length=length,
        label_window=window,
        state_dim=config.action.state_dim,
        action_dim=config.action.action_dim,
        objective="flow" if fast is None else "fast",
        state_key=stats.state_key,
        action_key=stats.action_key,
        relative_to=stats.relative_to,
    )
    return Processor(layout, tokenizer, stats, fast)


def _robot_stats(folder: Path, norm_stats: NormStats | str | Path | None, robot: str | None) -> NormStats:
    if (norm_stats is None) == (robot is None):
        names = ", ".join(sorted(read_normalizers(folder))) or "none"
        raise ValueError(
            f"whose actions? {folder} is a model without its robot: give norm_stats=FILE, or robot=NAME of the "
            f"statistics among its weights (it has: {names})"
        )
    if isinstance(norm_stats, NormStats):
        return norm_stats
    if norm_stats is not None:
        return load_norm_stats(norm_stats)
    robots = read_normalizers(folder)
    if robot not in robots:
        raise ValueError(f"robot {robot!r}: {folder} contains no statistics of it; it has {sorted(robots) or 'none'}")
    parts = robots[robot]
    if missing := [kind for kind in ("propri", "action") if set(parts.get(kind, ())) != {"min", "delta"}]:
        raise WeightsError(f"{folder}: the statistics of {robot!r} lack min or delta of {missing}")
    return NormStats(_upstream_stats(parts["propri"]), _upstream_stats(parts["action"]), "observation.state", "action")


def _upstream_stats(part: Mapping[str, np.ndarray]) -> Stats:
    """Convert upstream's statistics: q01 is stored as "min" and q99 - q01 as "delta", for all channels of the model."""
    low = part["min"].astype(np.float64)
    high = low + part["delta"].astype(np.float64)
    return Stats(mean=(low + high) / 2, std=(high - low) / 2, q01=low, q99=high, min=low, max=high)
