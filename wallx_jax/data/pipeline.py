"""From a dataset to batches: the split, the order of the samples, and Grain's readers of it, whose place can be saved.

Batches are formed before the work is dealt out to worker processes, so the order and content of a run depend on the
seed alone, not on the number of workers.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

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

UPSTREAM_SHARES = (0.95, 0.05)


def split_frames(
    info: DatasetInfo, ratio: float, mode: Literal["episode", "frame"] = "episode", seed: int = 42
) -> tuple[np.ndarray, np.ndarray]:
    """Frame indices (int64) for training and for validation.

    "episode": the first `ratio` of the episodes train, the others are held out entirely; with more than one episode
    and ratio < 1 each side gets at least one.
    "frame": upstream's split. The last episodes are set aside as above and used for nothing; 95% of the frames of the
    first train, 5% validate, by torch's random_split with `seed`. Neighbours of every validation frame are trained on.

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
        # random_split floors both shares and gives what is left over to the first, then the second.
        sizes = [int(count * share) for share in UPSTREAM_SHARES]
        cut = sizes[0] + (count - sum(sizes) + 1) // 2
        return order[:cut], order[cut:]
    raise ValueError(f"split mode is {mode!r}; choose 'episode' or 'frame'")


class DataLoader(Iterator[Batch]):
    """Batches of an endless stream of samples, and the place in them, to be saved and restored.

    The place is the number of batches drawn, and the order of the stream is fixed: a run goes on at its place with any
    number of workers, and of processes that draw as many samples together.
    """

    def __init__(
        self, stream: grain.MapDataset, batch_size: int, num_workers: int = 0, share: int = 0, shares: int = 1
    ):
        """
        Args:
            stream: what `samples` or `mixed` gives.
            batch_size: samples per batch of this process.
            num_workers: worker processes; 0 reads ahead in two threads.
            share, shares: which of how many shares of the samples this process of a multi-host run takes.
        """
        self._batches = stream[share::shares].batch(batch_size, drop_remainder=True, batch_fn=stack_samples)
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
        return {"batches_drawn": self._drawn}

    def set_state(self, state: dict[str, int]) -> None:
        """Raises KeyError when `state` is not what `get_state` gives."""
        self.close()
        self._drawn = state["batches_drawn"]

    def close(self) -> None:
        """Ends the workers; the next batch starts others."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read_from(self, place: int) -> grain.DatasetIterator:
        # An element here is a batch: two ahead are enough. Decoding and resizing leave Python's lock to other threads.
        threads = 1 if self._num_workers else 2
        dataset = self._batches[place:].to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=2))
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # Grain hands its own absl flags to the workers, also outside of app.run.
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=BUFFERED)
            dataset = dataset.mp_prefetch(options, worker_init_fn=start_worker)
        return iter(dataset)


def shuffled(source: FrameSource, seed: int) -> grain.MapDataset:
    """The frames in the order in which training meets them, without end; each pass in another order."""
    return grain.MapDataset.source(source).shuffle(seed=seed).repeat()


def samples(
    source: FrameSource,
    processor: Processor,
    seed: int,
    augment: Augment | None = None,
    dataset: int | None = None,
) -> grain.MapDataset:
    """What `shuffled` gives, as the model is fed it. `dataset`: the number that samples carry in a mixture.

    Raises:
        ValueError: if the source is empty.
    """
    if not len(source):
        raise ValueError(f"{source.info.repo_id}: the training split has no frames; raise train_test_split")
    encoded = shuffled(source, seed).map(Encode(processor, dataset))
    return encoded if augment is None else encoded.random_map(augment, seed=seed)


def mixed(streams: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    """Samples of several endless streams, interleaved as evenly as the weights allow: no chance is involved, so every
    stretch of the run has its share of each. One stream stays as it is."""
    return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)


def eval_batches(
    source: FrameSource,
    processor: Processor,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    dataset: int | None = None,
) -> Iterator[EvalBatch]:
    """Yields every frame once, in a fixed order; batches all have `batch_size` samples, so that one compilation serves.

    The last batch is filled up with its first sample, which is not counted there again. Nor is one that stands for a
    frame that cannot be decoded.

    Args:
        limit: at most so many frames, then spread evenly over the source.
        process_index, process_count: which share of each batch this process of a multi-host run takes.
        dataset: the number that samples carry in a mixture.
    """
    places = np.arange(len(source))
    if limit is not None and limit < len(source):
        places = np.linspace(0, len(source) - 1, limit).round().astype(int)
    encode = Encode(processor, dataset)

    def read(place: int) -> tuple[Batch, bool]:
        raw, asked = source[place], source.low_dim(place)
        return encode(raw), (raw.episode, raw.frame) == (asked.episode, asked.frame)

    for start in range(0, len(places), batch_size):
        chosen = places[start : start + batch_size]
        filled = np.pad(chosen, (0, batch_size - len(chosen)), constant_values=chosen[0])[process_index::process_count]
        found = {int(i): read(int(i)) for i in np.unique(filled)}
        samples, itself = zip(*(found[int(i)] for i in filled), strict=True)
        yield EvalBatch(
            stack_samples(samples),
            frame=np.asarray(source.frames)[filled].astype(np.uint32),
            counted=(np.arange(batch_size) < len(chosen))[process_index::process_count] & np.array(itself),
        )


class Encode:
    """RawSample -> Batch row with the number of its dataset, naming the frame when it fails."""

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
