"""Builds processors, splits and streams of samples for the datasets of a checked run configuration."""

import dataclasses
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from wallx_jax.config.schema import RunConfig
from wallx_jax.data import images
from wallx_jax.data.augment import Augment
from wallx_jax.data.batch import Batch, EvalBatch
from wallx_jax.data.datasets import DatasetSpec
from wallx_jax.data.errors import DatasetError
from wallx_jax.data.fast import FastTokenizer
from wallx_jax.data.frame_cache import CachedSource
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.normalize import NormStats, load_norm_stats
from wallx_jax.data.pipeline import eval_batches, mix_datasets, require_frames, split_frames, training_dataset
from wallx_jax.data.processor import Processor, ProcessorConfig, required_prompt_length
from wallx_jax.data.prompt import FAST_CLOSING_TOKENS
from wallx_jax.data.source import FrameSource
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
    if run.model.action_tokenizer_path is None:
        raise ValueError("action_tokenizer_path: required by use_fast_tokenizer = True")
    return FastTokenizer.from_dir(hub.resolve(run.model.action_tokenizer_path, kind="model"))


@dataclass(frozen=True)
class DatasetRun(DatasetSpec):
    """One dataset of a run with its preprocessing and its split.

    Attributes:
        processor: encodes its frames.
        train: frames of the training split; never empty.
        held_out: frames of the validation split; may be empty.
        number: index of the dataset, stored in each of its samples; None if it is the only one.
    """

    processor: Processor
    train: FrameSource
    held_out: FrameSource
    number: int | None = None


def split_datasets(specs: Sequence[DatasetSpec], processors: Sequence[Processor]) -> tuple[DatasetRun, ...]:
    """Combine each dataset with its processor, and split it into training and held-out frames as configured.

    Raises:
        ValueError: there are no training frames.
    """
    datasets = []
    for number, (spec, processor) in enumerate(zip(specs, processors, strict=True)):
        data = spec.settings.data
        train, held_out = (
            _select(spec.settings, spec.source, frames)
            for frames in split_frames(spec.info, data.train_test_split, data.split_mode, data.split_seed)
        )
        require_frames(train)
        index = number if len(specs) > 1 else None
        datasets.append(DatasetRun(**vars(spec), processor=processor, train=train, held_out=held_out, number=index))
    return tuple(datasets)


def _select(run: RunConfig, source: LeRobotSource | CachedSource, frames: Sequence[int] | np.ndarray) -> FrameSource:
    selected = source.select(frames)
    return SkipUnreadable(selected) if run.data.unreadable_frames == "skip" else selected


def cache_frames(dataset: DatasetRun) -> DatasetRun:
    """Fill the dataset's frame cache and return the dataset reading from it; do nothing if none is configured."""
    data = dataset.settings.data
    if data.frame_cache is None:
        return dataset
    cached = CachedSource(dataset.source, dataset.processor.config, data.frame_cache)
    cached.fill(skip_unreadable=data.unreadable_frames == "skip")
    train, held_out = (_select(dataset.settings, cached, split.frames) for split in (dataset.train, dataset.held_out))
    return dataclasses.replace(dataset, train=train, held_out=held_out)


def training_stream(datasets: Sequence[DatasetRun], seed: int) -> grain.MapDataset:
    """Build the endless stream of training samples of a run, mixed by the datasets' weights."""
    streams = [
        training_dataset(dataset.train, dataset.processor, seed, build_augment(dataset.settings), dataset.number)
        for dataset in datasets
    ]
    return mix_datasets(streams, [dataset.weight for dataset in datasets])


def validation_batches(
    datasets: Sequence[DatasetRun], batch_size: int, limit: int, shard_index: int, shard_count: int
) -> Iterator[EvalBatch]:
    """Yield the validation batches of a run, dataset by dataset; see `eval_batches`.

    Args:
        datasets: the datasets.
        batch_size: samples per batch, over all processes.
        limit: maximum number of frames of each dataset.
        shard_index: shard that this process loads of every batch.
        shard_count: number of shards.
    """
    for dataset in datasets:
        yield from eval_batches(
            dataset.held_out, dataset.processor, batch_size, limit, shard_index, shard_count, dataset.number
        )


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
                f"norm_stats_path = {data.norm_stats_path}: {name} statistics have {len(found)} dims, {key!r} of "
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
        command += " --config=..., as here, --output norm_stats.json"
    else:
        relative, keys = "", ["--state_key", stats.state_key, "--action_key", stats.action_key]
        command = f"{command} {shlex.join(['--dataset', run.data.location, *keys, '--output', 'norm_stats.json'])}"
    return (
        f"statistics of {info.repo_id}: state ({len(stats.state)} dims of {stats.state_key}) and action "
        f"({len(stats.action)} dims of {stats.action_key}{relative}) computed from {info.num_frames:,} frames in "
        f"{seconds:.1f} s; to look at them or keep them for norm_stats_path: {command}"
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
        stats: normalisation statistics.
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
            raise DatasetError(f"{file}: task_index {number}: {error}; repair it and start again") from None
    longest = max(lengths, key=lengths.__getitem__)
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
