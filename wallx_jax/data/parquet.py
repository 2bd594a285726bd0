"""Parquet tables whose damage is named: columns as NumPy arrays, without nulls, of the promised width and type."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wallx_jax.data.errors import DatasetError
from wallx_jax.utils.files import is_lfs_pointer

MOST_ROWS = 3  # rows that a message names


def open_parquet(file: Path) -> pq.ParquetFile:
    """Opens a parquet file.

    Raises:
        FileNotFoundError: if it is missing.
        DatasetError: if it is empty, cut off, a Git LFS pointer or no parquet file, or has two columns of one name.
    """
    if not file.is_file():
        what = "is a folder, not the table" if file.is_dir() else "is missing"
        raise FileNotFoundError(f"{file} {what}; the dataset is not complete, copy it again")
    try:
        # Without a read-ahead buffer, which is for remote files and copies what is mapped.
        opened = pq.ParquetFile(file, memory_map=True, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(_unreadable(file, error)) from error
    names = opened.schema_arrow.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        opened.close()
        raise DatasetError(f"{file} has more than one column {', '.join(map(repr, twice))}; keep one of each")
    return opened


def read_columns(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Reads columns of a parquet file, and of the `optional` ones those that it has.

    Raises:
        FileNotFoundError, DatasetError: as `open_parquet`; a column is missing or damaged.
    """
    with open_parquet(file) as table:
        have = table.schema_arrow.names
        if missing := [name for name in columns if name not in have]:
            raise DatasetError(f"{file} lacks columns {missing}; it has {have}")
        try:
            return table.read([*columns, *(name for name in optional if name in have)])
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(_unreadable(file, error)) from error


def integers(table: pa.Table, column: str, file: Path) -> np.ndarray:
    """Returns a column of whole numbers, int64 [n].

    Raises:
        DatasetError: nulls, lists or other than whole numbers; names file, column and rows.
    """
    return matrix(table, column, file, 1, np.dtype(np.int64))[:, 0]


def matrix(
    table: pa.Table,
    column: str,
    file: Path,
    width: int,
    dtype: np.dtype,
    describe_row: Callable[[int], str] = "row {}".format,
) -> np.ndarray:
    """Returns a column of vectors, or of single numbers where `width` is 1, as `dtype` [n, width].

    Args:
        width: numbers that every row must have.
        dtype: what they are converted to. Floats may be rounded, whole numbers must stay exact.
        describe_row: how a message names a row.

    Raises:
        DatasetError: null rows or elements, rows of another width, or numbers that do not fit `dtype`; names file,
            column and rows.
    """
    values = table[column].combine_chunks()
    if isinstance(values.type, pa.BaseExtensionType):  # `datasets` and pyarrow have types of their own for arrays
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()

    def fail(rows: np.ndarray, what: str) -> DatasetError:
        named = ", ".join(describe_row(int(row)) for row in rows[:MOST_ROWS])
        more = f" and {len(rows) - MOST_ROWS} more" if len(rows) > MOST_ROWS else ""
        return DatasetError(f"{file}: column {column!r} {what} in {named}{more}; repair or rewrite the file")

    if values.null_count:
        raise fail(_true_rows(values.is_null()), "is null")
    if _is_list(values.type):
        if not pa.types.is_fixed_size_list(values.type) or values.type.list_size != width:
            lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
            if len(bad := np.flatnonzero(lengths != width)):
                raise fail(bad, f"has {lengths[bad[0]]} numbers instead of {width}")
        values = values.flatten()
        if values.null_count:
            raise fail(np.unique(_true_rows(values.is_null()) // width), "holds a null")
    elif width != 1:
        raise DatasetError(f"{file}: column {column!r} has single numbers of type {values.type}, not lists of {width}")
    try:
        if dtype.kind == "b" and not pc.all(pc.is_in(values.cast(pa.float64()), pa.array([0.0, 1.0]))).as_py():
            raise pa.ArrowInvalid("there are other numbers than 0 and 1")  # Arrow takes any but 0 for true
        numbers = values.cast(pa.from_numpy_dtype(dtype)).to_numpy(zero_copy_only=False)  # the same type is not copied
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DatasetError(
            f"{file}: column {column!r} of type {values.type} does not convert to {dtype} ({error}); write {dtype}"
        ) from None
    return numbers.reshape(-1, width)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _true_rows(mask: pa.Array) -> np.ndarray:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False))


def _unreadable(file: Path, error: Exception) -> str:
    if is_lfs_pointer(file):
        return f"{file} is a Git LFS pointer, not the table; fetch it with `git lfs pull`"
    reason = " ".join(str(error).split())[:200]
    return f"{file} cannot be read as a parquet table ({reason}); copy it again"
