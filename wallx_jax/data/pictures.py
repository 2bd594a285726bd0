"""Images that a dataset keeps in its tables: encoded bytes, or the path of an image file."""

import io
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from wallx_jax.data import parquet

OPEN_TABLES = 16  # files that a reader keeps open
COLOR_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")  # 8 bits per channel


class ImageColumns:
    """Images in the rows of table files; safe to use from threads.

    Args:
        root: folder that the paths of image files are relative to.
    """

    def __init__(self, root: Path):
        self._root, self._lock = root, threading.Lock()
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        self._groups: dict[str, tuple[Path, int, pa.Array]] = {}  # of each camera the row group that was read last

    def read(self, file: Path, camera: str, row: int) -> np.ndarray:
        """Returns the image in a row of a table file, uint8 RGB [H, W, 3].

        Raises:
            ValueError, OSError: it is missing or damaged, or no color image.
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


def decode(value: dict | bytes | None, root: Path) -> np.ndarray:
    """Decodes an entry of an image column, uint8 RGB [H, W, 3].

    Grayscale and palette images are converted; an alpha channel is dropped.

    Args:
        value: {"bytes": ..., "path": ...} as `datasets` writes it, or the bytes alone.
        root: folder that a path is relative to.

    Raises:
        ValueError, OSError: it is missing or damaged, or no color image.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    path = value.get("path") if isinstance(value, dict) else None
    if data is None and path is None:
        raise ValueError("there is no image in this row")
    try:
        with Image.open(io.BytesIO(data) if data is not None else root / path) as image:
            if image.mode not in COLOR_MODES:
                raise ValueError(f"an image of mode {image.mode} is a depth map, not a color image")
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("these bytes are no image" if data is not None else f"{path} is no image") from None
    except SyntaxError as error:  # what Pillow raises for damaged PNG files
        raise ValueError(f"the image is damaged: {error}") from None
