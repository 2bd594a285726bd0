"""On sound datasets LeRobotSource gives exactly what lerobot gives, of whichever release is installed."""

import contextlib
import inspect
import io
import shutil

import av
import numpy as np
import pytest
from helpers import synthetic

from wallx_jax.data.lerobot import LeRobotSource, read_info
from wallx_jax.data.video import decode_in_order
from wallx_jax.data.writer import DatasetWriter

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

STATE, ACTION = synthetic.STATE, synthetic.ACTION
CAMERAS = list(synthetic.CAMERAS)
HORIZON, FPS = 4, 10
LENGTHS = (5, 1, 9, 4)
SIZES = dict(zip(CAMERAS, ((64, 96), (56, 64)), strict=True))  # x265 overruns its memory in narrower videos
TASKS = ("pick up the red block", "open the cabinet", "wave")
pytestmark = pytest.mark.filterwarnings("ignore:The video decoding and encoding capabilities of torchvision")


@pytest.fixture(autouse=True)
def quiet_encoders(monkeypatch):
    monkeypatch.setenv("SVT_LOG", "1")


def lerobot_dataset(root, **options):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("tests/reference", root=root, video_backend="pyav", **options)


def create(root, fps, features, codec="libsvtav1", **options):
    """lerobot's own writer, whose parameters have changed their names."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    known = inspect.signature(LeRobotDataset.create).parameters
    if "vcodec" in known:
        options["vcodec"] = codec
    else:
        from lerobot.configs.video import RGBEncoderConfig

        options["rgb_encoder"] = RGBEncoderConfig(vcodec=codec)
    return LeRobotDataset.create("tests/reference", fps, features, root=root, video_backend="pyav", **options)


def record(dataset, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        for frame in range(length):
            values = {}
            for key, feature in dataset.features.items():
                shape = tuple(feature["shape"])
                if feature["dtype"] in ("image", "video"):
                    x = np.linspace(0, 200, shape[1])[None, :, None] + 3 * frame + 17 * episode
                    values[key] = np.broadcast_to(x, shape).astype(np.uint8) + np.arange(3, dtype=np.uint8) * 20
                elif key in (STATE, ACTION) or key.startswith("extra"):
                    values[key] = rng.normal(size=shape).astype(feature["dtype"])
            dataset.add_frame(values | {"task": TASKS[(episode + frame // 3) % len(TASKS)]})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


def features(kind="video", dims=5, **others):
    names = ["height", "width", "channels"]
    vectors = {key: {"dtype": "float32", "shape": (dims,), "names": None} for key in (STATE, ACTION)}
    cameras = {camera: {"dtype": kind, "shape": (*size, 3), "names": names} for camera, size in SIZES.items()}
    return vectors | cameras | others


def recorded(root, codec="libsvtav1", kind="video", fps=FPS):
    extra = {"extra.force": {"dtype": "float64", "shape": (3,), "names": None}}
    dataset = create(root, fps, features(kind, **extra), codec, use_videos=kind == "video")
    # lerobot cannot join H.264 and HEVC videos of one frame.
    record(dataset, [max(length, 3) if codec in ("h264", "hevc") else length for length in LENGTHS])
    return root


def many_files(root, kind="video"):
    """A new file for nearly every episode, in chunks of two."""
    dataset = create(root, FPS, features(kind), use_videos=kind == "video")
    dataset.meta.update_chunk_settings(chunks_size=2, data_files_size_in_mb=0.001, video_files_size_in_mb=0.001)
    record(dataset)
    return root


def aggregated(root):
    """Two recordings joined by lerobot's tool."""
    from lerobot.datasets.aggregate import aggregate_datasets

    parts = [recorded(root.with_name(f"part{n}")) for n in range(2)]
    aggregate_datasets(["tests/reference"] * 2, "tests/reference", parts, root)
    return root


def without_an_episode(root):
    """A recording from which lerobot's tool has deleted an episode."""
    from lerobot.datasets.dataset_tools import delete_episodes

    recorded(root.with_name("before"))
    delete_episodes(lerobot_dataset(root.with_name("before")), [1], output_dir=root, repo_id="tests/reference")
    return root


DATASETS = {
    "av1": recorded,
    "h264": lambda root: recorded(root, "h264"),
    "30 fps": lambda root: recorded(root, fps=30),
    "images": lambda root: recorded(root, kind="image"),
    "many video files": many_files,
    "many image files": lambda root: many_files(root, "image"),
    "aggregated": aggregated,
    "an episode deleted": without_an_episode,
    "our writer": synthetic.write_dataset,
    "our writer, many files": lambda root: synthetic.write_dataset(
        root, codec="h264", data_files_size_in_mb=1e-6, video_files_size_in_mb=1e-6, chunks_size=3
    ),
    "our writer, images": lambda root: synthetic.write_dataset(root, "image"),
}


@pytest.fixture(scope="module", params=DATASETS)
def root(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("reference") / "dataset"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        DATASETS[request.param](root)
    return root


def assert_same(sample, item, info):
    np.testing.assert_array_equal(sample.state, item[STATE].numpy())
    np.testing.assert_array_equal(sample.actions, item[ACTION].numpy())
    np.testing.assert_array_equal(sample.action_is_pad, item[f"{ACTION}_is_pad"].numpy())
    assert sample.instruction == item["task"]
    assert (sample.episode, sample.frame) == (item["episode_index"].item(), item["frame_index"].item())
    for image, camera in zip(sample.images, CAMERAS, strict=True):
        theirs = item[camera].mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(image, theirs)
        assert image.shape == (*info.frame_size(camera), 3)


@pytest.mark.medium
def test_every_frame(root):
    info = read_info(root)
    steps = {ACTION: [step / info.fps for step in range(HORIZON)]}
    reference, source = lerobot_dataset(root, delta_timestamps=steps), LeRobotSource(info, HORIZON, CAMERAS)
    assert len(source) == len(reference)
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        assert_same(source[i], reference[i], info)
        low = source.low_dim(i)
        assert low.instruction == reference[i]["task"] and (low.actions == source[i].actions).all()
    for camera in filter(info.is_video, CAMERAS):
        for frame, image in decode_in_order(info, camera):
            np.testing.assert_array_equal(image, source.images.read(camera, frame))


def test_chosen_episodes(root):
    info = read_info(root, episodes="0,2:4" if read_info(root).num_episodes > 3 else "0,2")
    steps = {ACTION: [step / info.fps for step in range(HORIZON)]}
    reference = lerobot_dataset(root, delta_timestamps=steps, episodes=info.episode_numbers.tolist())
    source = LeRobotSource(info, HORIZON, CAMERAS)
    assert len(source) == len(reference) < read_info(root).num_frames
    for i in range(len(source)):
        assert_same(source[i], reference[i], info)


def test_hevc(tmp_path):
    """lerobot's own reader does not find half of these frames: x265 opens the groups of pictures."""
    root = recorded(tmp_path / "hevc", "hevc")
    info = read_info(root)
    source = LeRobotSource(info, HORIZON, CAMERAS)
    for number, camera in enumerate(CAMERAS):
        with av.open(str(source.images.file_of(camera, 0))) as video:
            decoded = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(decoded) == info.num_frames
        for frame in np.random.default_rng(0).permutation(info.num_frames).tolist():
            np.testing.assert_array_equal(source[frame].images[number], decoded[frame])


def test_one_dim(tmp_path):
    """lerobot stores features of one dim as plain numbers."""
    root, rng = tmp_path / "one", np.random.default_rng(0)
    vectors = {key: {"dtype": "float32", "shape": (1,), "names": None} for key in (STATE, ACTION)}
    with DatasetWriter(root, FPS, vectors) as writer:
        for length in LENGTHS:
            writer.add_episode({key: rng.normal(size=(length, 1)).astype(np.float32) for key in vectors}, "go")
    steps = {ACTION: [step / FPS for step in range(HORIZON)]}
    reference, source = lerobot_dataset(root, delta_timestamps=steps), LeRobotSource(read_info(root), HORIZON, [])
    for i in range(len(source)):
        sample, item = source[i], reference[i]
        assert sample.state.shape == (1,) and sample.actions.shape == (HORIZON, 1)
        assert sample.state.tolist() == item[STATE].reshape(1).tolist()
        assert sample.actions[:, 0].tolist() == item[ACTION].reshape(HORIZON).tolist()


@pytest.mark.medium
def test_recording_goes_on(tmp_path):
    """A second session appends to the dataset, in new files."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = recorded(tmp_path / "first")
    resume = getattr(LeRobotDataset, "resume", None)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        again = resume("tests/reference", root=root) if resume else lerobot_dataset(root)
        record(again, lengths=(3, 2), seed=1)
    info = read_info(root)
    assert info.episode_lengths.tolist() == [*LENGTHS, 3, 2]
    steps = {ACTION: [step / FPS for step in range(HORIZON)]}
    reference, source = lerobot_dataset(root, delta_timestamps=steps), LeRobotSource(info, HORIZON, CAMERAS)
    for i in range(len(source)):
        assert_same(source[i], reference[i], info)
    shutil.rmtree(root)
