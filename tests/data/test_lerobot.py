import dataclasses
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import synthetic

from wallx_jax.data.lerobot import LeRobotSource, read_info, to_uint8, torch_permutation

CAMERAS = list(synthetic.CAMERAS)
pytestmark = pytest.mark.filterwarnings("ignore:The video decoding and encoding capabilities of torchvision")


@pytest.fixture(scope="module")
def source(dataset_info):
    return LeRobotSource(dataset_info, 4, CAMERAS)


def edit_info(root, **changes):
    file = root / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def copied(dataset_dir, tmp_path):
    return shutil.copytree(dataset_dir, tmp_path / "copied")


def test_info(dataset_info):
    assert dataset_info.camera_keys == tuple(CAMERAS)
    assert [dataset_info.frame_size(c) for c in CAMERAS] == list(synthetic.CAMERAS.values())
    assert (dataset_info.num_episodes, dataset_info.num_frames) == (4, sum(synthetic.LENGTHS))
    assert (dataset_info.fps, dataset_info.robot_type) == (synthetic.FPS, "aloha")
    assert dataset_info.tasks == list(synthetic.TASKS)
    assert dataset_info.episode_lengths.tolist() == list(synthetic.LENGTHS)
    assert dataset_info.dims("action") == synthetic.DIMS


@pytest.mark.parametrize("names", [["channels", "height", "width"], None])
def test_channel_first_shapes(dataset_info, names):
    features = {"x": {"dtype": "video", "shape": [3, 480, 640], "names": names}}
    assert dataclasses.replace(dataset_info, features=features, camera_keys=("x",)).frame_size("x") == (480, 640)


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_old_format_names_the_conversion(copied, version):
    edit_info(copied, codebase_version=version)
    with pytest.raises(ValueError, match=f"format {version}.*python -m (lerobot[a-z0-9_.]+)") as error:
        read_info(copied)
    module = str(error.value).split("python -m ")[1].split()[0]
    assert importlib.util.find_spec(module) is not None


def test_newer_format(copied):
    edit_info(copied, codebase_version="v4.0")
    with pytest.raises(ValueError, match="v4.0; this package reads v3.0"):
        read_info(copied)


def test_not_a_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match="no meta/info.json"):
        read_info(tmp_path)


def test_half_copied_dataset(copied):
    edit_info(copied, total_episodes=5)
    with pytest.raises(ValueError, match="counts 5 episodes and 26 frames, meta/episodes 4 and 26"):
        read_info(copied)
    shutil.rmtree(copied / "meta" / "episodes")
    with pytest.raises(FileNotFoundError, match="meta/episodes is missing"):
        read_info(copied)


def test_reading_info_imports_no_torch(dataset_dir):
    code = f"""import sys; from wallx_jax.data.lerobot import read_info; read_info({str(dataset_dir)!r})
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
    with pytest.raises(ValueError, match="frames 0..99 asked for, but it has 26"):
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


def test_split_and_pickle(dataset_info, source):
    part = LeRobotSource(dataset_info, 4, CAMERAS, frames=np.array([9, 3]))
    assert len(part) == 2
    part[0]
    again = pickle.loads(pickle.dumps(part))
    np.testing.assert_array_equal(again[0].images[0], source[9].images[0])
    assert again[1].frame == 3


def test_bytes_survive_lerobots_float_images():
    torch = pytest.importorskip("torch")
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    floats = values.type(torch.float32) / 255
    expected = values.permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(to_uint8(floats), expected)
    np.testing.assert_array_equal(to_uint8(values), expected)
    # Upstream truncates instead of rounding; for bytes that went through float32 both are exact.
    np.testing.assert_array_equal((floats * 255).to(torch.uint8).permute(1, 2, 0).numpy(), expected)


def test_broken_video_names_the_frame(copied):
    info = read_info(copied)
    video = next((copied / "videos" / CAMERAS[0]).rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:200])
    with pytest.raises(RuntimeError, match="copied: episode 1, frame 3 \\(index 10\\) cannot be read"):
        LeRobotSource(info, 4, CAMERAS)[10]


def test_missing_video(copied):
    info = read_info(copied)
    next((copied / "videos" / CAMERAS[0]).rglob("*.mp4")).unlink()
    with pytest.raises(RuntimeError, match="copied at .*videos/ there"):
        LeRobotSource(info, 4, CAMERAS)[0]


def test_permutation_is_torchs():
    torch = pytest.importorskip("torch")
    _, second = torch.utils.data.random_split(range(103), [0.95, 0.05], torch.Generator().manual_seed(42))
    assert torch_permutation(103, 42)[-len(second) :].tolist() == list(second.indices)


def test_repo_id_is_looked_up_in_lerobots_cache(dataset_dir, tmp_path, monkeypatch):
    shutil.copytree(dataset_dir / "meta", tmp_path / "me" / "blocks" / "meta")
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    info = read_info("me/blocks")
    assert (info.repo_id, info.root) == ("me/blocks", tmp_path / "me" / "blocks")


def test_repo_id_found_nowhere(tmp_path, monkeypatch):
    def resolve(repo, kind, revision, patterns):
        assert (kind, revision, patterns) == ("dataset", "main", ["meta/*", "data/*"])
        raise FileNotFoundError(f"dataset {repo} is nowhere")

    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    monkeypatch.setattr("wallx_jax.hub.resolve", resolve)
    message = f"^dataset me/blocks is nowhere \\(lerobot's cache {tmp_path} has no me/blocks either\\)$"
    with pytest.raises(FileNotFoundError, match=message):
        read_info("me/blocks", revision="main", download_videos=False)
