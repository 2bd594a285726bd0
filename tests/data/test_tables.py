"""Rows are found by their keys and give what was recorded; faults are refused by file, column and row."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import edits, synthetic

from wallx_jax.data import parquet, tables
from wallx_jax.data.errors import DatasetError
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import read_info
from wallx_jax.data.stats import compute_stats
from wallx_jax.data.tables import FrameTable

STATE, ACTION = synthetic.STATE, synthetic.ACTION
LENGTHS = (4, 6, 3)
DIMS = 2
FEATURES = {key: {"dtype": "float32", "shape": (DIMS,), "names": ["x", "y"]} for key in (STATE, ACTION)}


def values(episode: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 states and actions [frames, DIMS]: each number is of one episode, frame and dim alone."""
    states = 100 * episode + 10 * np.arange(LENGTHS[episode])[:, None] + np.arange(DIMS)
    return states.astype(np.float32), states.astype(np.float32) + 0.5


def write(root: Path, files: int = 1, **options) -> Path:
    """A dataset of tables alone; `files`: table files, each with at least one episode."""
    options |= {"data_files_size_in_mb": 1e-6} if files > 1 else {}
    with synthetic.DatasetWriter(root, synthetic.FPS, FEATURES, **options) as writer:
        for episode in range(len(LENGTHS)):
            states, actions = values(episode)
            writer.add_episode({STATE: states, ACTION: actions}, task=synthetic.TASKS[episode % 2])
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "tables")


def open_table(root, episodes=None, **options) -> FrameTable:
    info = read_info(root, episodes=episodes)
    table = FrameTable(info, info.parts(STATE), info.parts(ACTION), **options)
    table.load()
    return table


def assert_right(root, episodes=(0, 1, 2), chosen=None):
    """Every frame has the numbers that were recorded for it."""
    table = open_table(root, chosen)
    states, actions = (np.concatenate(x) for x in zip(*map(values, episodes), strict=True))
    np.testing.assert_array_equal(table.state, states)
    np.testing.assert_array_equal(table.action, actions)
    assert table.task.tolist() == [e % 2 for e in episodes for _ in range(LENGTHS[e])]


def test_rows_in_order(root):
    assert_right(root)


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_any_order(root, seed):
    edits.take_rows(root, edits.DATA, np.random.default_rng(seed).permutation(sum(LENGTHS)))
    assert_right(root)


def test_episodes_that_are_not_in_the_order_of_their_frames(root):
    """Episode 0 comes last in the tables."""
    edits.set_column(root, edits.EPISODES, "dataset_from_index", [9, 0, 6])
    edits.set_column(root, edits.EPISODES, "dataset_to_index", [13, 6, 9])
    edits.set_column(root, edits.DATA, "index", [*range(9, 13), *range(6), *range(6, 9)])
    edits.take_rows(root, edits.DATA, [*range(4, 13), *range(4)])
    assert_right(root)


def test_several_files_of_any_name_order(tmp_path):
    root = write(tmp_path / "tables", files=3, chunks_size=2)
    files = sorted(str(path.relative_to(root)) for path in root.glob("data/*/*.parquet"))
    assert files == [
        f"data/{name}.parquet" for name in ("chunk-000/file-000", "chunk-000/file-001", "chunk-001/file-000")
    ]
    assert_right(root)
    first, _, last = (root / file for file in files)
    first.rename(root / "swap"), last.rename(first), (root / "swap").rename(last)
    assert_right(root)
    assert_right(root, [0, 2], chosen="0,2")


def test_another_data_path(tmp_path):
    root = write(tmp_path / "tables")
    (root / edits.DATA).parent.rename(root / "data" / "part-0")
    edits.edit_info(root, lambda c: c.update(data_path="data/part-{chunk_index}/file-{file_index:03d}.parquet"))
    assert_right(root)


def test_only_the_files_of_chosen_episodes_are_read(tmp_path, monkeypatch):
    root = write(tmp_path / "tables", files=3)
    read = []
    real = parquet.read_columns
    monkeypatch.setattr(parquet, "read_columns", lambda file, *columns: read.append(file.stem) or real(file, *columns))
    open_table(root, episodes="1")
    assert set(read) - {"file-000", "tasks"} == {"file-001"}


def test_scalars_for_features_of_one_dim(tmp_path):
    root = write(tmp_path / "tables")
    edits.edit_info(root, lambda c: c["features"][STATE].update(shape=[1], names=["x"]))
    for kind, stored in (
        (pa.float32(), lambda x: x[0]),
        (pa.list_(pa.float32()), lambda x: [x[0]]),
        (pa.int64(), lambda x: int(x[0])),
    ):
        column = [stored(row) for episode in range(3) for row in values(episode)[0].tolist()]
        edits.set_column(root, edits.DATA, STATE, column, kind)
        expected = np.concatenate([values(episode)[0][:, :1] for episode in range(3)])
        np.testing.assert_array_equal(open_table(root).state, expected)


def test_files_of_different_types(tmp_path):
    """Whole numbers in the first file: nothing of the second is cut off."""
    root = write(tmp_path / "tables", files=3)
    column = edits.column(root, edits.DATA, STATE)
    edits.set_column(root, edits.DATA, STATE, [[int(x) for x in row] for row in column], pa.list_(pa.int64()))
    second = edits.DATA.replace("file-000", "file-001")
    column = [[x + 0.25 for x in row] for row in edits.column(root, second, STATE)]
    edits.set_column(root, second, STATE, column, pa.list_(pa.float64()))
    table = open_table(root)
    np.testing.assert_array_equal(table.state[4:10], values(1)[0] + 0.25)
    np.testing.assert_array_equal(table.state[:4], values(0)[0])


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "bool"])
def test_types_of_vectors(tmp_path, dtype):
    root = tmp_path / "typed"
    features = {STATE: {"dtype": dtype if dtype != "float16" else "float32", "shape": (2,), "names": None}}
    features[ACTION] = FEATURES[ACTION]
    rows = np.array([[0, 1], [1, 0], [1, 1]], features[STATE]["dtype"])
    with synthetic.DatasetWriter(root, 10, features) as writer:
        writer.add_episode({STATE: rows, ACTION: np.zeros((3, 2), np.float32)}, task="go")
    if dtype == "float16":
        edits.edit_info(root, lambda c: c["features"][STATE].update(dtype="float16"))
    sample = LeRobotSource(read_info(root), 1, []).low_dim(0)
    assert sample.state.dtype == np.float32 and sample.state.tolist() == [0, 1]
    stats = compute_stats(root)
    np.testing.assert_allclose(stats.state.mean, [2 / 3, 2 / 3])


def ragged(column):
    column[3], column[8] = column[3][:-1], column[8] + [7.0]
    return column


def with_null(column):
    return [None if i in (2, 5) else x for i, x in enumerate(column)]


def with_null_inside(column):
    column[6][1] = None
    return column


LISTS = pa.list_(pa.float32())
VALUE_FAULTS = {
    "ragged": (ragged, LISTS, "has 1 numbers instead of 2 in row 3 \\(episode 0, frame 3\\), row 8 "
               "\\(episode 1, frame 4\\)"),
    "null rows": (with_null, LISTS, "is null in row 2 \\(episode 0, frame 2\\), row 5 \\(episode 1, frame 1\\)"),
    "null inside": (with_null_inside, LISTS, "holds a null in row 6 \\(episode 1, frame 2\\)"),
    "wide": (lambda column: [row + [0.0] for row in column], pa.list_(pa.float32(), 3), "has 3 numbers instead of 2 in "
             "row 0 .*, row 2 \\(episode 0, frame 2\\) and 10 more"),
    "single numbers": (lambda column: [row[0] for row in column], pa.float32(), "single numbers of type float, not "
                       "lists of 2"),
    "text": (lambda column: [["a", "b"] for _ in column], pa.list_(pa.string()), "of type string does not convert to "
             "float32"),
}  # fmt: skip


@pytest.mark.parametrize("fault", VALUE_FAULTS)
def test_values_that_are_refused(root, fault):
    change, kind, message = VALUE_FAULTS[fault]
    edits.set_column(root, edits.DATA, STATE, change(edits.column(root, edits.DATA, STATE)), kind)
    for read in (lambda: compute_stats(root), lambda: LeRobotSource(read_info(root), 2, []).low_dim(0)):
        with pytest.raises(DatasetError, match=f"file-000.parquet: column '{STATE}' .*{message}"):
            read()


def test_fractions_where_whole_numbers_are_promised(root):
    edits.edit_info(root, lambda c: c["features"][STATE].update(dtype="int64"))
    edits.set_column(root, edits.DATA, STATE, [[0.5, 1.0]] * 13, pa.list_(pa.float64()))
    with pytest.raises(DatasetError, match="of type double does not convert to int64 .*truncated"):
        open_table(root)


def test_null_values_that_are_nan_stay(root):
    column = edits.column(root, edits.DATA, STATE)
    column[5][1] = float("nan")
    edits.set_column(root, edits.DATA, STATE, column)
    assert np.argwhere(np.isnan(open_table(root).state)).tolist() == [[5, 1]]


INDEX = list(range(13))
KEY_FAULTS = {
    "index restarts": ("index", [*range(4), *range(6), *range(3)], "is not dataset_from_index of meta/episodes \\+ "
                       "frame_index in 9 of 13 rows, the first is row 4 \\(episode 1, frame 0\\): 0"),
    "frame_index runs on": ("frame_index", INDEX, "'frame_index' is not within the length of the episode in 7 of 13 "
                            "rows, the first is row 6 \\(episode 1, frame 6\\)"),
    "negative": ("frame_index", [-1, *range(1, 4), *range(6), *range(3)], "'frame_index' .*in 1 of 13 rows.*: -1"),
    "unknown task": ("task_index", [0] * 12 + [5], "'task_index' is not one of meta/tasks.parquet in 1 of 13 rows, "
                     ".*: 5"),
    "episode below 0": ("episode_index", [-1] * 4 + [1] * 6 + [2] * 3, "4 rows are of episodes that meta/episodes does "
                        "not have \\(episode_index -1\\)"),
    "unknown episode": ("episode_index", [0] * 4 + [7] * 6 + [2] * 3, "6 rows are of episodes that meta/episodes does "
                        "not have \\(episode_index 7\\)"),
    "null": ("index", [None, *range(1, 13)], "column 'index' is null in row 0"),
    "fraction": ("index", [x + 0.5 for x in INDEX], "column 'index' of type double does not convert to int64"),
}  # fmt: skip


@pytest.mark.parametrize("fault", KEY_FAULTS)
def test_keys_that_are_refused(root, fault):
    column, keys, message = KEY_FAULTS[fault]
    kind = pa.float64() if fault == "fraction" else None
    edits.set_column(root, edits.DATA, column, keys, kind)
    with pytest.raises(DatasetError, match=f"file-000.parquet: .*{message}"):
        LeRobotSource(read_info(root), 1, [])


def test_rows_that_are_missing_or_there_twice(root):
    edits.take_rows(root, edits.DATA, [*range(5), *range(6, 13)])
    with pytest.raises(
        DatasetError, match="data lacks 1 of the 13 frames .*the first is episode 1, frame 1; .*copy it again"
    ):
        open_table(root)
    edits.take_rows(root, edits.DATA, [*range(12), 3])
    with pytest.raises(DatasetError, match="1 frames are in more than one row, the first is episode 0, frame 3"):
        open_table(root)
    shutil.rmtree(root / "data")
    with pytest.raises(DatasetError, match="data lacks 13 of the 13 frames"):
        open_table(root)


def test_an_episode_in_two_files(tmp_path):
    root = write(tmp_path / "tables", files=3)
    second = edits.DATA.replace("file-000", "file-001")
    moved = pq.read_table(root / second).slice(5, 1)
    edits.edit_table(root, second, lambda table: table.slice(0, 5))
    edits.edit_table(root, edits.DATA, lambda table: pa.concat_tables([table, moved]))
    with pytest.raises(DatasetError, match="file-001.parquet: some rows of episode 1 are in .*file-000.parquet"):
        open_table(root)
    edits.edit_table(root, second, lambda table: pa.concat_tables([table, moved]))
    with pytest.raises(DatasetError, match="file-001.parquet: 1 frames are in more than one row"):
        open_table(root)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_file_is_named(root, content):
    file = root / edits.DATA
    file.write_bytes(file.read_bytes()[:300] if content is None else content)
    message = "Git LFS pointer" if content and b"lfs" in content else "cannot be read as a parquet table"
    with pytest.raises(DatasetError, match=f"file-000.parquet.*{message}"):
        open_table(root)


def test_a_task_that_meta_episodes_does_not_list(root):
    texts = edits.column(root, edits.TASKS, "task")
    assert len(texts) >= 2
    edits.set_column(root, edits.TASKS, "task", texts[::-1])
    with pytest.raises(DatasetError, match="'task_index' is not among the tasks that meta/episodes lists .* 13 of 13"):
        open_table(root)
    edits.set_column(root, edits.TASKS, "task", [f"{text}, please" for text in texts])
    open_table(root)  # reworded
    edits.set_column(root, edits.TASKS, "task", texts)
    edits.set_column(root, edits.EPISODES, "tasks", [None, [], texts])
    open_table(root)  # nothing listed, or more than there is
    edits.set_column(root, edits.EPISODES, "tasks", texts[0:1] * 3, pa.string())
    with pytest.raises(DatasetError, match="'task_index' is not among the tasks"):
        open_table(root)


def test_frames_that_go_back_in_time(root):
    """Keys that were exchanged betray themselves by the timestamps, also where no video needs those."""
    for key in ("frame_index", "index"):
        values = edits.column(root, edits.DATA, key)
        values[5], values[6] = values[6], values[5]
        edits.set_column(root, edits.DATA, key, values)
    with pytest.raises(DatasetError, match="'timestamp' is not at or after that of the frame before in 1 of 13 rows"):
        open_table(root)
    edits.set_column(root, edits.DATA, "timestamp", [0.0] * 13)
    open_table(root)  # no clock
    edits.edit_table(root, edits.DATA, lambda table: table.drop_columns(["timestamp"]))
    open_table(root)


def test_two_columns_of_one_name(root):
    edits.edit_table(root, edits.DATA, lambda table: table.append_column("index", table["index"]))
    with pytest.raises(DatasetError, match="file-000.parquet has more than one column 'index'"):
        open_table(root)


def test_arrays_with_a_type_of_their_own(root):
    """As `datasets` and pyarrow's tensors write them."""
    expected = np.array(open_table(root).state)
    values = pa.FixedShapeTensorArray.from_numpy_ndarray(expected.astype(np.float32))
    edits.edit_table(root, edits.DATA, lambda table: table.set_column(table.column_names.index(STATE), STATE, values))
    np.testing.assert_array_equal(open_table(root).state, expected.astype(np.float32))


@pytest.mark.parametrize("dtype", ["bool", "float16"])
def test_a_type_that_cannot_hold_the_values(root, dtype):
    recorded = np.array(edits.column(root, edits.DATA, STATE), np.float32)
    edits.edit_info(root, lambda content: content["features"][STATE].update(dtype=dtype))
    if dtype == "bool":
        with pytest.raises(DatasetError, match=f"column '{STATE}' of type float does not convert to bool"):
            open_table(root)
        edits.set_column(root, edits.DATA, STATE, (recorded > 0).astype(np.float32).tolist())
        np.testing.assert_array_equal(open_table(root).state, recorded > 0)
    else:
        np.testing.assert_array_equal(open_table(root).state, recorded)


def test_times_are_checked_for_videos_only(root):
    times = np.concatenate([np.arange(length) / synthetic.FPS for length in LENGTHS])
    edits.set_column(root, edits.DATA, "timestamp", (times + 0.04).tolist())
    open_table(root, check_times=True)  # less than half a frame
    times[7] += 0.06
    edits.set_column(root, edits.DATA, "timestamp", times.tolist())
    open_table(root)
    with pytest.raises(
        DatasetError, match="'timestamp' is not frame_index / 10 fps, .*row 7 \\(episode 1, frame 3\\): 0.36"
    ):
        open_table(root, check_times=True)
    times[7] = np.nan
    edits.set_column(root, edits.DATA, "timestamp", times.tolist())
    with pytest.raises(DatasetError, match="'timestamp'.*: nan"):
        open_table(root, check_times=True)


def test_a_table_that_is_replaced_is_read_anew(tmp_path):
    """At the same path, of the same size and age."""
    root, seen = tmp_path / "tables", []
    for offset in (0.0, 1000.0):
        shutil.rmtree(root, ignore_errors=True)
        write(root)
        column = [[x + offset for x in row] for row in edits.column(root, edits.DATA, ACTION)]
        edits.set_column(root, edits.DATA, ACTION, column)
        for file in root.rglob("*"):
            os.utime(file, (1e9, 1e9))
        source = LeRobotSource(read_info(root), 1, [])
        seen.append((float(source.low_dim(0).actions[0, 0]), compute_stats(root).action.min[0]))
    assert seen == [(0.5, 0.5), (1000.5, 1000.5)]


def test_a_file_is_converted_when_it_is_wanted(tmp_path, monkeypatch):
    root = write(tmp_path / "tables", files=3)
    source = LeRobotSource(read_info(root), 2, [])
    converted = []
    real = FrameTable._convert
    monkeypatch.setattr(FrameTable, "_convert", lambda self, n: converted.append(n) or real(self, n))
    source.low_dim(5), source.low_dim(6)
    assert converted == [1]
    source.table.load()
    assert sorted(converted) == [0, 1, 2]


def test_a_frame_is_marked_before_any_is_read(root):
    info = read_info(root)
    table = FrameTable(info, info.parts(STATE), info.parts(ACTION))
    table.mark_unreadable(5)
    assert np.flatnonzero(table.unreadable).tolist() == [5]


def test_copies_in_other_processes_share_the_arrays(root, tmp_path):
    source = LeRobotSource(read_info(root), 2, [])
    folder = pickle.loads(pickle.dumps(source)).table._folder
    assert folder == source.table._folder
    (tmp_path / "source").write_bytes(pickle.dumps(source))
    code = f"""import pickle; source = pickle.load(open({str(tmp_path / "source")!r}, "rb"))
assert source.low_dim(5).state.tolist() == [110, 111]
source.table.mark_unreadable(12)"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert source.table._map("done").all() and source.table.unreadable.tolist() == [0] * 12 + [1]
    assert source.low_dim(5).state.tolist() == [110, 111]
    del source
    assert not folder.exists()


def test_a_full_disk_says_where_and_how_much(root, monkeypatch):
    source = LeRobotSource(read_info(root), 1, [])
    source.table._prepare()

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def seek(self, _):
            pass

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda *_: Full())
    with pytest.raises(OSError, match="no room for 0.00 GiB of tables in /.*: No space left on device; set TMPDIR"):
        source.low_dim(0)


def test_only_files_that_are_called_so_are_tables(tmp_path):
    names = [
        "chunk-000/file-000",
        "chunk-012/file-1000",
        "chunk-000/file-000.bak",
        "chunk-000/._file-001",
        "a/file-002",
    ]
    for name in names:
        path = tmp_path / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = tables._files_of(tmp_path, "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")
    assert [str(path.relative_to(tmp_path / "data").with_suffix("")) for path in found] == names[:2]
