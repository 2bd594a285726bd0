"""With unreadable_frames="skip" another frame takes the place of one that cannot be decoded; all others stay."""

import pickle
import shutil

import numpy as np
import pytest
from helpers import edits, synthetic

from wallx_jax.data.batch import Batch
from wallx_jax.data.errors import FrameError
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import read_info
from wallx_jax.data.pipeline import eval_batches
from wallx_jax.data.unreadable import ATTEMPTS, SkippedFrames, SkipUnreadable

HIGH = next(iter(synthetic.CAMERAS))
BAD = [3, 4, 8, 20]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return synthetic.write_dataset(tmp_path_factory.mktemp("sound") / "images", camera_type="image")


@pytest.fixture
def damaged(sound, tmp_path):
    root = shutil.copytree(sound, tmp_path / "damaged")
    values = edits.column(root, edits.DATA, HIGH)
    for frame in BAD:
        values[frame] = {"bytes": b"damaged", "path": None}
    edits.set_column(root, edits.DATA, HIGH, values)
    return root


def order(source):
    return [(sample.episode, sample.frame) for sample in (source[i] for i in range(len(source)))]


def test_others_keep_their_places(sound, damaged):
    whole = LeRobotSource(read_info(sound), 2, [HIGH])
    source = LeRobotSource(read_info(damaged), 2, [HIGH])
    with pytest.raises(FrameError):
        source[BAD[0]]
    skipping = SkipUnreadable(source)
    expected, found = order(whole), order(skipping)
    assert len(skipping) == len(whole)
    assert [i for i in range(len(whole)) if found[i] != expected[i]] == BAD
    assert not {found[i] for i in BAD} & {expected[i] for i in BAD}, "what took their places can be read"
    assert order(SkipUnreadable(LeRobotSource(read_info(damaged), 2, [HIGH]))) == found, "in every run the same"
    assert [sample.frame for sample in map(skipping.low_dim, BAD)] == [expected[i][1] for i in BAD]


class Plain:
    def encode(self, images, state, instruction, actions, action_is_pad, resized=False):
        rows, ones = np.zeros(4, np.int32), np.ones_like
        return Batch(tuple(images), rows, rows > 0, rows[:0], state, ones(state), actions, ones(actions), action_is_pad)


@pytest.mark.parametrize("size", [1, 5])
def test_validation_leaves_them_out(damaged, size):
    source = SkipUnreadable(LeRobotSource(read_info(damaged), 2, [HIGH]))
    batches = list(eval_batches(source, Plain(), size))
    counted = np.concatenate([batch.frame[batch.counted] for batch in batches])
    assert counted.tolist() == [i for i in range(len(source)) if i not in BAD], "nothing counts twice in their places"


def test_skipped_frames_are_counted_across_processes(damaged):
    source = LeRobotSource(read_info(damaged), 2, [HIGH])
    report = SkippedFrames([source])
    assert report.new() == [] and report.count == 0
    worker = pickle.loads(pickle.dumps(SkipUnreadable(source.select(np.arange(10)))))
    order(worker)
    messages = report.new()
    assert report.count == 3 and report.new() == []
    for message, place in zip(
        messages, ("episode 0, frame 3", "episode 0, frame 4", "episode 1, frame 1"), strict=True
    ):
        assert message.startswith(f"frame skipped: damaged: {place}: {HIGH} cannot be read from ")
    order(SkipUnreadable(source))
    assert report.count == 3 and len(report.new()) == 1 and report.count == 4


def test_a_frame_is_tried_once(damaged, monkeypatch):
    source, read = LeRobotSource(read_info(damaged), 2, [HIGH]), []
    real = type(source.images).read
    monkeypatch.setattr(type(source.images), "read", lambda self, *a: read.append(a[1]) or real(self, *a))
    skipping = SkipUnreadable(source)
    for _ in range(3):
        skipping[BAD[0]]
    assert read.count(BAD[0]) == 1


def test_nothing_left_to_read(damaged, monkeypatch):
    monkeypatch.setattr("wallx_jax.data.unreadable.ATTEMPTS", 5)
    source = LeRobotSource(read_info(damaged), 2, [HIGH], frames=BAD)
    with pytest.raises(FrameError, match="damaged: episode 0, frame 3"):
        SkipUnreadable(source)[0]
    assert ATTEMPTS > 50
