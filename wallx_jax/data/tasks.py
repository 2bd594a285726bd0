"""Read the instructions of a LeRobot dataset from meta/tasks.parquet."""

import json
from pathlib import Path

import pyarrow as pa

from wallx_jax.data import parquet
from wallx_jax.data.errors import DatasetError


def read_tasks(file: Path) -> dict[int, str]:
    """Read {task_index: instruction}, in ascending order; a null instruction becomes an empty string.

    Raises:
        FileNotFoundError: if the file is missing.
        DatasetError: if the file is damaged, a number occurs twice, or the column with the instructions is ambiguous or
            missing.
    """
    with parquet.open_parquet(file) as opened:
        column = _task_column(opened.schema_arrow, file)
    table = parquet.read_columns(file, [column, "task_index"])
    numbers = parquet.integers(table, "task_index", file)
    try:
        texts = table[column].to_pylist()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file}: column {column!r} is not UTF-8 ({error.reason}); rewrite the texts") from None
    if len(set(numbers.tolist())) != len(numbers):
        twice = sorted({int(n) for n in numbers if (numbers == n).sum() > 1})
        raise DatasetError(f"{file}: task_index {twice} occurs more than once; give each instruction its own number")
    return {int(number): text or "" for number, text in sorted(zip(numbers, texts, strict=True))}


def _task_column(schema: pa.Schema, file: Path) -> str:
    """Return the column with the instructions: the pandas index, which is what lerobot writes, or "task"."""
    columns = [field.name for field in schema if _holds_text(field.type)]
    index = [name for name in _pandas_index(schema) if name in columns]
    likely = list(dict.fromkeys([*index, *(name for name in ("task", "__index_level_0__") if name in columns)]))
    found = likely or columns
    if not found:
        raise DatasetError(f"{file} has no column with the instructions, only {schema.names}; add the column 'task'")
    if len(found) > 1:
        raise DatasetError(
            f"{file}: any of the columns {found} could contain the instructions; keep one and name it 'task'"
        )
    return found[0]


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _pandas_index(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that were the index of a pandas frame."""
    try:
        index = json.loads((schema.metadata or {})[b"pandas"])["index_columns"]
    except (KeyError, ValueError, TypeError):
        return []
    return [name for name in index if isinstance(name, str)]
