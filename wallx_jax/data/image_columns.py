"""Reads images from a dataset's tables, stored as encoded bytes or as the path of an image file."""

import io
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from wallx_jax.data import parquet
from wallx_jax.data.errors import REWRITE, DatasetError

OPEN_TABLES = 16  # maximum number of files that a reader keeps open
COLOR_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")  # 8 bits per channel


class ImageColumns:
    """Thread-safe reader for the images in table files.

    Args:
        root: folder to which the paths of image files are relative.
    """

    def __init__(self, root: Path):
        self._root, self._lock = root, threading.Lock()
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        self._groups: dict[str, tuple[Path, int, pa.Array]] = {}  # last row group read, per camera

    def read(self, file: Path, camera: str, row: int) -> np.ndarray:
        """Return the image in a row of a table file, uint8 RGB [H, W, 3].

        Raises:
            ValueError, OSError: the image is missing, damaged, or not a color image.
        """
        with self._lock:
            value = self._value(file, camera, row)
        return decode(value, self._root)

    def _value(self, file: Path, camera: str, row: int) -> Any:
        table, group = self._open(file), 0
        while row >= (count := table.metadata.row_group(group).num_rows):
            row -= count
            group += 1
        if self._groups.get(camera, ())[:2] != (file, group):
            images = table.read_row_group(group, [camera])[camera].combine_chunks()
            self._groups[camera] = (file, group, images)
        return self._groups[camera][2][row].as_py()

    def _open(self, file: Path) -> pq.ParquetFile:
        if file not in self._files:
            while len(self._files) >= OPEN_TABLES:
                self._files.popitem(last=False)
            self._files[file] = parquet.open_parquet(file)
        self._files.move_to_end(file)
        return self._files[file]


def check_column(file: Path, camera: str) -> None:
    """Check that every row of a table file has an image of a camera; reading the file's footer usually suffices.

    Raises:
        DatasetError: the column is missing, does not contain images, or has nulls.
    """
    with parquet.open_parquet(file) as table:
        names = table.schema_arrow.names
        if camera not in names:
            raise DatasetError(f"{file} lacks the column {camera!r} with its images; it has {names}")
        kind = table.schema_arrow.field(camera).type
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {"": kind}
        if not fields.keys() <= {"bytes", "path", ""} or not all(map(_holds_images, fields.values())):
            raise DatasetError(
                f"{file}: column {camera!r} is of type {kind}, not of encoded images or paths; write the dataset again"
            )
        if all(_may_be_null(table.metadata, ".".join(filter(None, (camera, name)))) for name in fields):
            values = table.read([camera])[camera].to_pylist()
            if missing := [row for row, value in enumerate(values) if _bytes_and_path(value) == (None, None)]:
                raise DatasetError(
                    f"{file}: column {camera!r} has no image in {len(missing)} rows, the first is row {missing[0]}; "
                    f"{REWRITE}"
                )


def linked_files(file: Path, camera: str) -> set[str]:
    """Return the image paths that a table file stores in place of image bytes, unchanged."""
    with parquet.open_parquet(file) as table:
        kind = table.schema_arrow.field(camera).type
        if pa.types.is_struct(kind) and not _may_be_null(table.metadata, f"{camera}.bytes"):
            return set()
        values = table.read([camera])[camera].to_pylist() if _holds_paths(kind) else []
    return {path for data, path in map(_bytes_and_path, values) if data is None and path is not None}


def _holds_images(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind) or _is_text(kind)


def _holds_paths(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _may_be_null(metadata: pq.FileMetaData, leaf: str) -> bool:
    """Return whether a column may contain nulls, judging by its Parquet statistics."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if leaf not in paths:
        return True
    groups = (metadata.row_group(group).column(paths.index(leaf)) for group in range(metadata.num_row_groups))
    found = [group.statistics for group in groups]
    return any(part is None or not part.has_null_count or part.null_count > 0 for part in found)


def _bytes_and_path(value: dict | bytes | str | None) -> tuple[bytes | None, str | None]:
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return (None, value) if isinstance(value, str) else (value, None)


def decode(value: dict | bytes | str | None, root: Path) -> np.ndarray:
    """Decode an entry of an image column to uint8 RGB [H, W, 3].

    Grayscale and palette images are converted, an alpha channel is dropped, and the EXIF orientation is applied.

    Args:
        value: {"bytes": ..., "path": ...} as written by `datasets`, or only the bytes or the path.
        root: folder to which a path is relative.

    Raises:
        ValueError, OSError: the image is missing, damaged, or not a color image.
    """
    data, path = _bytes_and_path(value)
    if data is not None:
        file: io.BytesIO | Path = io.BytesIO(data)
    elif path is not None:
        file = root / path
    else:
        raise ValueError("there is no image in this row")
    try:
        with Image.open(file) as image:
            if image.mode not in COLOR_MODES:
                raise ValueError(f"an image of mode {image.mode} is a depth map, not a color image")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("these bytes are no image" if data is not None else f"{path} is no image") from None
    except SyntaxError as error:  # Pillow raises it for damaged PNG files
        raise ValueError(f"the image is damaged: {error}") from None
