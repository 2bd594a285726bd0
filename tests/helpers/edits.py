"""Changes to a dataset on disk, as faulty tools make them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
TASKS = "meta/tasks.parquet"


def edit_table(root: Path, file: str, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(root / file)), root / file)


def set_column(root: Path, file: str, column: str, values: Sequence[Any], kind: pa.DataType | None = None) -> None:
    """Puts other values into a column; `kind`: their type, the column's own if None."""

    def change(table: pa.Table) -> pa.Table:
        number = table.column_names.index(column)
        array = pa.array(values, kind or table.schema.field(number).type)
        return table.set_column(number, pa.field(column, array.type), array)

    edit_table(root, file, change)


def column(root: Path, file: str, name: str) -> list[Any]:
    return pq.read_table(root / file)[name].to_pylist()


def take_rows(root: Path, file: str, rows: Sequence[int]) -> None:
    edit_table(root, file, lambda table: table.take(pa.array(rows)))


def edit_info(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = root / "meta/info.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
