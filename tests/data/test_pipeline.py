import dataclasses

import jax
import numpy as np
import pytest
from helpers import synthetic

from wallx_jax.data.batch import Batch, stack_samples
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.pipeline import DataLoader, eval_batches, split_frames, training_dataset

HORIZON = 3
pytestmark = pytest.mark.filterwarnings("ignore:The video decoding and encoding capabilities of torchvision")


class PlainProcessor:
    """Stands in for the processor: passes the sample on, with its place in the dataset as tokens."""

    def encode(self, images, state, instruction, actions, action_is_pad, resized=False):
        if state[0] == 12345:
            raise ValueError("state is odd")
        ones, rows = np.ones_like, np.zeros(4, np.int32)
        return Batch(tuple(images), rows, rows > 0, rows[:0], state, ones(state), actions, ones(actions), action_is_pad)


@pytest.fixture(scope="module")
def source(dataset_info):
    return LeRobotSource(dataset_info, HORIZON, list(synthetic.CAMERAS))


def batches(source, size=4, seed=3, processor=None, **options):
    return DataLoader(training_dataset(source, processor or PlainProcessor(), seed), size, **options)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        for name in ("state", "actions", "action_is_pad"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
        for image, other in zip(x.images, y.images, strict=True):
            np.testing.assert_array_equal(image, other)


def episodes(count, length=10):
    lengths = np.full(count, length)
    return type("Info", (), {"num_episodes": count, "num_frames": lengths.sum(), "episode_lengths": lengths})


def test_episode_split_keeps_episodes_whole(dataset_info):
    train, val = split_frames(dataset_info, 0.5)
    first = sum(synthetic.LENGTHS[:2])
    assert train.tolist() == list(range(first))
    assert val.tolist() == list(range(first, dataset_info.num_frames))


@pytest.mark.parametrize(
    ("count", "ratio", "held_out"), [(85, 0.95, 5), (4, 0.95, 1), (2, 0.1, 1), (1, 0.95, 0), (10, 1.0, 0), (1, 0.1, 0)]
)
def test_episode_split_sizes(count, ratio, held_out):
    train, val = split_frames(episodes(count), ratio)
    assert len(val) == 10 * held_out and len(train) == 10 * (count - held_out)


@pytest.mark.filterwarnings("ignore:Length of split")
@pytest.mark.parametrize("count", [1, 2, 3, 7, 41])
def test_frame_split_is_torchs_random_split(count):
    torch = pytest.importorskip("torch")
    info = episodes(count, 11)
    frames = range(11 * int(count * 0.95))
    expected = torch.utils.data.random_split(frames, [0.95, 0.05], torch.Generator().manual_seed(42))
    for got, subset in zip(split_frames(info, 0.95, "frame", seed=42), expected, strict=True):
        assert got.tolist() == list(subset.indices)


def test_bad_splits():
    with pytest.raises(ValueError, match="train_test_split is 0"):
        split_frames(episodes(3), 0)
    with pytest.raises(ValueError, match="choose 'episode' or 'frame'"):
        split_frames(episodes(3), 0.9, "random")


def test_stack_agrees_with_the_contract():
    sample = PlainProcessor().encode(
        [np.ones((2, 3, 3), np.uint8)], np.ones(4), "x", np.ones((3, 4)), np.zeros(3, bool)
    )
    ours, reference = stack_samples([sample, sample]), jax.tree.map(lambda *rows: np.stack(rows), sample, sample)
    for f in dataclasses.fields(Batch):
        np.testing.assert_array_equal(np.asarray(getattr(ours, f.name)), np.asarray(getattr(reference, f.name)))


def test_an_epoch_sees_every_frame_once_and_epochs_differ(dataset_info):
    source = LeRobotSource(dataset_info, HORIZON, [], frames=np.arange(12))
    iterator = batches(source, seed=1)
    first, second = (np.concatenate([b.state for b in take(iterator, 3)]) for _ in range(2))
    expected = np.stack([source.low_dim(i).state for i in range(12)])
    order = np.lexsort(expected.T)
    for epoch in (first, second):
        np.testing.assert_array_equal(epoch[np.lexsort(epoch.T)], expected[order])
    assert not np.array_equal(first, second)


def test_seed_fixes_order_and_content(source):
    assert_same(*(take(batches(source), 4) for _ in range(2)))
    other = take(batches(source, seed=4), 1)[0]
    assert not np.array_equal(other.state, next(batches(source)).state)


def test_resume_is_exact(source):
    iterator = batches(source)
    assert iterator.get_state() == {"batches_drawn": 0}
    take(iterator, 5)
    state = iterator.get_state()
    expected = take(iterator, 4)
    again = batches(source)
    again.set_state(state)
    assert_same(take(again, 4), expected)
    iterator.set_state(state)  # one that has read ahead goes back, too
    assert_same(take(iterator, 4), expected)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_workers_change_nothing_and_any_number_resumes(source):
    alone = take(batches(source), 7)
    iterator = batches(source, num_workers=2)
    try:
        assert_same(take(iterator, 3), alone[:3])
        state = iterator.get_state()
        assert_same(take(iterator, 2), alone[3:5])
    finally:
        iterator.close()
    for workers in (0, 1):
        again = batches(source, num_workers=workers)
        try:
            again.set_state(state)
            assert_same(take(again, 4), alone[3:])
        finally:
            again.close()


def together(shares) -> np.ndarray:
    """States of a batch that several processes have drawn, in the order of the stream."""
    return np.stack([share.state for share in shares], axis=1).reshape(-1, shares[0].state.shape[-1])


def test_hosts_share_the_samples(source):
    whole = take(batches(source), 2)
    shares = [take(batches(source, 2, shard_index=i, shard_count=2), 2) for i in range(2)]
    for step in range(2):
        np.testing.assert_array_equal(together([share[step] for share in shares]), whole[step].state)


def test_another_number_of_hosts_goes_on(source):
    whole, two = take(batches(source), 4), [batches(source, 2, shard_index=i, shard_count=2) for i in range(2)]
    for share in two:
        take(share, 2)
    four = [batches(source, 1, shard_index=i, shard_count=4) for i in range(4)]
    for share in four:
        share.set_state(two[0].get_state())
    for step in (2, 3):
        np.testing.assert_array_equal(together([next(share) for share in four]), whole[step].state)


def test_errors_reach_the_caller(dataset_info, source):
    with pytest.raises(ValueError, match="training split has no frames"):
        batches(LeRobotSource(dataset_info, HORIZON, [], frames=[]))

    class Odd(PlainProcessor):
        def encode(self, images, state, *rest, **options):
            return super().encode(images, state * 0 + 12345, *rest)

    with pytest.raises(ValueError, match="episode \\d, frame \\d: state is odd"):
        next(batches(source, processor=Odd()))


@pytest.mark.parametrize("size", [1, 8, 13, 100])
def test_every_held_out_frame_counts_once(source, size):
    batches = list(eval_batches(source, PlainProcessor(), size))
    assert {batch.batch.state.shape[0] for batch in batches} == {size}
    counted, frame, state = (
        np.concatenate(rows)
        for rows in zip(*((batch.counted, batch.frame, batch.batch.state) for batch in batches), strict=True)
    )
    np.testing.assert_array_equal(frame[counted], source.frames)
    np.testing.assert_array_equal(state[counted], [source.low_dim(i).state for i in range(len(source))])
    again = eval_batches(source, PlainProcessor(), size)
    assert_same((batch.batch for batch in again), [batch.batch for batch in batches])


def test_eval_limit_spreads_over_the_source(source):
    (batch,) = eval_batches(source, PlainProcessor(), 2, limit=2)
    assert batch.counted.all() and batch.frame.tolist() == [source.frames[0], source.frames[-1]]
    np.testing.assert_array_equal(batch.batch.state, [source.low_dim(i).state for i in (0, len(source) - 1)])


def test_eval_limit_is_the_same_frames_in_any_batches(source):
    def frames(size):
        batches = eval_batches(source, PlainProcessor(), size, limit=7)
        return [int(x) for batch in batches for x in batch.frame[batch.counted]]

    assert frames(1) == frames(2) == frames(13) and len(set(frames(1))) == 7


@pytest.mark.parametrize("limit", [12, None])
def test_processes_share_each_eval_batch(source, limit):
    whole = list(eval_batches(source, PlainProcessor(), 8, limit))
    for index in range(2):
        own = eval_batches(source, PlainProcessor(), 8, limit, shard_index=index, shard_count=2)
        for mine, batch in zip(own, whole, strict=True):
            np.testing.assert_array_equal(mine.batch.state, batch.batch.state[index::2])
            np.testing.assert_array_equal(mine.frame, batch.frame[index::2])
            np.testing.assert_array_equal(mine.counted, batch.counted[index::2])


def test_eval_of_a_source_smaller_than_a_batch(dataset_info):
    source = LeRobotSource(dataset_info, HORIZON, [], frames=[3, 5])
    (batch,) = eval_batches(source, PlainProcessor(), 4)
    np.testing.assert_array_equal(batch.batch.state, [source.low_dim(i).state for i in (0, 1, 0, 0)])
    assert batch.frame.tolist() == [3, 5, 3, 3] and batch.counted.tolist() == [True, True, False, False]
    assert list(eval_batches(LeRobotSource(dataset_info, HORIZON, [], frames=[]), PlainProcessor(), 4)) == []
