import dataclasses
import os
import pickle
import shutil

import numpy as np
import pytest
from helpers import edits, synthetic

from wallx_jax.data import frame_cache
from wallx_jax.data.cameras import CameraReader
from wallx_jax.data.errors import FrameError
from wallx_jax.data.frame_cache import CachedSource
from wallx_jax.data.images import resize, target_size
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import read_info
from wallx_jax.data.pipeline import training_dataset
from wallx_jax.data.processor import ProcessorConfig
from wallx_jax.data.unreadable import SkipUnreadable

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


@pytest.mark.parametrize("wrap", [lambda cached: cached, SkipUnreadable])
def test_an_empty_split_is_named(source, tmp_path, wrap):
    cached = CachedSource(source.select([]), CONFIG, tmp_path)
    with pytest.raises(ValueError, match=f"{source.info.repo_id}: the training split has no frames"):
        training_dataset(wrap(cached), None, seed=0)


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

    monkeypatch.setattr(CameraReader, "read", lambda *_: pytest.fail("a kept frame was decoded again"))
    again = pickle.loads(pickle.dumps(CachedSource(source, CONFIG, tmp_path)))
    for i, sample in enumerate(first):
        for a, b in zip(again[i].images, sample.images, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_filling_gives_the_same_frames(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(frame_cache, "RUN", 3)  # of frames: several pieces of each file
    root = synthetic.write_dataset(tmp_path / kind, camera_type=kind, video_files_size_in_mb=1e-6)
    everything = LeRobotSource(read_info(root), 3, CAMERAS)
    CachedSource(everything, CONFIG, tmp_path).fill()
    monkeypatch.setattr(CameraReader, "read", lambda *_: pytest.fail("a kept frame was decoded again"))
    monkeypatch.setattr(CameraReader, "read_in_order", lambda *_: pytest.fail("a kept frame was decoded again"))
    cached = CachedSource(everything, CONFIG, tmp_path)
    cached.fill()
    images = [sample.images for sample in map(cached.select(np.arange(26)[::-1]).__getitem__, range(26))][::-1]
    monkeypatch.undo()
    for index, sample in enumerate(map(everything.__getitem__, range(26))):
        for image, original, resolution in zip(images[index], sample.images, RESOLUTIONS, strict=True):
            np.testing.assert_array_equal(image, resize(original, resolution))


def test_filling_goes_on_where_it_was_interrupted(source, tmp_path, monkeypatch):
    monkeypatch.setattr(frame_cache, "RUN", 2)
    decoded = []
    real = CameraReader.read_in_order

    def read(self, camera, frames):
        for frame, image in real(self, camera, frames):
            if len(decoded) == 9:
                raise KeyboardInterrupt
            decoded.append((camera, frame))
            yield frame, image

    monkeypatch.setattr(CameraReader, "read_in_order", read)
    with pytest.raises(KeyboardInterrupt):
        CachedSource(source, CONFIG, tmp_path).fill()
    monkeypatch.setattr(
        CameraReader, "read_in_order", lambda self, *a: (decoded.append((a[0], x[0])) or x for x in real(self, *a))
    )
    CachedSource(source, CONFIG, tmp_path).fill()
    assert len(decoded) == len(set(decoded)) == 2 * 26


def test_frames_that_cannot_be_decoded(dataset_dir, tmp_path):
    root = shutil.copytree(dataset_dir, tmp_path / "damaged")
    info = read_info(root)
    file = root / info.video_file(CAMERAS[1], 0, 0)
    file.write_bytes(file.read_bytes()[:-40])
    source = LeRobotSource(info, 3, CAMERAS)
    cached = CachedSource(source, CONFIG, tmp_path / "cache")
    with pytest.raises(
        FrameError, match=f"damaged: episode [0-3], frame [0-9]+: {CAMERAS[1]} cannot be read from {file}"
    ):
        cached.fill()
    cached.fill(skip_unreadable=True)
    assert cached._map("done_0.uint8").all() and not cached._map("done_1.uint8").all()
    with pytest.raises(FrameError):
        cached[25]


def test_other_sizes_have_another_cache(source, tmp_path):
    a = CachedSource(source, CONFIG, tmp_path)
    sizes = tuple((56, 56) for _ in CAMERAS)
    b = CachedSource(source, dataclasses.replace(CONFIG, image_sizes=sizes), tmp_path)
    assert a.folder != b.folder


def test_another_dataset_at_the_same_path_has_another_cache(dataset_dir, tmp_path):
    """Of the same age, and of the same size."""

    def folder(episodes=None):
        for file in root.rglob("*"):
            os.utime(file, (1e9, 1e9))
        return CachedSource(
            LeRobotSource(read_info(root, episodes=episodes), 3, CAMERAS), CONFIG, tmp_path / "c"
        ).folder

    root = shutil.copytree(dataset_dir, tmp_path / "dataset")
    first = folder()
    video = next((root / "videos").rglob("*.mp4"))
    content = bytearray(video.read_bytes())
    content[len(content) // 2] ^= 255
    video.write_bytes(content)
    assert len({first, folder(), folder("0:3")}) == 3
    video.write_bytes(next((dataset_dir / "videos").rglob("*.mp4")).read_bytes())
    assert folder() == first


def test_a_picture_that_is_replaced_has_another_cache(tmp_path):
    root = synthetic.write_dataset(tmp_path / "dataset", camera_type="image")
    (root / "images").mkdir()
    for camera in CAMERAS:
        rows = edits.column(root, edits.DATA, camera)
        for number, row in enumerate(rows):
            (root / f"images/{camera}_{number}.png").write_bytes(row["bytes"])
        links = [{"bytes": None, "path": f"images/{camera}_{number}.png"} for number in range(len(rows))]
        edits.set_column(root, edits.DATA, camera, links)

    def folder():
        return CachedSource(LeRobotSource(read_info(root), 3, CAMERAS), CONFIG, tmp_path / "c").folder

    before = folder()
    assert folder() == before
    shutil.copy(root / f"images/{CAMERAS[0]}_3.png", root / f"images/{CAMERAS[0]}_4.png")
    assert folder() != before


@pytest.mark.parametrize("taken", [0, 2], ids=["at once", "at the second camera"])
def test_a_full_disk_is_one_error_and_leaves_nothing(source, tmp_path, monkeypatch, taken):
    allocate, sizes = os.posix_fallocate, []

    def full(*arguments):
        sizes.append(arguments)
        if len(sizes) > taken:
            raise OSError(28, "No space left on device")
        allocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match="frame_cache: not enough space.*No space left.*use another disk, or lower resolution"
    ):
        CachedSource(source, CONFIG, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
