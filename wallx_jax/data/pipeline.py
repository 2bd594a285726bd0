"""Turns a dataset into batches: train/validation split, sample order, and Grain loaders with a resumable position.

Batches are formed before the work is distributed to worker processes, so the order and content of a run depend only on
the seed, not on the number of workers.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import grain
import numpy as np
from absl import flags

from wallx_jax.data.augment import Augment
from wallx_jax.data.batch import Batch, EvalBatch, stack_samples
from wallx_jax.data.lerobot import RawSample
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.processor import Processor
from wallx_jax.data.source import FrameSource
from wallx_jax.data.torch_random import randperm
from wallx_jax.data.workers import BUFFERED, start_worker, starting

UPSTREAM_FRACTIONS = (0.95, 0.05)


def split_frames(
    info: DatasetInfo, ratio: float, mode: str = "episode", seed: int = 42
) -> tuple[np.ndarray, np.ndarray]:
    """Split a dataset into training and validation frames.

    Args:
        info: the dataset.
        ratio: fraction of the episodes used for training, in (0, 1].
        mode: "episode" trains on the first `ratio` of the episodes and holds out the others entirely; with more than
            one episode and ratio < 1 each side gets at least one. "frame" is upstream's split: the last episodes are
            set aside as above and not used at all; of the remaining frames 95% train and 5% validate, chosen by torch's
            random_split. Neighbours of every validation frame are then in the training set.
        seed: seed of the "frame" split.

    Returns:
        Frame indices for training and for validation, int64 [n] each.

    Raises:
        ValueError: for a ratio outside (0, 1] or an unknown mode.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"train_test_split is {ratio}; it must be above 0 and at most 1")
    train_episodes = int(info.num_episodes * ratio)
    if mode == "episode":
        if ratio < 1:
            train_episodes = min(max(train_episodes, 1), max(info.num_episodes - 1, 1))
        cut = int(info.episode_lengths[:train_episodes].sum())
        return np.arange(cut), np.arange(cut, info.num_frames)
    if mode == "frame":
        count = int(info.episode_lengths[:train_episodes].sum())
        order = randperm(count, seed)
        # random_split floors both sizes and distributes the remainder one by one, starting with the first.
        sizes = [int(count * fraction) for fraction in UPSTREAM_FRACTIONS]
        cut = sizes[0] + (count - sum(sizes) + 1) // 2
        return order[:cut], order[cut:]
    raise ValueError(f"split mode is {mode!r}; choose 'episode' or 'frame'")


class DataLoader(Iterator[Batch]):
    """Batches of an endless sample stream, with a position that can be saved and restored.

    The position is the number of batches drawn, and the order of the stream is fixed: a run resumes at its position
    with any number of workers, and with any number of processes that together draw the same number of samples.
    """

    def __init__(
        self,
        stream: grain.MapDataset,
        batch_size: int,
        num_workers: int = 0,
        shard_index: int = 0,
        shard_count: int = 1,
    ):
        """Initialize the loader; workers start with the first batch.

        Args:
            stream: endless stream of samples, from `training_dataset` or `mix_datasets`.
            batch_size: samples per batch of this process.
            num_workers: number of worker processes; 0 prefetches in two threads.
            shard_index: shard that this process loads of every batch.
            shard_count: number of shards.
        """
        shard = stream[shard_index::shard_count]
        self._batches = shard.batch(batch_size, drop_remainder=True, batch_fn=stack_samples)
        self._num_workers = num_workers
        self._drawn = 0
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        if self._reader is None:
            self._reader = self._read_from(self._drawn)
            with starting(self._num_workers) if self._num_workers else contextlib.nullcontext():
                batch = next(self._reader)
        else:
            batch = next(self._reader)
        self._drawn += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the position, in a form that `set_state` accepts."""
        return {"batches_drawn": self._drawn}

    def set_state(self, state: dict[str, int]) -> None:
        """Restore a position returned by `get_state`; the next batch is read from there.

        Raises:
            KeyError: if `state` does not come from `get_state`.
        """
        self.close()
        self._drawn = state["batches_drawn"]

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read_from(self, position: int) -> grain.DatasetIterator:
        # An element here is a batch, so prefetching two is enough. Decoding and resizing release the GIL.
        threads = 1 if self._num_workers else 2
        dataset = self._batches[position:].to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=2))
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # Grain passes its absl flags to the workers, even without app.run.
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=BUFFERED)
            dataset = dataset.mp_prefetch(options, worker_init_fn=start_worker)
        return iter(dataset)


def require_frames(source: FrameSource) -> None:
    """Raise a ValueError if a training split is empty."""
    if not len(source):
        raise ValueError(f"{source.info.repo_id}: the training split has no frames; raise train_test_split")


def shuffled(source: FrameSource, seed: int) -> grain.MapDataset:
    """Repeat the frames endlessly in training order, reshuffled for each epoch."""
    return grain.MapDataset.source(source).shuffle(seed=seed).repeat()


def training_dataset(
    source: FrameSource,
    processor: Processor,
    seed: int,
    augment: Augment | None = None,
    dataset: int | None = None,
) -> grain.MapDataset:
    """Build the endless stream of training samples of one dataset: shuffled, encoded and optionally augmented.

    Args:
        source: frames of the training split.
        processor: encodes each frame.
        seed: seed of the shuffling and the augmentation.
        augment: image augmentation; None for none.
        dataset: index stored in each sample when training on a mixture.

    Raises:
        ValueError: if the source is empty.
    """
    require_frames(source)
    encoded = shuffled(source, seed).map(Encode(processor, dataset))
    return encoded if augment is None else encoded.random_map(augment, seed=seed)


def mix_datasets(streams: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    """Interleave several endless streams in proportion to their weights.

    The interleaving is deterministic and as even as the weights allow, so every stretch of the run contains each stream
    in its proportion. A single stream is returned unchanged.
    """
    return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)


def eval_batches(
    source: FrameSource,
    processor: Processor,
    batch_size: int,
    limit: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    dataset: int | None = None,
) -> Iterator[EvalBatch]:
    """Yield every frame once, in a fixed order, in batches of constant size so that one compilation serves all.

    The last batch is padded with its first sample. Padding is not counted, and neither is a sample that replaces a
    frame that cannot be decoded.

    Args:
        source: frames of the split.
        processor: encodes each frame.
        batch_size: samples per batch, over all processes.
        limit: maximum number of frames, spread evenly over the source; None for all.
        shard_index: shard that this process loads of every batch.
        shard_count: number of shards.
        dataset: index stored in each sample when training on a mixture.
    """
    positions = np.arange(len(source))
    if limit is not None and limit < len(source):
        positions = np.linspace(0, len(source) - 1, limit).round().astype(int)
    encode = Encode(processor, dataset)

    def read(position: int) -> tuple[Batch, bool]:
        raw, asked = source[position], source.low_dim(position)
        return encode(raw), (raw.episode, raw.frame) == (asked.episode, asked.frame)

    for start in range(0, len(positions), batch_size):
        chosen = positions[start : start + batch_size]
        filled = np.pad(chosen, (0, batch_size - len(chosen)), constant_values=chosen[0])[shard_index::shard_count]
        found = {int(i): read(int(i)) for i in np.unique(filled)}
        samples, itself = zip(*(found[int(i)] for i in filled), strict=True)
        yield EvalBatch(
            stack_samples(samples),
            frame=np.asarray(source.frames)[filled].astype(np.uint32),
            counted=(np.arange(batch_size) < len(chosen))[shard_index::shard_count] & np.array(itself),
        )


class Encode:
    """Transform from RawSample to one Batch row; errors name the episode and frame.

    Args:
        processor: encodes the sample.
        dataset: index stored in each sample when training on a mixture.
    """

    def __init__(self, processor: Processor, dataset: int | None = None):
        self.processor, self.dataset = processor, dataset

    def __call__(self, raw: RawSample) -> Batch:
        try:
            sample = self.processor.encode(
                raw.images, raw.state, raw.instruction, raw.actions, raw.action_is_pad, resized=raw.resized
            )
            return sample if self.dataset is None else replace(sample, dataset=np.int32(self.dataset))
        except ValueError as error:
            raise ValueError(f"episode {raw.episode}, frame {raw.frame}: {error}") from error
