import io
import json
import weakref
from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.version import Version
from PIL import Image

from wallx_jax.data import writer as writer_module
from wallx_jax.data.writer import DatasetWriter

CODECS = {"libsvtav1": "av1", "h264": "h264", "hevc": "hevc"}
STATE, ACTION, TOP, WRIST = "observation.state", "action", "observation.images.top", "observation.images.wrist"
SCALARS = ("reward", "success", "count", "note")
LENGTHS = (5, 1, 4)
TASKS = ("open the cabinet", "close it, gently", "open the cabinet")
HEIGHT, WIDTH = 48, 64


def make_features(camera_type="video", size=(HEIGHT, WIDTH)):
    camera = {"dtype": camera_type, "shape": (*size, 3), "names": ["height", "width", "channels"]}
    return {
        STATE: {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        ACTION: {"dtype": "float32", "shape": (2,), "names": None},
        "force": {"dtype": "float64", "shape": (2,), "names": None},
        "buttons": {"dtype": "int32", "shape": (2,), "names": None},
        "reward": {"dtype": "float32", "shape": (1,), "names": None},
        "success": {"dtype": "bool", "shape": (1,), "names": None},
        "count": {"dtype": "int64", "shape": (1,), "names": None},
        "note": {"dtype": "string", "shape": (1,), "names": None},
        TOP: camera,
        WRIST: camera,
    }


def make_frames(seed, length, size=(HEIGHT, WIDTH)):
    """uint8 [T, H, W, 3]: smooth, and each frame brighter than the last, so that they differ even after lossy video."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 60 // width, y * 60 // height, (x + y) * 60 // (height + width)], axis=-1)
    return np.stack([image + 10 + 23 * t + 5 * (seed % 4) for t in range(length)]).astype(np.uint8)


def make_episode(seed, length, size=(HEIGHT, WIDTH)):
    rng = np.random.default_rng(seed)
    return {
        STATE: rng.normal(size=(length, 3)).astype(np.float32),
        ACTION: rng.normal(size=(length, 2)).astype(np.float32),
        "force": rng.normal(size=(length, 2)),
        "buttons": rng.integers(-5, 5, (length, 2), np.int32),
        "reward": rng.normal(size=(length, 1)).astype(np.float32),
        "success": np.arange(length) == length - 1,
        "count": rng.integers(0, 9, length),
        "note": [f"{seed}-{t}" for t in range(length)],
        TOP: make_frames(seed, length, size),
        WRIST: list(255 - make_frames(seed, length, size)),
    }


EPISODES = [make_episode(seed, length) for seed, length in enumerate(LENGTHS)]


def write(root, fps=10, camera_type="video", **options):
    with DatasetWriter(root, fps, make_features(camera_type), robot_type="aloha", **options) as writer:
        for episode, task in zip(EPISODES, TASKS, strict=True):
            writer.add_episode(episode, task)
    return root


def read_episodes(root):
    """Rows of meta/episodes."""
    files = sorted((root / "meta" / "episodes").rglob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def read_json(root, name):
    return json.loads((root / "meta" / name).read_text())


def decode(file):
    """(times, frames uint8 [H, W, 3], whether each is a key frame)."""
    with av.open(str(file)) as video:
        frames = list(video.decode(video=0))
        return (
            [frame.pts * frame.time_base for frame in frames],
            [frame.to_ndarray(format="rgb24") for frame in frames],
            [frame.key_frame for frame in frames],
        )


def longest_gop(keys):
    """Most frames from one key frame to the next; encoders may add key frames where the picture changes."""
    return np.diff([*np.flatnonzero(keys), len(keys)]).max()


def distance(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("fps", [10, 29.97, Fraction(30000, 1001)])
def test_video_frames_are_at_their_exact_time(tmp_path, codec, fps):
    root = write(tmp_path / "dataset", fps, codec=codec)
    rate = Fraction(2997, 100) if fps == 29.97 else fps
    start = 0
    for row, episode in zip(read_episodes(root), EPISODES, strict=True):
        assert row[f"videos/{TOP}/from_timestamp"] == pytest.approx(float(start / rate), abs=1e-12)
        start += row["length"]
        assert row[f"videos/{TOP}/to_timestamp"] == pytest.approx(float(start / rate), abs=1e-12)
        assert len(episode[TOP]) == row["length"]
    for camera in (TOP, WRIST):
        file = root / "videos" / camera / "chunk-000" / "file-000.mp4"
        times, frames, keys = decode(file)
        assert times == [Fraction(n) / rate for n in range(sum(LENGTHS))]
        assert longest_gop(keys) == 2
        for frame, written in zip(frames, np.concatenate([episode[camera] for episode in EPISODES]), strict=True):
            assert distance(frame, written) < 5  # consecutive frames are 23 apart
        with av.open(str(file)) as video:
            stream = video.streams.video[0]
            assert stream.duration * stream.time_base == Fraction(sum(LENGTHS)) / rate
            assert stream.codec.canonical_name == CODECS[codec]
            for n in range(len(times)):  # every frame is reached from the key frame before it
                video.seek(int(times[n] / stream.time_base), stream=stream)
                assert times[n] in (frame.pts * stream.time_base for frame in islice(video.decode(stream), 2))
    table = pq.read_table(root / "data" / "chunk-000" / "file-000.parquet")
    expected = np.concatenate([np.arange(n) / float(fps) for n in LENGTHS]).astype(np.float32)
    np.testing.assert_array_equal(table["timestamp"].to_numpy(), expected)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_videos(tmp_path, codec, length):
    """x265 writes random decoding times into some of them, so there are several tries."""
    features = {TOP: make_features()[TOP]}
    with DatasetWriter(tmp_path / "dataset", 10, features, codec=codec, video_files_size_in_mb=1e-6) as writer:
        for _ in range(10):
            writer.add_episode({TOP: EPISODES[0][TOP][:length]}, "look")
    files = sorted((tmp_path / "dataset" / "videos").rglob("*.mp4"))
    assert len(files) == 10
    for file in files:
        assert decode(file)[0] == [Fraction(n, 10) for n in range(length)]


def test_gop_crf_and_preset_reach_the_encoder(tmp_path):
    sizes = {}
    for crf in (10, 50):
        root = write(tmp_path / str(crf), codec="libx264", crf=crf, gop=4, preset="ultrafast")
        file = root / "videos" / TOP / "chunk-000" / "file-000.mp4"
        assert longest_gop(decode(file)[2]) == 4
        sizes[crf] = file.stat().st_size
    assert sizes[10] > sizes[50]


def test_each_episode_is_a_row_group(tmp_path):
    root = write(tmp_path / "dataset")
    file = pq.ParquetFile(root / "data" / "chunk-000" / "file-000.parquet")
    assert file.num_row_groups == len(EPISODES)
    assert file.metadata.row_group(0).column(0).compression == "SNAPPY"
    assert file.schema_arrow.field(STATE).type.equals(pa.list_(pa.float32(), 3))
    assert [file.schema_arrow.field(key).type for key in SCALARS] == [pa.float32(), pa.bool_(), pa.int64(), pa.string()]
    start = 0
    for number, episode in enumerate(EPISODES):
        rows, length = file.read_row_group(number).to_pydict(), LENGTHS[number]
        for key in (STATE, ACTION, "force", "buttons"):
            np.testing.assert_array_equal(np.array(rows[key], episode[key].dtype), episode[key])
        for key in SCALARS:
            assert rows[key] == np.ravel(episode[key]).tolist()
        assert rows["frame_index"] == list(range(length))
        assert rows["index"] == list(range(start, start + length))
        assert rows["episode_index"] == [number] * length
        assert rows["task_index"] == [(0, 1, 0)[number]] * length
        start += length


def test_embedded_images_are_lossless(tmp_path):
    root = write(tmp_path / "dataset", camera_type="image")
    assert not (root / "videos").exists()
    assert read_json(root, "info.json")["video_path"] is None
    file = pq.ParquetFile(root / "data" / "chunk-000" / "file-000.parquet")
    assert json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"][TOP] == {"_type": "Image"}
    for number, episode in enumerate(EPISODES):
        for camera in (TOP, WRIST):
            for cell, frame in zip(
                file.read_row_group(number, [camera])[camera].to_pylist(), episode[camera], strict=True
            ):
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(cell["bytes"]))), frame)


def test_info_and_episodes(tmp_path):
    root = write(tmp_path / "dataset")
    info = read_json(root, "info.json")
    assert {key: info[key] for key in info if key != "features"} == {
        "codebase_version": "v3.0",
        "robot_type": "aloha",
        "total_episodes": 3,
        "total_frames": 10,
        "total_tasks": 2,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 10,
        "splits": {"train": "0:3"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    assert info["features"][STATE] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    assert info["features"]["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
    assert info["features"][TOP]["info"] == {
        "video.height": HEIGHT,
        "video.width": WIDTH,
        "video.codec": "av1",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": 10,
        "video.channels": 3,
        "has_audio": False,
    }
    rows = read_episodes(root)
    assert [row["tasks"] for row in rows] == [[task] for task in TASKS]
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 5), (5, 6), (6, 10)]
    assert np.shape(rows[0][f"stats/{TOP}/mean"]) == (3, 1, 1)
    assert rows[0]["stats/reward/count"] == [5]


def test_tasks_of_each_frame(tmp_path):
    pandas = pytest.importorskip("pandas")
    tasks = ["reach", "reach", "grasp", "lift", "grasp"]
    with DatasetWriter(tmp_path / "dataset", 10, {STATE: make_features()[STATE]}) as writer:
        writer.add_episode({STATE: EPISODES[2][STATE]}, "lift")
        writer.add_episode({STATE: EPISODES[0][STATE]}, tasks)
    frame = pandas.read_parquet(tmp_path / "dataset" / "meta" / "tasks.parquet")
    assert list(frame.index) == ["lift", "reach", "grasp"] and frame.index.name == "task"
    assert frame["task_index"].tolist() == [0, 1, 2] and frame["task_index"].dtype == np.int64
    assert read_episodes(tmp_path / "dataset")[1]["tasks"] == ["reach", "grasp", "lift"]
    table = pq.read_table(tmp_path / "dataset" / "data" / "chunk-000" / "file-000.parquet")
    assert table["task_index"].to_pylist() == [0, 0, 0, 0, 1, 1, 2, 0, 2]


@pytest.mark.parametrize("codec", CODECS)
def test_full_files_and_chunks_are_followed_by_new_ones(tmp_path, codec, monkeypatch):
    monkeypatch.setattr(writer_module, "EPISODES_PER_ROW_GROUP", 1)
    limits = {"data_files_size_in_mb": 1e-6, "video_files_size_in_mb": 1e-6, "chunks_size": 2}
    root = write(tmp_path / "dataset", codec=codec, **limits)
    places = [(0, 0), (0, 1), (1, 0)]
    rows = read_episodes(root)
    for prefix in ("data", "meta/episodes", f"videos/{TOP}", f"videos/{WRIST}"):
        assert [(row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]) for row in rows] == places
    assert [row[f"videos/{TOP}/from_timestamp"] for row in rows] == [0, 0, 0]
    for (chunk, file), length in zip(places, LENGTHS, strict=True):
        assert len(decode(root / "videos" / TOP / f"chunk-{chunk:03d}" / f"file-{file:03d}.mp4")[0]) == length
    assert len(list(root.rglob("*.parquet"))) == 3 + 3 + 1


def test_files_stay_below_their_limit(tmp_path):
    limits = {"data/*/*.parquet": 0.12, "videos/*/*/*.mp4": 0.02}
    rng = np.random.default_rng(0)
    with DatasetWriter(
        tmp_path / "dataset", 10, make_features("video") | {WRIST: make_features("image")[WRIST]}, codec="h264",
        data_files_size_in_mb=limits["data/*/*.parquet"], video_files_size_in_mb=limits["videos/*/*/*.mp4"],
    ) as writer:  # fmt: skip
        for seed in range(6):
            noise = rng.integers(0, 255, (6, HEIGHT, WIDTH, 3), np.uint8)
            writer.add_episode(make_episode(seed, 6) | {TOP: noise, WRIST: noise}, "shake")
    for pattern, limit in limits.items():
        sizes = [file.stat().st_size for file in (tmp_path / "dataset").glob(pattern)]
        assert 1 < len(sizes) < 6 and max(sizes) < 1.2 * limit * 2**20


def test_frames_are_streamed(tmp_path):
    """A generator's frames are gone soon after they have been encoded."""
    alive, most = [], 0

    class Frame(np.ndarray):
        """A subclass of arrays can be referenced weakly."""

    def frames():
        nonlocal most
        for t in range(40):
            frame = np.full((HEIGHT, WIDTH, 3), t, np.uint8).view(Frame)
            alive.append(weakref.ref(frame))
            most = max(most, sum(reference() is not None for reference in alive))
            yield frame

    with DatasetWriter(
        tmp_path / "dataset", 10, {k: make_features()[k] for k in (ACTION, TOP)}, codec="h264"
    ) as writer:
        writer.add_episode({TOP: frames(), ACTION: np.zeros((40, 2), np.float32)}, "wait")
    assert most <= 3
    assert len(decode(tmp_path / "dataset" / "videos" / TOP / "chunk-000" / "file-000.mp4")[0]) == 40


@pytest.mark.parametrize("codec", CODECS)
def test_encoders_are_quiet(tmp_path, capfd, codec):
    av.logging.restore_default_callback()  # as lerobot does: FFmpeg then writes to stderr itself
    write(tmp_path / "dataset", codec=codec)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("episode", "task", "message"),
    [
        (EPISODES[0] | {"reach": [1] * 5}, "go", r"\['reach'\], but the dataset's features are"),
        ({k: v for k, v in EPISODES[0].items() if k != ACTION}, "go", r"lacks \['action'\]"),
        (
            EPISODES[0] | {ACTION: np.zeros((4, 2), np.float32)},
            "go",
            r"observation.state has 5 frames, but action has 4",
        ),
        (EPISODES[0] | {ACTION: np.zeros((5, 3), np.float32)}, "go", r"action has shape \(5, 3\); expected \(5, 2\)"),
        (EPISODES[0] | {ACTION: np.zeros((5, 2))}, "go", r"action has dtype float64; .*astype\('float32'\)"),
        (EPISODES[0] | {"note": "abcde"}, "go", "note is not a sequence of strings; pass 5"),
        (EPISODES[0] | {"note": [1, 2, 3, 4, 5]}, "go", "note is not a sequence of strings; pass 5"),
        (EPISODES[0] | {TOP: EPISODES[0][TOP] / 255}, "go", r"top: frame 0 is float64 .*expected uint8 \[48, 64, 3\]"),
        (EPISODES[0] | {TOP: EPISODES[0][TOP][:, :40]}, "go", r"top: frame 0 is uint8 \[40, 64, 3\]"),
        (EPISODES[0] | {WRIST: EPISODES[0][WRIST][:4] + [None]}, "go", "wrist: frame 4 is object"),
        (EPISODES[0] | {WRIST: 3}, "go", "wrist is int; expected an array or an iterable of 5 frames"),
        ({k: v[:0] for k, v in EPISODES[0].items()}, "go", "the episode is empty: observation.state has 0"),
        (EPISODES[0], " ", "task of frame 0 is ' '"),
        (EPISODES[0], ["go"] * 4, "task has 4 instructions for 5 frames"),
        (EPISODES[0], ["go"] * 4 + [None], "task of frame 4 is None"),
    ],
)
def test_bad_episode_is_refused_and_the_next_is_written(tmp_path, episode, task, message):
    with DatasetWriter(tmp_path / "dataset", 10, make_features(), codec="h264") as writer:
        with pytest.raises(ValueError, match=message):
            writer.add_episode(episode, task)
        writer.add_episode(EPISODES[2], TASKS[2])
    assert [row["length"] for row in read_episodes(tmp_path / "dataset")] == [4]
    assert len(decode(tmp_path / "dataset" / "videos" / TOP / "chunk-000" / "file-000.mp4")[0]) == 4


def test_length_is_needed(tmp_path):
    with (
        pytest.raises(ValueError, match="length of the episode is unknown"),
        DatasetWriter(tmp_path / "dataset", 10, {TOP: make_features()[TOP]}) as writer,
    ):
        writer.add_episode({TOP: iter(EPISODES[0][TOP])}, "go")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (EPISODES[0][TOP][:3], "yields 3 frames, but the episode has 5"),
        (np.concatenate([EPISODES[0][TOP]] * 2), "yields more than the 5 frames"),
        ([*EPISODES[0][TOP][:4], EPISODES[0][TOP][4, :40]], "frame 4 is uint8"),
    ],
)
def test_partly_written_episode_makes_the_dataset_unusable(tmp_path, frames, message):
    episode = EPISODES[0] | {TOP: iter(frames)}
    with (
        pytest.raises(RuntimeError, match="episode 1 .* was only partially written"),
        DatasetWriter(tmp_path / "dataset", 10, make_features(), codec="h264") as writer,
    ):
        writer.add_episode(EPISODES[1], "go")
        with pytest.raises(ValueError, match=message):
            writer.add_episode(episode, "go")
        with pytest.raises(RuntimeError, match="only partially written"):
            writer.add_episode(EPISODES[2], "go")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", CODECS)
def test_exception_leaves_nothing_and_a_second_try_works(tmp_path, codec):
    with pytest.raises(KeyError), DatasetWriter(tmp_path / "dataset", 10, make_features(), codec=codec) as writer:
        writer.add_episode(EPISODES[0], "go")
        raise KeyError
    assert not list(tmp_path.iterdir())
    write(tmp_path / "dataset", codec=codec)
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path / "dataset", codec=codec)
    assert len(read_episodes(tmp_path / "dataset")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_dataset_without_episodes_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="would have no episodes"),
        DatasetWriter(tmp_path / "dataset", 10, make_features()),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"codec": "mpeg4"}, r"codec is 'mpeg4'; choose one of \['libsvtav1'"),
        ({"gop": 0}, "gop is 0"),
        ({"chunks_size": 0}, "chunks_size is 0"),
        ({"codec": "h264", "preset": "quick"}, "libx264 does not encode 48x64 frames at 10 fps .*'preset': 'quick'"),
        ({"features": {}}, "features is empty"),
        ({"features": {"index": {"dtype": "int64", "shape": (1,)}}}, "index is one of .*leave it out"),
        ({"features": {"a/b": {"dtype": "int64", "shape": (1,)}}}, "'a/b' is empty or contains"),
        ({"features": {"a": {"dtype": "uint8", "shape": (1,)}}}, "a has dtype 'uint8'; choose one of"),
        ({"features": {"a": {"dtype": "float32", "shape": (2, 2)}}}, r"a has dtype float32 and shape \(2, 2\)"),
        ({"features": {"a": {"dtype": "string", "shape": (2,)}}}, r"expected shape \(1,\)"),
        ({"features": {"a": {"dtype": "image", "shape": (3, 48, 64)}}}, r"expected shape \(H, W, 3\)"),
        (
            {"features": {"a": {"dtype": "video", "shape": (47, 64, 3)}}},
            "frames of 47x64 pixels; .*even height and width",
        ),
        ({"codec": "hevc", "features": {"a": {"dtype": "video", "shape": (64, 48, 3)}}}, "a is 48 pixels wide, too"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    arguments = {"fps": 10, "features": make_features()} | settings
    with pytest.raises(ValueError, match=message), DatasetWriter(tmp_path / "dataset", **arguments):
        pass
    assert not list(tmp_path.iterdir())


def test_odd_sizes_can_be_embedded(tmp_path):
    with DatasetWriter(tmp_path / "dataset", 10, make_features("image", (7, 9))) as writer:
        writer.add_episode(make_episode(0, 3, (7, 9)), "look")
    assert len(read_episodes(tmp_path / "dataset")) == 1


def test_non_finite_values_are_kept_and_left_out_of_the_statistics(tmp_path):
    states = np.array([[1, np.nan, 5], [2, np.nan, np.inf], [6, np.nan, 7]], np.float32)
    other = np.array([[3, 4, 9]], np.float32)
    with DatasetWriter(tmp_path / "dataset", 10, {STATE: make_features()[STATE]}) as writer:
        for episode in (states, other):
            writer.add_episode({STATE: episode}, "go")
    table = pq.read_table(tmp_path / "dataset" / "data" / "chunk-000" / "file-000.parquet")
    np.testing.assert_array_equal(np.array(table[STATE].to_pylist()), np.concatenate([states, other]))
    stats = read_json(tmp_path / "dataset", "stats.json")[STATE]
    assert stats["min"] == [1, 4, 5] and stats["max"] == [6, 4, 9] and stats["mean"] == [3, 4, 7]
    np.testing.assert_allclose(stats["std"], [np.std([1, 2, 6, 3]), 0, np.std([5, 7, 9])])
    first = read_episodes(tmp_path / "dataset")[0]
    np.testing.assert_array_equal(first[f"stats/{STATE}/q50"], [2, np.nan, 5])


def test_pixel_statistics_are_exact(tmp_path):
    frames = np.random.default_rng(0).integers(0, 200, (7, 12, 16, 3), np.uint8)
    with DatasetWriter(tmp_path / "dataset", 10, {TOP: make_features("image", (12, 16))[TOP]}) as writer:
        for episode in (frames[:3], frames[3:]):
            writer.add_episode({TOP: episode}, "go")
    stats = {name: np.squeeze(x) for name, x in read_json(tmp_path / "dataset", "stats.json")[TOP].items()}
    pixels = frames.reshape(-1, 3) / 255
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats[name], getattr(np, name)(pixels, axis=0), rtol=1e-12)
    assert stats["count"] == 7


# Against lerobot


def load(root, **options):
    pytest.importorskip("lerobot")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("tests/written", root, video_backend="pyav", **options)


@pytest.mark.parametrize(
    ("fps", "camera_type", "options"),
    [
        (10, "video", {"codec": "libsvtav1"}),
        (30, "video", {"codec": "h264", "video_files_size_in_mb": 1e-6, "chunks_size": 2}),
        (50, "video", {"codec": "hevc", "data_files_size_in_mb": 1e-6, "chunks_size": 1}),
        (29.97, "video", {"codec": "libsvtav1", "video_files_size_in_mb": 1e-6}),
        (10, "image", {"data_files_size_in_mb": 1e-6, "chunks_size": 2}),
        (29.97, "image", {}),
    ],
)
def test_lerobot_reads_it(tmp_path, fps, camera_type, options):
    root = write(tmp_path / "dataset", fps, camera_type, **options)
    dataset = load(root, delta_timestamps={ACTION: [0, 1 / fps, 2 / fps], STATE: [-1 / fps, 0]})
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (3, 10, fps)
    assert dataset.meta.robot_type == "aloha"
    index = 0
    for number, episode in enumerate(EPISODES):
        for t in range(LENGTHS[number]):
            item, last = dataset[index], LENGTHS[number] - 1
            ahead = np.arange(t, t + 3)
            np.testing.assert_array_equal(item[ACTION], episode[ACTION][np.minimum(ahead, last)])
            np.testing.assert_array_equal(item[f"{ACTION}_is_pad"], ahead > last)
            np.testing.assert_array_equal(item[STATE], episode[STATE][[max(t - 1, 0), t]])
            np.testing.assert_array_equal(item[f"{STATE}_is_pad"], [t == 0, False])
            for key in ("reward", "success", "count"):
                assert item[key].item() == np.ravel(episode[key])[t]
            assert item["note"] == episode["note"][t]
            assert item["task"] == TASKS[number]
            assert (item["episode_index"], item["frame_index"], item["index"]) == (number, t, index)
            for camera in (TOP, WRIST):
                pixels = item[camera].permute(1, 2, 0).numpy() * 255
                assert distance(pixels, episode[camera][t]) < (5 if camera_type == "video" else 1e-4)
            index += 1
    written = read_json(root, "stats.json")
    for key, stats in dataset.meta.stats.items():
        for name, values in stats.items():
            np.testing.assert_array_equal(values, written[key][name])


def lerobot_stats(root, features, episodes):
    """Statistics of a dataset that lerobot writes: aggregated, and by episode."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset.create("tests/recorded", 10, features, root=root, use_videos=False)
    for episode in episodes:
        for t in range(len(episode[STATE])):
            dataset.add_frame({key: values[t] for key, values in episode.items()} | {"task": "go"})
        dataset.save_episode()
    dataset.finalize()
    return read_json(root, "stats.json"), read_episodes(root)


@pytest.mark.parametrize(
    ("lengths", "size"), [((110, 4), (12, 16)), ((3,), (200, 304))], ids=["sampled frames", "sampled pixels"]
)
def test_statistics_are_those_of_lerobot(tmp_path, lengths, size):
    lerobot = pytest.importorskip("lerobot")
    features = {key: make_features("image", size)[key] for key in (STATE, ACTION, "force", "buttons", TOP)}
    rng = np.random.default_rng(0)
    episodes = [{key: make_episode(seed, n, size)[key] for key in features} for seed, n in enumerate(lengths)]
    for episode in episodes:
        episode[TOP] = rng.integers(20, 230, episode[TOP].shape, np.uint8) // [1, 2, 3]
        episode[TOP] = episode[TOP].astype(np.uint8)
        episode[STATE][:, 1] = 0.25  # constant
    with DatasetWriter(tmp_path / "ours", 10, features) as writer:
        for episode in episodes:
            writer.add_episode(episode, "go")
    theirs, their_rows = lerobot_stats(tmp_path / "theirs", features, episodes)
    ours, our_rows = read_json(tmp_path / "ours", "stats.json"), read_episodes(tmp_path / "ours")
    pairs = [(f"{key}/{name}", ours[key][name], theirs[key][name]) for key in theirs for name in theirs[key]]
    for our_row, their_row in zip(our_rows, their_rows, strict=True):
        assert list(our_row) == list(their_row)
        pairs += [(name, our_row[name], their_row[name]) for name in their_row if name.startswith("stats/")]
    assert {name.split("/")[-1] for name, _, _ in pairs} == set(writer_module.episode_stats.NAMES)
    for name, our, their in pairs:
        key = name.removeprefix("stats/").split("/")[0]
        spread = np.max(theirs[key]["max"]) - np.min(theirs[key]["min"])
        if name.endswith(tuple(writer_module.episode_stats.QUANTILES)):
            np.testing.assert_allclose(our, their, rtol=0, atol=spread / 5000 + 1e-9, err_msg=name)
        elif name.endswith(f"{TOP}/std"):  # lerobot squares in 8 bits before 0.6, and adds up in float32 since
            if Version(lerobot.__version__) >= Version("0.6"):
                np.testing.assert_allclose(our, their, rtol=1e-3, err_msg=name)
        else:
            np.testing.assert_allclose(our, their, rtol=1e-6, atol=1e-6, err_msg=name)
        assert np.shape(our) == np.shape(their), name
