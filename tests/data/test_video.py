"""Frames of video files: the right ones, in any order, from any codec; damage is named."""

import itertools
import threading

import av
import numpy as np
import pytest
from helpers import edits, synthetic

from wallx_jax.data import fetch, video
from wallx_jax.data.errors import FrameError
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import read_info
from wallx_jax.data.video import VideoFile, VideoReader, decode_in_order, read_frame, read_video

HIGH, WRIST = synthetic.CAMERAS
FPS, COUNT = 10, 40
CODECS = {
    "libsvtav1": {"crf": "30"},
    "libx264": {"crf": "20", "bf": "2"},
    "libx265": {"crf": "20", "x265-params": "log-level=none"},
}


def picture(number: int) -> np.ndarray:
    """uint8 [48, 64, 3]: the number is written in squares of 8 pixels, which lossy video keeps."""
    bits = np.array([number >> i & 1 for i in range(8)], np.uint8)
    return np.broadcast_to(np.kron(bits, np.ones((48, 8), np.uint8))[..., None] * 180 + 30, (48, 64, 3)).copy()


def number(image: np.ndarray) -> int:
    return int(((image[20:28, 4::8].mean(axis=(0, 2)) > 120) << np.arange(8)).sum())


def write_video(file, codec="libsvtav1", gop=2, fps=FPS, count=COUNT, start=0, pix_fmt="yuv420p"):
    with av.open(str(file), "w") as out:
        stream = out.add_stream(codec, rate=fps, options=CODECS.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, pix_fmt, gop
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts = start + i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file


@pytest.fixture(autouse=True)
def quiet_encoders(monkeypatch):
    monkeypatch.setenv("SVT_LOG", "1")


@pytest.mark.parametrize("gop", [1, 2, 12, 250])
@pytest.mark.parametrize("codec", CODECS)
def test_any_frame_of_any_codec(codec, gop, tmp_path):
    file = write_video(tmp_path / "video.mp4", codec, gop)
    order = np.random.default_rng(gop).permutation(COUNT)
    one_by_one = VideoFile(file, FPS)
    for wanted in (*order, *order[:3], 0, COUNT - 1, 0):
        assert number(one_by_one.read(wanted / FPS)) == wanted
    with av.open(str(file)) as reference:
        decoded = [frame.to_ndarray(format="rgb24") for frame in reference.decode(video=0)]
    in_order = VideoFile(file, FPS)
    for wanted in order:
        np.testing.assert_array_equal(one_by_one.read(wanted / FPS), decoded[wanted])
    for wanted in range(COUNT):
        np.testing.assert_array_equal(in_order.read(wanted / FPS), decoded[wanted])


def test_near_frames_are_decoded_without_seeking(tmp_path, monkeypatch):
    seeks = []
    real = VideoFile._seek
    monkeypatch.setattr(VideoFile, "_seek", lambda self, seconds: seeks.append(seconds) or real(self, seconds))
    file = VideoFile(write_video(tmp_path / "video.mp4"), FPS)
    for wanted in (0, 1, 1, 2, 4, 5):
        assert number(file.read(wanted / FPS)) == wanted
    assert len(seeks) == 1
    assert number(file.read(3.0)) == 30 and len(seeks) == 2, "with a key frame every second frame"
    assert number(file.read(2.9)) == 29 and len(seeks) == 3
    sparse = VideoFile(write_video(tmp_path / "sparse.mp4", gop=250), FPS)
    assert [number(sparse.read(wanted / FPS)) for wanted in (20, 30)] == [20, 30] and len(seeks) == 4


@pytest.mark.parametrize("offset", [-0.049, -0.02, 0.02, 0.049])
def test_times_within_half_a_frame(tmp_path, offset):
    file = VideoFile(write_video(tmp_path / "video.mp4"), FPS)
    for wanted in (7, 8, 30, 2, COUNT - 1):
        assert number(file.read(wanted / FPS + offset)) == wanted


@pytest.mark.parametrize("times", [2, 3, 4, 5, 10])
def test_the_nearest_of_more_frames_than_the_dataset_has(tmp_path, times):
    file = VideoFile(write_video(tmp_path / "video.mp4", fps=times * FPS), FPS)
    wanted = range(COUNT // times)
    for place in (*wanted, *np.random.default_rng(0).permutation(len(wanted)), 0):
        for offset in (0.0, 0.001, -0.001):
            assert number(file.read(place / FPS + offset)) == times * place


@pytest.mark.parametrize("matrix, code", [("bt709", 1), ("smpte170m", 6), (None, 2)])
@pytest.mark.parametrize("full_range", [False, True])
def test_colors_of_tagged_videos(tmp_path, matrix, code, full_range):
    """Every tag gives the colors that were recorded; a video without one counts as BT.601."""
    color, file = np.array([200, 40, 30]), tmp_path / "video.mp4"
    red, blue = (0.2126, 0.0722) if matrix == "bt709" else (0.299, 0.114)
    luma = np.array([red, 1 - red - blue, blue]) @ color
    chroma = [(color[2] - luma) / (2 - 2 * blue), (color[0] - luma) / (2 - 2 * red)]
    y, (u, v) = (luma, chroma) if full_range else (16 + luma * 219 / 255, np.array(chroma) * 224 / 255)
    planes = np.concatenate([np.full(48 * 64, y), np.full(24 * 32, 128 + u), np.full(24 * 32, 128 + v)]).round()
    with av.open(str(file), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = code
        stream.codec_context.color_range = 2 if full_range else 1
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(planes.astype(np.uint8).reshape(72, 64), format="yuv420p")
            frame.pts, frame.colorspace, frame.color_range = i, code, 2 if full_range else 1
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    for image in (VideoFile(file, FPS).read(0.1), read_video(file, FPS)[0][1]):
        np.testing.assert_allclose(image.reshape(-1, 3).mean(axis=0), color, atol=3)


def test_a_frame_that_is_not_there(tmp_path):
    file = VideoFile(write_video(tmp_path / "video.mp4"), FPS)
    for seconds in (COUNT / FPS, 100.0, -0.1):
        with pytest.raises(ValueError, match=f"video.mp4 has no frame at {seconds:.3f} s"):
            file.read(seconds)
        assert number(file.read(1.0)) == 10, "and it can be read from afterwards"


def test_a_stream_that_begins_late(tmp_path):
    file = VideoFile(write_video(tmp_path / "video.mkv", "libx264", start=5), FPS)
    assert number(file.read(0.5)) == 0
    with pytest.raises(ValueError, match="no frame at 0.000 s"):
        file.read(0.0)


def test_damage_inside_a_file_never_gives_another_picture(tmp_path):
    """Bytes are overwritten in the middle: each frame is right, or an error. (In AV1 what is left may by chance be a
    stream without faults: no codec has checksums.)"""
    for codec in ("libx264", "libx265"):
        path = write_video(tmp_path / f"{codec}.mp4", codec, gop=4)
        content = bytearray(path.read_bytes())
        start = len(content) // 2
        content[start : start + 40] = bytes(40)
        path.write_bytes(content)
        file, failed = VideoFile(path, FPS), 0
        for wanted in range(COUNT):
            try:
                found = number(file.read(wanted / FPS))
            except (ValueError, av.FFmpegError):
                failed += 1
            else:
                assert found == wanted
        assert failed < COUNT


@pytest.mark.parametrize(("content", "message"), [
    (b"", "cannot be opened as a video"), (b"not a video" * 100, "cannot be opened as a video"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
])  # fmt: skip
def test_what_is_no_video(tmp_path, content, message):
    file = tmp_path / "video.mp4"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"video.mp4 {message}"):
        VideoFile(file, FPS)


def test_a_sound_file_is_no_video(tmp_path):
    file = tmp_path / "sound.mp4"
    with av.open(str(file), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        out.mux(stream.encode(frame)), out.mux(stream.encode())
    with pytest.raises(ValueError, match="has no video stream"):
        VideoFile(file, FPS)


def test_depth_maps_are_refused(tmp_path):
    file = tmp_path / "depth.mkv"
    with av.open(str(file), "w") as out:
        stream = out.add_stream("ffv1", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "gray12le"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64), np.uint16), format="gray12le")
        out.mux(stream.encode(frame)), out.mux(stream.encode())
    with pytest.raises(ValueError, match=r"holds depth maps \(gray12le\); choose a color camera"):
        VideoFile(file, FPS)


def test_gray_videos_become_rgb(tmp_path):
    image = VideoFile(write_video(tmp_path / "gray.mkv", "ffv1", pix_fmt="gray"), FPS).read(0.5)
    assert image.shape == (48, 64, 3) and number(image) == 5 and (image == image[..., :1]).all()


def test_the_number_of_open_decoders_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "OPEN_VIDEOS", 3)
    monkeypatch.setattr(VideoReader, "_open", type(VideoReader._open)())
    files = [write_video(tmp_path / f"{i}.mp4", "libx264", count=4) for i in range(5)]
    one, other = VideoReader(FPS), VideoReader(FPS)
    for reader, file in itertools.product((one, other), files * 2):
        assert number(reader.read(file, 0.2)) == 2
        assert len(VideoReader._open) <= 3


def test_a_replaced_file_is_opened_anew_by_a_new_reader(tmp_path):
    file = write_video(tmp_path / "video.mp4", "libx264")
    assert number(VideoReader(FPS).read(file, 1.0)) == 10
    write_video(file, "libx264", fps=3 * FPS)
    assert number(VideoReader(FPS).read(file, 1.0)) == 30


def test_threads_share_a_reader(tmp_path):
    files = [write_video(tmp_path / f"{i}.mp4", "libx264", gop=5) for i in range(2)]
    reader, wrong = VideoReader(FPS), []

    def read(seed):
        for wanted in np.random.default_rng(seed).integers(COUNT, size=30).tolist():
            if number(reader.read(files[wanted % 2], wanted / FPS)) != wanted:
                wrong.append(wanted)

    threads = [threading.Thread(target=read, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture(scope="module")
def several_files(tmp_path_factory):
    """A dataset whose episodes are spread over video files and chunks."""
    root = tmp_path_factory.mktemp("several") / "several"
    return synthetic.write_dataset(root, video_files_size_in_mb=1e-6, chunks_size=3, data_files_size_in_mb=1e-6)


def test_decoding_in_order(several_files, dataset_info):
    for info in (read_info(several_files), dataset_info, read_info(several_files, episodes="1,3")):
        frames, images = zip(*decode_in_order(info, WRIST), strict=True)
        assert list(frames) == list(range(info.num_frames))
        for frame, image in zip(frames, images, strict=True):
            episode, place = info.locate(frame)
            expected = synthetic.frame_image(int(info.episode_numbers[episode]), int(place), WRIST)
            assert np.abs(image.astype(int) - expected).mean() < 8
            np.testing.assert_array_equal(read_frame(info, WRIST, frame), image)
    assert len({path.name for path in (several_files / "videos" / WRIST).rglob("*.mp4")}) == 3


def test_decoding_in_order_names_what_fails(several_files, tmp_path):
    info = read_info(several_files)
    file = several_files / info.video_file(HIGH, 0, 1)
    content = file.read_bytes()
    try:
        file.write_bytes(content[: len(content) // 2])
        decoded = decode_in_order(info, HIGH)
        assert [frame for frame, _ in itertools.islice(decoded, 7)] == list(range(7))
        with pytest.raises(FrameError, match=f"several: episode 1, frame 0: {HIGH} cannot be read from {file}"):
            next(decoded)
    finally:
        file.write_bytes(content)


def test_one_frame_of_an_image_dataset(tmp_path):
    root = synthetic.write_dataset(tmp_path / "images", camera_type="image")
    info = read_info(root)
    np.testing.assert_array_equal(read_frame(info, HIGH, 9), synthetic.frame_image(1, 2, HIGH))
    with pytest.raises(ValueError, match="no camera 'top'"):
        read_frame(info, "top", 0)


def test_a_video_for_the_vlm(tmp_path):
    file = write_video(tmp_path / "video.mp4", "libx264")
    frames, rate = read_video(file, 5)
    assert [number(frame) for frame in frames] == list(range(0, COUNT, 2)) and rate == 5
    frames, rate = read_video(file, 100)
    assert len(frames) == COUNT and rate == FPS
    with pytest.raises(ValueError, match="fps is 0"):
        read_video(file, 0)
    with pytest.raises(FileNotFoundError, match="none.mp4 is missing"):
        read_video(tmp_path / "none.mp4", 5)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4 cannot be opened as a video"):
        read_video(tmp_path / "text.mp4", 5)


@pytest.mark.parametrize("camera_type", ["video", "image"])
@pytest.mark.parametrize("selected", [None, "1:3"])
def test_a_frame_that_does_not_exist_is_refused(tmp_path, camera_type, selected):
    """Episodes share files: the frames before the first and after the last selected one are in them, too."""
    info = read_info(synthetic.write_dataset(tmp_path / "data", camera_type=camera_type), episodes=selected)
    for frame in (-1, info.num_frames, info.num_frames + 5):
        message = f"data: frame {frame} is asked for, but the {info.num_episodes} episodes in use have "
        with pytest.raises(ValueError, match=f"{message}{info.num_frames} frames, 0 to {info.num_frames - 1}$"):
            read_frame(info, HIGH, frame)
        if camera_type == "video":
            with pytest.raises(ValueError, match=message):
                list(decode_in_order(info, HIGH, [0, frame]))


def test_videos_are_found_where_info_json_says(tmp_path):
    info = read_info(synthetic.write_dataset(tmp_path / "data"))
    expected = [read_frame(info, HIGH, frame) for frame in (0, 7)]
    moved = "clips/{file_index}_{chunk_index:02d}/{video_key}.mkv.mp4"
    for camera in synthetic.CAMERAS:
        for file in fetch.video_files(info, camera):
            target = info.root / moved.format(video_key=camera, chunk_index=0, file_index=0)
            target.parent.mkdir(parents=True, exist_ok=True)
            (info.root / file).rename(target)
    edits.edit_info(info.root, lambda content: content.update(video_path=moved))
    info = read_info(info.root)
    for frame, image in zip((0, 7), expected, strict=True):
        np.testing.assert_array_equal(read_frame(info, HIGH, frame), image)
        np.testing.assert_array_equal(LeRobotSource(info, 2, [HIGH])[frame].images[0], image)
    assert [frame for frame, _ in decode_in_order(info, HIGH)] == list(range(info.num_frames))
    assert fetch.video_files(info, WRIST) == [moved.format(video_key=WRIST, chunk_index=0, file_index=0)]
