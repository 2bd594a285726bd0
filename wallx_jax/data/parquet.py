"""Read parquet columns as NumPy arrays without nulls, of the expected width and dtype.

Errors name the file, the column and the rows that are damaged.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wallx_jax.data.errors import DatasetError
from wallx_jax.utils.files import is_lfs_pointer

MOST_ROWS = 3  # rows listed in an error message


def open_parquet(file: Path) -> pq.ParquetFile:
    """Open a parquet file.

    Raises:
        FileNotFoundError: if the file is missing.
        DatasetError: if the file is empty, truncated, a Git LFS pointer or not a parquet file, or has duplicate column
            names.
    """
    if not file.is_file():
        what = "is a directory, not a table" if file.is_dir() else "is missing"
        raise FileNotFoundError(f"{file} {what}; the dataset is incomplete: copy it again")
    try:
        # No read-ahead buffer: it is meant for remote files and would copy the mapped memory.
        opened = pq.ParquetFile(file, memory_map=True, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(_unreadable(file, error)) from error
    names = opened.schema_arrow.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        opened.close()
        raise DatasetError(f"{file} has more than one column {', '.join(map(repr, twice))}; keep one of each")
    return opened


def read_columns(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Read columns of a parquet file.

    Args:
        file: the parquet file.
        columns: columns that the file must have.
        optional: columns that are read only if the file has them.

    Raises:
        FileNotFoundError: if the file is missing.
        DatasetError: if the file is unreadable (see `open_parquet`), or if a column is missing or damaged.
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
    """Return an integer column, int64 [n].

    Raises:
        DatasetError: for nulls, lists or non-integers, naming file, column and rows.
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
    """Return a column of vectors, or of scalars where `width` is 1, as `dtype` [n, width].

    Args:
        table: table that contains the column.
        column: name of the column.
        file: file the table was read from, for error messages.
        width: number of elements that every row must have.
        dtype: dtype to convert to. Floats may be rounded, integers must stay exact.
        describe_row: returns the name of a row for error messages.

    Raises:
        DatasetError: for null rows or elements, rows of another width, or numbers that do not fit `dtype`, naming file,
            column and rows.
    """
    values = table[column].combine_chunks()
    if isinstance(values.type, pa.BaseExtensionType):  # `datasets` and pyarrow define their own array types
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
            raise fail(np.unique(_true_rows(values.is_null()) // width), "contains a null")
    elif width != 1:
        raise DatasetError(f"{file}: column {column!r} has single numbers of type {values.type}, not lists of {width}")
    try:
        if dtype.kind == "b" and not pc.all(pc.is_in(values.cast(pa.float64()), pa.array([0.0, 1.0]))).as_py():
            raise pa.ArrowInvalid("it has values other than 0 and 1")  # Arrow casts any number but 0 to true
        numbers = values.cast(pa.from_numpy_dtype(dtype)).to_numpy(zero_copy_only=False)  # no copy if unchanged
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DatasetError(
            f"{file}: column {column!r} of type {values.type} cannot be converted to {dtype} ({error}); store it "
            f"as {dtype}"
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
