"""Images in the tables: all color modes become RGB, depth and damage are refused."""

import io

import edits
import numpy as np
import pyarrow.parquet as pq
import pytest
import synthetic
from PIL import Image

from wallx_jax.data.errors import FrameError
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import read_info
from wallx_jax.data.pictures import ImageColumns, decode

HIGH = next(iter(synthetic.CAMERAS))
RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    return synthetic.write_dataset(tmp_path / "images", camera_type="image")


def test_color_modes(tmp_path):
    image = Image.fromarray(RGB)
    np.testing.assert_array_equal(decode({"bytes": encode(image), "path": None}, tmp_path), RGB)
    np.testing.assert_array_equal(decode(encode(image), tmp_path), RGB)
    rgba = image.copy()
    rgba.putalpha(7)
    np.testing.assert_array_equal(decode(encode(rgba), tmp_path), RGB)
    gray = image.convert("L")
    for mode in (gray, gray.convert("LA")):
        np.testing.assert_array_equal(decode(encode(mode), tmp_path), np.repeat(np.asarray(gray)[..., None], 3, axis=2))
    palette = image.quantize(16)
    np.testing.assert_array_equal(decode(encode(palette), tmp_path), np.asarray(palette.convert("RGB")))
    assert set(np.unique(decode(encode(gray.convert("1")), tmp_path))) == {0, 255}
    jpeg = encode(image, "JPEG")
    np.testing.assert_array_equal(decode(jpeg, tmp_path), np.asarray(Image.open(io.BytesIO(jpeg))))


def test_images_in_files(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(RGB).save(tmp_path / "images/0.png")
    np.testing.assert_array_equal(decode({"bytes": None, "path": "images/0.png"}, tmp_path), RGB)
    with pytest.raises(FileNotFoundError):
        decode({"bytes": None, "path": "images/1.png"}, tmp_path)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_depth_is_refused(tmp_path, kind):
    image = Image.fromarray(np.ones((20, 30), kind))
    with pytest.raises(ValueError, match=f"mode {image.mode} is a depth map"):
        decode(encode(image, "TIFF"), tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "there is no image in this row"),
        ({"bytes": None, "path": None}, "there is no image in this row"),
        (b"not an image", "these bytes are no image"),
        (encode(Image.fromarray(RGB))[:200], "truncated|damaged"),
    ],
)
def test_damage(tmp_path, value, message):
    with pytest.raises((ValueError, OSError), match=message):
        decode(value, tmp_path)


def test_frames_of_a_dataset(root):
    source = LeRobotSource(read_info(root), 2, [HIGH])
    for i in np.random.default_rng(0).permutation(len(source)):
        sample = source[int(i)]
        np.testing.assert_array_equal(sample.images[0], synthetic.frame_image(sample.episode, sample.frame, HIGH))


def test_rows_in_any_order_and_row_groups_of_any_size(root):
    order = np.random.default_rng(1).permutation(sum(synthetic.LENGTHS))
    table = pq.read_table(root / edits.DATA).take(order)
    pq.write_table(table, root / edits.DATA, row_group_size=4)
    source = LeRobotSource(read_info(root), 2, [HIGH])
    for i in range(len(source)):
        sample = source[i]
        np.testing.assert_array_equal(sample.images[0], synthetic.frame_image(sample.episode, sample.frame, HIGH))


def test_a_row_group_is_read_once_for_neighbours(root, monkeypatch):
    source, read = LeRobotSource(read_info(root), 2, [HIGH]), []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, *a: read.append(a) or real(self, *a))
    for i in (*range(len(source)), 3):
        source[i]
    assert [group for group, _ in read] == [0, 1, 2, 3, 0]


def test_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("wallx_jax.data.pictures.OPEN_TABLES", 2)
    root = synthetic.write_dataset(tmp_path / "images", camera_type="image", data_files_size_in_mb=1e-6)
    reader = ImageColumns(root)
    for episode in (0, 1, 2, 3, 0):
        image = reader.read(root / f"data/chunk-000/file-00{episode}.parquet", HIGH, 2)
        np.testing.assert_array_equal(image, synthetic.frame_image(episode, 2, HIGH))
        assert len(reader._files) <= 2


def test_a_damaged_image_is_named(root):
    values = edits.column(root, edits.DATA, HIGH)
    values[8] = {"bytes": values[8]["bytes"][:60], "path": None}
    edits.set_column(root, edits.DATA, HIGH, values)
    source = LeRobotSource(read_info(root), 2, [HIGH])
    with pytest.raises(FrameError, match=f"images: episode 1, frame 1: {HIGH} cannot be read from .*file-000.parquet"):
        source[8]
    source[7], source[9]
