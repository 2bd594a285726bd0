"""Read meta/episodes of a LeRobot dataset: its episodes and their frame ranges."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wallx_jax.data import parquet
from wallx_jax.data.errors import REWRITE, DatasetError

EPISODE_COLUMNS = ("episode_index", "length", "dataset_from_index", "dataset_to_index")


def _episode_files(root: Path) -> list[Path]:
    folder = root / "meta" / "episodes"
    files = sorted(file for file in folder.glob("*/*.parquet") if not file.name.startswith("."))  # macOS "._" files
    if not files:
        what = "contains no tables" if folder.is_dir() else "is missing"
        raise FileNotFoundError(f"{folder} {what}; the dataset is incomplete: copy it again")
    return files


def read_episode_columns(root: Path, columns: Iterable[str]) -> dict[str, np.ndarray]:
    """Read columns of meta/episodes, in ascending order of episode_index.

    Returns:
        {column: [all episodes]}, float64 for timestamps and int64 for the others; includes episode_index.

    Raises:
        FileNotFoundError: the folder is missing or has no tables.
        DatasetError: a file is damaged, a column is missing or contains nulls, or an episode_index is negative or
            appears twice.
    """
    columns = ["episode_index", *columns]
    parts: dict[str, list[np.ndarray]] = {column: [] for column in columns}
    sources: list[Path] = []
    for file in _episode_files(root):
        table = parquet.read_columns(file, columns)
        for column in columns:
            times = column.endswith("_timestamp")
            dtype = np.dtype(np.float64 if times else np.int64)
            parts[column].append(parquet.matrix(table, column, file, 1, dtype)[:, 0])
        sources += [file] * len(table)
    found = {column: np.concatenate(values) for column, values in parts.items()}
    numbers = found["episode_index"]
    order = np.argsort(numbers, kind="stable")
    if len(twice := np.flatnonzero(np.diff(numbers[order]) == 0)):
        one, other = (sources[row] for row in order[twice[0] : twice[0] + 2])
        also = "" if one == other else f" (also in {one})"
        raise DatasetError(f"{other}: episode_index {numbers[order][twice[0]]} occurs twice{also}; {REWRITE}")
    if numbers.size and numbers.min() < 0:
        raise DatasetError(f"{sources[order[0]]}: episode_index {numbers.min()} is negative; {REWRITE}")
    return {column: values[order] for column, values in found.items()}


def read_listed_tasks(root: Path, tasks: Mapping[int, str]) -> np.ndarray:
    """Read the instructions that meta/episodes lists for each episode, from the files that have the column "tasks".

    Args:
        root: the dataset's folder.
        tasks: {task_index: instruction} of meta/tasks.parquet. Listed instructions that are not among them were
            reworded there, and are skipped.

    Returns:
        Pairs of (`episode_index`, `task_index`), int64 [n, 2].
    """
    numbers: dict[str, list[int]] = {}
    for number, text in tasks.items():
        numbers.setdefault(text, []).append(number)
    pairs: list[tuple[int, int]] = []
    for file in _episode_files(root):
        with parquet.open_parquet(file) as opened:
            if "tasks" not in opened.schema_arrow.names:
                continue
        table = parquet.read_columns(file, ["episode_index", "tasks"])
        for episode, texts in zip(table["episode_index"].to_pylist(), table["tasks"].to_pylist(), strict=True):
            for text in [texts] if isinstance(texts, str) else texts or ():
                pairs += [(episode, number) for number in numbers.get(text, ())]
    return np.array(pairs, np.int64).reshape(-1, 2)


def read_episodes(root: Path, repo_id: str, info: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read EPISODE_COLUMNS of all episodes, and check them against meta/info.json and each other.

    Args:
        root: the dataset's folder.
        repo_id: name of the dataset in error messages.
        info: contents of meta/info.json.

    Returns:
        {column: int64 [all episodes]}, in ascending order of episode_index.

    Raises:
        FileNotFoundError: as `read_episode_columns`.
        DatasetError: as `read_episode_columns`; or lengths, frame ranges and totals are inconsistent.
    """
    table = read_episode_columns(root, EPISODE_COLUMNS[1:])
    numbers, lengths = table["episode_index"], table["length"]
    first, stop = table["dataset_from_index"], table["dataset_to_index"]
    where = f"{root / 'meta' / 'episodes'}"
    if not len(numbers):
        raise DatasetError(f"{repo_id} has no episodes: {where} has no rows")
    if len(numbers) != info["total_episodes"] or lengths.sum() != info["total_frames"]:
        raise DatasetError(
            f"{repo_id}: meta/info.json counts {info['total_episodes']} episodes and {info['total_frames']} frames, "
            f"but meta/episodes has {len(numbers)} and {lengths.sum()}; the dataset is incomplete: copy it again"
        )
    for wrong, what in (
        (lengths <= 0, "length is not positive"),
        (stop - first != lengths, "dataset_to_index - dataset_from_index differs from length"),
    ):
        if wrong.any():
            row = np.flatnonzero(wrong)[0]
            values = ", ".join(f"{column} {table[column][row]}" for column in EPISODE_COLUMNS[1:])
            raise DatasetError(
                f"{where}: {what} for {wrong.sum()} episodes, the first is episode {numbers[row]} ({values}); {REWRITE}"
            )
    order = np.argsort(first)
    if len(overlaps := np.flatnonzero(first[order][1:] < stop[order][:-1])):
        one, other = numbers[order][overlaps[0]], numbers[order][overlaps[0] + 1]
        raise DatasetError(
            f"{where}: dataset_from_index and dataset_to_index of episodes {one} and {other} overlap; {REWRITE}"
        )
    return table
