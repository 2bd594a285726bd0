"""Frames with their action chunks; test_reference.py compares them with lerobot's."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import synthetic

from wallx_jax.data.errors import FrameError
from wallx_jax.data.lerobot import LeRobotSource, read_info

CAMERAS = list(synthetic.CAMERAS)


@pytest.fixture(scope="module")
def source(dataset_info):
    return LeRobotSource(dataset_info, 4, CAMERAS)


@pytest.fixture
def copied(dataset_dir, tmp_path):
    return shutil.copytree(dataset_dir, tmp_path / "copied")


def test_reading_imports_no_torch_and_no_jax(dataset_dir):
    code = f"""import sys; from wallx_jax.data.lerobot import LeRobotSource, read_info
LeRobotSource(read_info({str(dataset_dir)!r}), 4, {CAMERAS!r})[0]
assert not {{"torch", "lerobot", "jax"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_keys_are_checked_at_once(dataset_info):
    with pytest.raises(ValueError, match="no camera 'face'; it has \\['observation.images.cam_high'"):
        LeRobotSource(dataset_info, 4, ["face"])
    with pytest.raises(ValueError, match="no camera 'action'"):
        LeRobotSource(dataset_info, 4, ["action"])
    with pytest.raises(ValueError, match="no feature 'state' that is a vector; it has .*'observation.state'"):
        LeRobotSource(dataset_info, 4, CAMERAS, state_key="state")
    with pytest.raises(ValueError, match="no feature 'observation.images.cam_high'"):
        LeRobotSource(dataset_info, 4, CAMERAS, action_key=CAMERAS[0])
    with pytest.raises(ValueError, match="frames 0..99 requested, but it has 26"):
        LeRobotSource(dataset_info, 4, CAMERAS, frames=np.array([0, 99]))


def test_sample(source, dataset_info):
    sample = source[dataset_info.episode_starts[1] + 2]
    states, actions = synthetic.episode_table(1)
    assert (sample.episode, sample.frame, sample.instruction) == (1, 2, synthetic.TASKS[1])
    np.testing.assert_array_equal(sample.state, states[2])
    # Episode 1 has 5 frames: offsets 0, 1, 2 exist, then the last action repeats.
    np.testing.assert_array_equal(sample.actions, actions[[2, 3, 4, 4]])
    assert sample.action_is_pad.tolist() == [False, False, False, True]
    assert sample.state.dtype == sample.actions.dtype == np.float32 and sample.action_is_pad.dtype == bool
    for image, camera in zip(sample.images, CAMERAS, strict=True):
        assert image.dtype == np.uint8 and image.shape == (*synthetic.CAMERAS[camera], 3)
        error = np.abs(image.astype(int) - synthetic.frame_image(1, 2, camera)).mean()
        assert error < 8  # the video is lossy; the next frame would be 12 off, another episode's more


def test_every_episodes_last_frame(source, dataset_info):
    for episode, length in enumerate(synthetic.LENGTHS):
        sample = source.low_dim(dataset_info.episode_starts[episode] + length - 1)
        assert (sample.episode, sample.frame) == (episode, length - 1)
        assert sample.action_is_pad.tolist() == [False, True, True, True]
        assert (sample.actions == synthetic.episode_table(episode)[1][-1]).all()


def test_low_dim_agrees(source):
    for i in range(0, len(source), 5):
        full, low = source[i], source.low_dim(i)
        assert low.images == ()
        for name in ("state", "actions", "action_is_pad"):
            np.testing.assert_array_equal(getattr(full, name), getattr(low, name))
        assert (full.instruction, full.episode, full.frame) == (low.instruction, low.episode, low.frame)


def test_camera_order_and_subset(dataset_info):
    images = LeRobotSource(dataset_info, 4, CAMERAS[::-1])[0].images
    assert [x.shape[:2] for x in images] == [synthetic.CAMERAS[c] for c in CAMERAS[::-1]]
    assert len(LeRobotSource(dataset_info, 4, CAMERAS[1:])[0].images) == 1


def test_a_split_and_its_pickled_copy(source):
    part = source.select(np.array([9, 3]))
    assert len(part) == 2 and len(source) == 26 and part.table is source.table
    part[0]
    again = pickle.loads(pickle.dumps(part))
    np.testing.assert_array_equal(again[0].images[0], source[9].images[0])
    assert again[1].frame == 3
    with pytest.raises(ValueError, match="frames 0..26 requested"):
        source.select([0, 26])


def test_actions_of_frames(source):
    expected = np.concatenate([synthetic.episode_table(e)[1] for e in range(4)])
    np.testing.assert_array_equal(source.actions_at(np.array([25, 0, 7])), expected[[25, 0, 7]])


def test_a_frame_that_cannot_be_read_is_named(copied):
    video = next((copied / "videos" / CAMERAS[0]).rglob("*.mp4"))
    source = LeRobotSource(read_info(copied), 4, CAMERAS)
    content = video.read_bytes()
    for damage, reason in (
        (lambda: video.write_bytes(content[:200]), "it has no video stream: it is truncated"),
        (video.unlink, "it is missing"),
        (lambda: video.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    ):
        damage()
        fresh = pickle.loads(pickle.dumps(source))
        with pytest.raises(FrameError, match=f"^copied: episode 1, frame 3: {CAMERAS[0]} cannot be read") as error:
            fresh[10]
        assert str(video) in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)
        assert fresh.low_dim(10).frame == 3, "which needs no images"


def test_episodes_can_be_chosen(dataset_dir, source):
    some = LeRobotSource(read_info(dataset_dir, episodes="3,1:2"), 4, CAMERAS)
    assert len(some) == 11 and not some.info.whole
    for i, frame in enumerate([*range(7, 12), *range(20, 26)]):
        a, b = some[i], source[frame]
        assert (a.episode, a.frame, a.instruction) == (b.episode, b.frame, b.instruction)
        for name in ("state", "actions", "action_is_pad"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        for one, other in zip(a.images, b.images, strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="episodes = '2,7:9': '7:9' selects none of 0..3"):
        read_info(dataset_dir, episodes="2,7:9")
