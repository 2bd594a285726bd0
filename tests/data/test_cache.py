import dataclasses
import os
import pickle

import numpy as np
import pytest
import synthetic

from wallx_jax.data.cache import CachedSource
from wallx_jax.data.images import resize, target_size
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.processor import ProcessorConfig
from wallx_jax.data.video import decode_in_order

CAMERAS = tuple(synthetic.CAMERAS)
RESOLUTIONS = (84, 56)
CONFIG = ProcessorConfig(
    views=("face_view", "left_wrist_view"),
    camera_keys=CAMERAS,
    resolutions=RESOLUTIONS,
    image_sizes=tuple(target_size(*synthetic.CAMERAS[c], r) for c, r in zip(CAMERAS, RESOLUTIONS, strict=True)),
    horizon=3,
    prompt_length=8,
)


@pytest.fixture
def source(dataset_info):
    return LeRobotSource(dataset_info, 3, CAMERAS, frames=np.array([4, 9, 20]))


def test_gives_what_resizing_the_source_gives(source, tmp_path, monkeypatch):
    cached = CachedSource(source, CONFIG, tmp_path)
    first = [cached[i] for i in range(len(cached))]
    for i, sample in enumerate(first):
        raw = source[i]
        for image, original, resolution in zip(sample.images, raw.images, RESOLUTIONS, strict=True):
            np.testing.assert_array_equal(image, resize(original, resolution))
        for field in ("state", "actions", "action_is_pad"):
            np.testing.assert_array_equal(getattr(sample, field), getattr(raw, field))
        assert (sample.instruction, sample.episode, sample.frame) == (raw.instruction, raw.episode, raw.frame)
        assert sample.resized

    monkeypatch.setattr(LeRobotSource, "__getitem__", lambda *_: pytest.fail("a kept frame was decoded again"))
    again = pickle.loads(pickle.dumps(CachedSource(source, CONFIG, tmp_path)))
    for i, sample in enumerate(first):
        for a, b in zip(again[i].images, sample.images, strict=True):
            np.testing.assert_array_equal(a, b)


def test_filling_from_front_to_back_gives_the_same_frames(source, dataset_info, tmp_path, monkeypatch):
    cached = CachedSource(source, CONFIG, tmp_path)
    cached.fill()
    everything = LeRobotSource(dataset_info, 3, CAMERAS)
    for camera, kept, resolution in zip(range(2), cached._open(), RESOLUTIONS, strict=False):
        for index in range(len(everything)):
            np.testing.assert_array_equal(kept[index], resize(everything[index].images[camera], resolution))
    monkeypatch.setattr(LeRobotSource, "__getitem__", lambda *_: pytest.fail("a kept frame was decoded again"))
    assert cached[1].resized
    CachedSource(source, CONFIG, tmp_path).fill()


def test_a_short_video_file_is_named(dataset_info):
    lengths = dataset_info.episode_lengths + np.array([0, 0, 0, 1])
    longer = dataclasses.replace(dataset_info, episode_lengths=lengths)
    with pytest.raises(ValueError, match="file-000.mp4 lacks 1 of the frames"):
        list(decode_in_order(longer, CAMERAS[0]))


def test_other_sizes_or_another_dataset_have_another_cache(source, tmp_path):
    a = CachedSource(source, CONFIG, tmp_path)
    sizes = tuple((56, 56) for _ in CAMERAS)
    b = CachedSource(source, dataclasses.replace(CONFIG, image_sizes=sizes), tmp_path)
    assert a.folder != b.folder


def test_a_full_disk_is_one_error_and_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="frame_cache: no room.*No space left"):
        CachedSource(source, CONFIG, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
