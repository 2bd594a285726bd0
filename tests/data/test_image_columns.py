"""Images in the tables: all color modes become RGB, depth and damage are refused."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import edits, synthetic
from PIL import Image

from wallx_jax.data.errors import DatasetError, FrameError
from wallx_jax.data.image_columns import ImageColumns, decode, linked_files
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import read_info

HIGH = next(iter(synthetic.CAMERAS))
FIELDS = [("bytes", pa.binary()), ("path", pa.string())]
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


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photographs_are_turned_as_they_say(tmp_path, orientation):
    upright = Image.fromarray(np.kron(RGB[::4, ::5] // 64 * 64, np.ones((8, 8, 1), np.uint8)))
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(turn[orientation]) if turn[orientation] is not None else upright
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    stored.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(file.getvalue(), tmp_path), np.asarray(upright))


def column(root, change):
    """Changes the column of a camera."""
    values = edits.column(root, edits.DATA, HIGH)

    def edit(table):
        array = change(values)
        return table.set_column(table.column_names.index(HIGH), HIGH, array)

    edits.edit_table(root, edits.DATA, edit)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: pa.array([[1, 2]] * len(rows)), "has type list<.*>; expected encoded images"),
        (lambda rows: pa.array([*rows[:-2], None, None]), "has no image in 2 rows"),
        (
            lambda rows: pa.array([{"bytes": None, "path": None}, *rows[1:]], pa.struct(FIELDS)),
            "has no image in 1 rows",
        ),
        (lambda rows: pa.array([None, *(row["bytes"] for row in rows[1:])], pa.binary()), "has no image in 1 rows"),
    ],
)
def test_columns_without_images_are_refused_when_the_dataset_is_opened(root, change, message):
    column(root, change)
    with pytest.raises(DatasetError, match=f"file-000.parquet: column '{HIGH}' {message}"):
        LeRobotSource(read_info(root), 2, [HIGH])


def test_a_table_that_lacks_a_camera(root):
    edits.edit_table(root, edits.DATA, lambda table: table.drop_columns([HIGH]))
    with pytest.raises(DatasetError, match=f"file-000.parquet lacks the column '{HIGH}'"):
        LeRobotSource(read_info(root), 2, [HIGH])


def test_a_column_of_paths(root):
    expected = LeRobotSource(read_info(root), 2, [HIGH])[5].images[0]
    (root / "images").mkdir()
    for number, row in enumerate(edits.column(root, edits.DATA, HIGH)):
        (root / f"images/{number}.png").write_bytes(row["bytes"])
    column(root, lambda rows: pa.array([f"images/{number}.png" for number in range(len(rows))]))
    np.testing.assert_array_equal(LeRobotSource(read_info(root), 2, [HIGH])[5].images[0], expected)
    assert len(linked_files(root / edits.DATA, HIGH)) == len(edits.column(root, edits.DATA, HIGH))


def test_an_image_of_another_size_than_promised(root):
    column(root, lambda rows: pa.array([*rows[:3], {"bytes": encode(Image.fromarray(RGB)), "path": None}, *rows[4:]]))
    source = LeRobotSource(read_info(root), 2, [HIGH])
    with pytest.raises(FrameError, match=r"frame 3: .*the image is 20x30 \(height x width\), but meta/info.json has"):
        source[3]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_depth_is_refused(tmp_path, kind):
    image = Image.fromarray(np.ones((20, 30), kind))
    with pytest.raises(ValueError, match=f"mode {image.mode} is a depth map"):
        decode(encode(image, "TIFF"), tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "this row has no image"),
        ({"bytes": None, "path": None}, "this row has no image"),
        (b"not an image", "the bytes are not an image"),
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
    monkeypatch.setattr("wallx_jax.data.image_columns.OPEN_TABLES", 2)
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
