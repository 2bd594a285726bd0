"""Build the processor and the training and held-out splits of a checked run configuration."""

import logging
import shlex
import time
from pathlib import Path

import numpy as np

from wallx_jax.config.schema import RunConfig
from wallx_jax.data import images
from wallx_jax.data.augment import Augment
from wallx_jax.data.batch import Batch
from wallx_jax.data.errors import DatasetError
from wallx_jax.data.fast import FastTokenizer
from wallx_jax.data.frame_cache import CachedSource
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.normalize import NormStats, load_norm_stats
from wallx_jax.data.pipeline import split_frames
from wallx_jax.data.processor import Processor, ProcessorConfig, required_prompt_length
from wallx_jax.data.prompt import FAST_CLOSING_TOKENS
from wallx_jax.data.stats import compute_stats
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.data.unreadable import SkipUnreadable
from wallx_jax.data.validate import check_horizon
from wallx_jax.utils import hub

logger = logging.getLogger(__name__)


def load_fast_tokenizer(run: RunConfig) -> FastTokenizer | None:
    """Load the FAST tokenizer of a run from a local directory or hub repo id; return None in flow mode."""
    if not run.model.use_fast_tokenizer:
        return None
    return FastTokenizer.from_dir(hub.resolve(run.model.action_tokenizer_path, kind="model"))


Source = LeRobotSource | CachedSource | SkipUnreadable


def split_sources(run: RunConfig, source: LeRobotSource, config: ProcessorConfig) -> tuple[Source, Source]:
    """Split a dataset into training and held-out frames as configured by `run`.

    If a frame cache is configured, it is filled here.

    Returns:
        (training frames, held-out frames); the second may be empty.
    """
    data, skip = run.data, run.data.unreadable_frames == "skip"
    frames = split_frames(source.info, data.train_test_split, data.split_mode, data.split_seed)
    splits: list[Source] = [source.select(chosen) for chosen in frames]
    if data.frame_cache is not None:
        cached = CachedSource(source, config, data.frame_cache)
        cached.fill(skip_unreadable=skip)
        splits = [cached.select(chosen) for chosen in frames]
    return tuple(SkipUnreadable(split) if skip else split for split in splits)


def build_augment(run: RunConfig) -> Augment | None:
    """Return the augmentation of the training images, or None if it is disabled."""
    data = run.data
    return None if data.augment is None else Augment(data.augment, tuple(camera.view for camera in data.cameras))


def load_stats(run: RunConfig, source: LeRobotSource) -> NormStats:
    """Load statistics from norm_stats_path, or compute them from the dataset's tables if it is not set.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is malformed, or does not fit the dataset or the relative actions of the run.
    """
    data, info, relative_to = run.data, source.info, run.robot.relative_to()
    if data.norm_stats_path is None:
        start = time.perf_counter()
        stats = dataset_stats(run, source)
        logger.info("%s", _report(run, info, stats, time.perf_counter() - start))
        return stats
    stats = load_norm_stats(Path(data.norm_stats_path), data.state_key, data.action_key)
    for name, key, found in (("state", data.state_key, stats.state), ("action", data.action_key, stats.action)):
        if len(found) != info.dims(key):
            raise ValueError(
                f"norm_stats_path = {data.norm_stats_path}: {name} statistics have {len(found)} dims, but {key!r} of "
                f"{info.repo_id} has {info.dims(key)}; recompute them for this dataset, or unset norm_stats_path"
            )
    try:
        stats.check_relative(relative_to, data.action_horizon)
    except ValueError as error:
        raise ValueError(
            f"norm_stats_path = {data.norm_stats_path}: {error} (relative_action_keys, action_horizon); recompute them "
            "with scripts/compute_norm_stats.py --config, or unset norm_stats_path"
        ) from None
    return stats


def dataset_stats(run: RunConfig, source: LeRobotSource, progress: bool = False) -> NormStats:
    """Compute statistics of a dataset's state and of the actions as `run` trains on them.

    Args:
        run: the configuration.
        source: all frames of the dataset.
        progress: whether to show progress bars.
    """
    return compute_stats(
        source, relative_to=run.robot.relative_to(), horizon=run.data.action_horizon, progress=progress
    )


def _report(run: RunConfig, info: DatasetInfo, stats: NormStats, seconds: float) -> str:
    """Describe the computed statistics, with the command that writes them to a file."""
    command = "python scripts/compute_norm_stats.py"
    if stats.relative_to:
        relative = f", {', '.join(run.robot.relative_keys)} relative to the state over {stats.horizon} steps"
        command += " --config=... --output norm_stats.json  # with the configuration of this run"
    else:
        relative, keys = "", ["--state_key", stats.state_key, "--action_key", stats.action_key]
        command = f"{command} {shlex.join(['--dataset', run.data.location, *keys, '--output', 'norm_stats.json'])}"
    return (
        f"statistics of {info.repo_id}: state ({len(stats.state)} dims of {stats.state_key}) and action "
        f"({len(stats.action)} dims of {stats.action_key}{relative}) computed from {info.num_frames:,} frames in "
        f"{seconds:.1f} s; to inspect them or save them for norm_stats_path: {command}"
    )


def build_processor(
    run: RunConfig,
    source: LeRobotSource,
    tokenizer: Tokenizer,
    fast: FastTokenizer | None,
    stats: NormStats,
    state_dim: int,
    action_dim: int,
) -> Processor:
    """Build the preprocessing of a run.

    The prompt length is that of the longest instruction among the dataset's frames.

    Args:
        run: the configuration.
        source: all frames of the dataset.
        tokenizer: the text tokenizer.
        fast: the FAST tokenizer, or None in flow mode.
        stats: normalization statistics.
        state_dim: state channels of the model.
        action_dim: action channels of the model.

    Raises:
        ConfigError: prompt and actions do not fit into max_length.
        DatasetError: an instruction is empty or contains control tokens.
    """
    info, cameras = source.info, run.data.cameras
    views = tuple(camera.view for camera in cameras)
    sizes = tuple(images.target_size(*info.frame_size(camera.key), camera.resolution) for camera in cameras)
    image_tokens = [images.image_token_count(*size) for size in sizes]
    budget = run.data.max_fast_tokens if fast is not None else 0
    template = run.data.prompt
    lengths = {}
    for number, text in source.instructions.items():
        try:
            lengths[text] = required_prompt_length(tokenizer, [text], views, image_tokens, template=template)
        except ValueError as error:
            file = info.root / "meta" / "tasks.parquet"
            raise DatasetError(f"{file}: task_index {number}: {error}; correct it and start again") from None
    longest = max(lengths, key=lengths.get)
    check_horizon(run, lengths[longest])
    config = ProcessorConfig(
        views=views,
        camera_keys=tuple(camera.key for camera in cameras),
        resolutions=tuple(camera.resolution for camera in cameras),
        image_sizes=sizes,
        horizon=run.data.action_horizon,
        prompt_length=required_prompt_length(tokenizer, [longest], views, image_tokens, budget, template),
        label_window=budget + FAST_CLOSING_TOKENS if budget else 0,
        state_dim=state_dim,
        action_dim=action_dim,
        objective="flow" if fast is None else "fast",
        state_key=run.data.state_key,
        action_key=run.data.action_key,
        observed=run.robot.observed(),
        predicted=run.robot.predicted(),
        prompt=template,
        relative_to=run.robot.relative_to(),
        state_names=tuple(info.dim_names(run.data.state_key)),
        action_names=tuple(info.dim_names(run.data.action_key)),
    )
    return Processor(config, tokenizer, stats, fast)


def blank_sample(config: ProcessorConfig, mixed: bool = False) -> Batch:
    """Return an all-zero sample (no batch axis), so that the step can be compiled before any data is read.

    Args:
        config: shapes of the sample.
        mixed: whether the run has several datasets.
    """
    actions = np.zeros((config.horizon, config.action_dim), np.float32)
    state = np.zeros(config.state_dim, np.float32)
    return Batch(
        images=tuple(np.zeros((*size, 3), np.uint8) for size in config.image_sizes),
        tokens=np.zeros(config.prompt_length, np.int32),
        token_mask=np.zeros(config.prompt_length, bool),
        labels=np.zeros(config.label_window, np.int32),
        state=state,
        state_mask=state,
        actions=actions,
        action_mask=actions,
        action_is_pad=np.zeros(config.horizon, bool),
        dataset=np.int32(0) if mixed else None,
    )
