"""The meta folder: what it says, and what is refused in it."""

import dataclasses
import importlib.util
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import edits, synthetic

from wallx_jax.data.errors import DatasetError
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.data.metadata import read_info
from wallx_jax.data.spans import read_spans

CAMERAS = list(synthetic.CAMERAS)
HIGH = CAMERAS[0]


@pytest.fixture
def copied(dataset_dir, tmp_path):
    return shutil.copytree(dataset_dir, tmp_path / "copied")


def test_info(dataset_info):
    assert dataset_info.camera_keys == tuple(CAMERAS)
    assert [dataset_info.frame_size(c) for c in CAMERAS] == list(synthetic.CAMERAS.values())
    assert (dataset_info.num_episodes, dataset_info.num_frames) == (4, sum(synthetic.LENGTHS))
    assert dataset_info.fps == synthetic.FPS and dataset_info.whole
    assert dataset_info.tasks == dict(enumerate(synthetic.TASKS))
    assert dataset_info.episode_numbers.tolist() == [0, 1, 2, 3]
    assert dataset_info.episode_lengths.tolist() == list(synthetic.LENGTHS)
    assert dataset_info.dims("action") == synthetic.DIMS


def test_frames_are_counted_through_the_episodes(dataset_dir):
    info = read_info(dataset_dir, episodes="1:3")
    assert info.episode_numbers.tolist() == [1, 2] and info.num_frames == 13
    episodes, places = info.locate(np.array([0, 4, 5, 12]))
    assert episodes.tolist() == [0, 0, 1, 1] and places.tolist() == [0, 4, 0, 7]
    assert info.describe(5) == "episode 2, frame 0"
    assert info.start_of(2) == 5 and info.frames_of(2).tolist() == list(range(5, 13))


@pytest.mark.parametrize(
    ("shape", "names", "size"),
    [
        ([3, 480, 640], ["channels", "height", "width"], (480, 640)),
        ([3, 480, 640], None, (480, 640)),
        ([480, 640, 3], None, (480, 640)),
        ([640, 480, 3], ["width", "height", "channel"], (480, 640)),
        ([1, 480, 640], None, (480, 640)),
        ([480, 640, 1], None, (480, 640)),
        ([480, 640], None, (480, 640)),
    ],
)
def test_frame_sizes(dataset_info, shape, names, size):
    features = {"x": {"dtype": "video", "shape": shape, "names": names}}
    assert dataclasses.replace(dataset_info, features=features).frame_size("x") == size


@pytest.mark.parametrize(
    "mark", [{"info": {"is_depth_map": True}}, {"info": {"video.is_depth_map": True}},
             {"video_info": {"video.is_depth_map": True}}],
)  # fmt: skip
def test_depth_cameras_are_refused_by_name(copied, mark):
    edits.edit_info(copied, lambda info: info["features"][HIGH].update(mark))
    with pytest.raises(ValueError, match=f"camera '{HIGH}' contains depth maps; choose a color camera"):
        LeRobotSource(read_info(copied), 4, CAMERAS)
    LeRobotSource(read_info(copied), 4, CAMERAS[1:])


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_an_old_format_names_the_conversion(copied, version):
    edits.edit_info(copied, lambda info: info.update(codebase_version=version))
    with pytest.raises(DatasetError, match=f"format {version}; convert.*python -m (lerobot[a-z0-9_.]+)") as error:
        read_info(copied)
    if importlib.util.find_spec("lerobot"):
        module = str(error.value).split("python -m ")[1].split()[0]
        assert importlib.util.find_spec(module) is not None
    else:
        assert 'pip install "wallx-jax[lerobot]" && python -m lerobot.scripts' in str(error.value)


def test_a_newer_format(copied):
    edits.edit_info(copied, lambda info: info.update(codebase_version="v4.0"))
    with pytest.raises(DatasetError, match="v4.0; this package reads v3.0"):
        read_info(copied)


def test_not_a_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match="no meta/info.json"):
        read_info(tmp_path)


DAMAGES = {
    "cut off": (lambda text: text[: len(text) // 2], "is not valid JSON \\(line [0-9]+: .*copy it again"),
    "empty": (lambda text: "  \n", "info.json is empty; copy it again"),
    "a list": (lambda text: "[1]", "contains a JSON array; expected an object"),
    "null": (lambda text: "null", "contains a JSON null; expected an object"),
    "git-lfs": (lambda text: "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_info_json(copied, damage):
    file = copied / "meta/info.json"
    change, message = DAMAGES[damage]
    file.write_text(change(file.read_text()))
    with pytest.raises(DatasetError, match=message) as error:
        read_info(copied)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_info_json_in_other_encodings(copied):
    file = copied / "meta/info.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as some editors save it
    assert read_info(copied).num_episodes == 4
    file.write_bytes("{}".encode("utf-16"))
    with pytest.raises(DatasetError, match="is not UTF-8 text"):
        read_info(copied)


FIELDS = {
    "fps missing": (lambda c: c.pop("fps"), "'fps' is null, expected a number"),
    "fps zero": (lambda c: c.update(fps=0), "'fps' is 0, expected a number above 0"),
    "fps not a number": (lambda c: c.update(fps=float("nan")), "'fps' is nan"),
    "fps text": (lambda c: c.update(fps="10"), "'fps' is \"10\", expected a number"),
    "fps true": (lambda c: c.update(fps=True), "'fps' is true, expected a number"),
    "features missing": (lambda c: c.pop("features"), "'features' is null, expected an object"),
    "frames as text": (lambda c: c.update(total_frames="26"), "'total_frames' is \"26\", expected an integer"),
    "no shape": (lambda c: c["features"]["action"].pop("shape"), "feature 'action' has shape null"),
    "no dtype": (lambda c: c["features"]["action"].pop("dtype"), "feature 'action' has dtype null"),
    "shape a number": (lambda c: c["features"]["action"].update(shape=14), "feature 'action' has shape 14"),
    "shape of text": (
        lambda c: c["features"]["action"].update(shape=["14"]),
        "feature 'action' has shape \\[\"14\"\\]",
    ),
    "camera without axes": (
        lambda c: c["features"][HIGH].update(shape=[64]),
        ".*expected \\[height, width, channels\\]",
    ),
    "feature text": (lambda c: c["features"].update(action="float32"), "feature 'action' is \"float32\""),
    "video_path missing": (lambda c: c.pop("video_path"), "'video_path' is null, expected a path"),
    "data_path": (lambda c: c.update(data_path="data/{episode}.parquet"), "'data_path' is .*expected a path"),
    "data_path absolute": (
        lambda c: c.update(data_path="/data/{file_index}"),
        "'data_path' is .*expected a path below",
    ),
    "data_path outside": (lambda c: c.update(data_path="../{file_index}"), "'data_path' is .*expected a path below"),
    "data_path empty": (lambda c: c.update(data_path=""), "'data_path' is .*expected a path below"),
    "data_path with an index": (lambda c: c.update(data_path="{file_index[0]}"), "'data_path' is .*expected a path"),
    "data_path with a wildcard": (lambda c: c.update(data_path="**/{file_index}"), "'data_path' is .*expected a path"),
    "fps of no camera": (lambda c: c.update(fps=1e300), "'fps' is 1e\\+300, expected a number above 0 and up to 10000"),
    "names a number": (lambda c: c["features"]["action"].update(names=5), "feature 'action' has names 5"),
    "names of lists": (lambda c: c["features"][HIGH].update(names=[["h"], "w", "c"]), "feature .* has names \\[\\["),
    "info a number": (lambda c: c["features"][HIGH].update(info=5), "feature .* has info 5, expected an object"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_field_in_info_json(copied, field):
    change, message = FIELDS[field]
    edits.edit_info(copied, change)
    with pytest.raises(DatasetError, match=f"info.json: {message}"):
        read_info(copied)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda text: text.replace('"fps": ', '"fps": 30, "fps": '), "the key 'fps' occurs twice"),
        (lambda text: "[" * 100_000, "is malformed"),
        (lambda text: text.replace('"fps": ', f'"fps": {"9" * 5000}'), "is malformed"),
    ],
)
def test_json_that_is_odd(copied, edit, message):
    file = copied / "meta/info.json"
    file.write_text(edit(file.read_text()))
    with pytest.raises(DatasetError, match=f"info.json .*{message}"):
        read_info(copied)


def test_several_wrong_fields_are_one_error(copied):
    edits.edit_info(copied, lambda c: (c.pop("fps"), c.pop("data_path")))
    with pytest.raises(DatasetError, match="'fps' is null.*'data_path' is null"):
        read_info(copied)


def test_the_version_without_its_letter(copied):
    edits.edit_info(copied, lambda content: content.update(codebase_version="3.0"))
    assert read_info(copied).num_episodes == 4


def test_episodes_as_a_list(copied):
    with pytest.raises(DatasetError, match=r"episodes = \[0, 2\]: .*write e.g. '0:50,60'"):
        read_info(copied, episodes=[0, 2])


def test_files_that_macos_leaves(copied):
    (copied / "meta/episodes/chunk-000/._file-000.parquet").write_bytes(b"Mac OS X")
    assert read_info(copied).num_episodes == 4


def test_an_episode_in_two_tables_names_both(copied):
    other = copied / "meta/episodes/chunk-000/file-007.parquet"
    shutil.copy(copied / edits.EPISODES, other)
    with pytest.raises(DatasetError, match="file-007.parquet: episode_index 0 occurs twice .also in .*file-000"):
        read_info(copied)


def test_half_copied_dataset(copied):
    edits.edit_info(copied, lambda info: info.update(total_episodes=5))
    with pytest.raises(DatasetError, match="counts 5 episodes and 26 frames, but meta/episodes has 4 and 26"):
        read_info(copied)
    shutil.rmtree(copied / "meta" / "episodes")
    with pytest.raises(FileNotFoundError, match="meta/episodes is missing"):
        read_info(copied)


def test_no_episodes(copied):
    edits.edit_info(copied, lambda info: info.update(total_episodes=0, total_frames=0))
    edits.edit_table(copied, edits.EPISODES, lambda table: table.slice(0, 0))
    with pytest.raises(DatasetError, match="copied has no episodes"):
        read_info(copied)


def test_episodes_in_any_order_and_with_gaps(copied, dataset_info):
    edits.set_column(copied, edits.EPISODES, "episode_index", [0, 1, 5, 9])
    edits.take_rows(copied, edits.EPISODES, [2, 0, 3, 1])
    info = read_info(copied)
    assert info.episode_numbers.tolist() == [0, 1, 5, 9]
    np.testing.assert_array_equal(info.episode_lengths, dataset_info.episode_lengths)
    np.testing.assert_array_equal(info.first_indices, dataset_info.first_indices)


EPISODE_FAULTS = {
    "twice": ("episode_index", [0, 1, 1, 3], "episode_index 1 occurs twice"),
    "length 0": ("length", [7, 5, 8, 6, 0], "length is not positive for 1 episodes"),
    "index span": ("dataset_to_index", [7, 12, 21, 26], "differs from length for 1 episodes, the first is episode 2 "
                   r"\(length 8, dataset_from_index 12, dataset_to_index 21\)"),
    "null": ("length", [7, None, 8, 11], "column 'length' is null in row 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", EPISODE_FAULTS)
def test_episodes_that_contradict_themselves(copied, fault):
    column, values, message = EPISODE_FAULTS[fault]
    if len(values) > 4:
        edits.take_rows(copied, edits.EPISODES, [0, 1, 2, 3, 3])
        edits.set_column(copied, edits.EPISODES, "episode_index", range(5))
        edits.edit_info(copied, lambda info: info.update(total_episodes=5))
    edits.set_column(copied, edits.EPISODES, column, values)
    with pytest.raises(DatasetError, match=message) as error:
        read_info(copied)
    assert "meta/episodes" in str(error.value)


def test_episodes_that_share_frames(copied):
    edits.set_column(copied, edits.EPISODES, "dataset_from_index", [0, 7, 10, 20])
    edits.set_column(copied, edits.EPISODES, "dataset_to_index", [7, 12, 18, 26])
    with pytest.raises(DatasetError, match="dataset_to_index of episodes 1 and 2 overlap"):
        read_info(copied)


def test_a_missing_column_is_named(copied):
    edits.edit_table(copied, edits.EPISODES, lambda table: table.drop_columns(["length"]))
    with pytest.raises(DatasetError, match=r"file-000.parquet lacks columns \['length'\]; it has \['episode_index'"):
        read_info(copied)


def test_what_official_datasets_lack_is_not_asked_for(copied):
    def drop(table):
        kept = [name for name in table.column_names if name != "tasks" and not name.startswith("stats/")]
        return table.select(kept)

    edits.edit_table(copied, edits.EPISODES, drop)
    (copied / "meta/stats.json").unlink()
    assert LeRobotSource(read_info(copied), 4, CAMERAS)[25].frame == 5


def test_tasks_whose_data_are_damaged_behind_a_whole_footer(copied):
    file = copied / edits.TASKS
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(DatasetError, match="tasks.parquet cannot be read as a parquet table .*; copy it again"):
        read_info(copied)


def write_tasks(root, columns: dict, index: str | None = None) -> None:
    """`index`: the column that pandas had as its index."""
    table = pa.table(columns)
    if index is not None:
        table = table.replace_schema_metadata({"pandas": f'{{"index_columns": ["{index}"]}}'})
    pq.write_table(table, root / edits.TASKS)


ONE, OTHER = synthetic.TASKS
TASK_TABLES = {
    "as lerobot writes it": ({"task_index": [0, 1], "__index_level_0__": [ONE, OTHER]}, "__index_level_0__"),
    "in another order": ({"task_index": [1, 0], "__index_level_0__": [OTHER, ONE]}, "__index_level_0__"),
    "with a further column": (
        {"category": ["kitchen", "office"], "task_index": [0, 1], "__index_level_0__": [ONE, OTHER]},
        "__index_level_0__",
    ),
    "as a column": ({"note": ["a", "b"], "task": [ONE, OTHER], "task_index": [0, 1]}, None),
    "under another name": ({"task_index": [0, 1], "instruction": [ONE, OTHER]}, None),
    "as lerobot 0.6 names it": ({"task_index": [0, 1], "task": [ONE, OTHER]}, "task"),
    "with a number to spare": ({"task_index": [0, 7, 1], "task": [ONE, "sing", OTHER]}, "task"),
}  # fmt: skip


@pytest.mark.parametrize("table", TASK_TABLES)
def test_instructions_are_found_by_their_number(copied, table):
    columns, index = TASK_TABLES[table]
    write_tasks(copied, columns, index)
    info = read_info(copied)
    assert (info.tasks[0], info.tasks[1]) == (ONE, OTHER) and list(info.tasks) == sorted(info.tasks)
    assert LeRobotSource(info, 1, []).low_dim(7).instruction == OTHER


NO_TASKS = {
    "no text": ({"task_index": [0, 1]}, "no column with the instructions, only \\['task_index'\\]"),
    "two texts": (
        {"task_index": [0, 1], "english": [ONE, OTHER], "french": ["a", "b"]},
        "any of the columns \\['english', 'french'\\] could contain the instructions; keep one and name it 'task'",
    ),
    "no number": ({"task": [ONE, OTHER]}, r"lacks columns \['task_index'\]"),
    "number twice": ({"task_index": [1, 1], "task": [ONE, OTHER]}, "task_index \\[1\\] occurs more than once"),
    "no whole number": ({"task_index": [0.5, 1.0], "task": [ONE, OTHER]}, "cannot be converted to int64"),
}


@pytest.mark.parametrize("table", NO_TASKS)
def test_instructions_that_are_not_clear_are_refused(copied, table):
    columns, message = NO_TASKS[table]
    write_tasks(copied, columns)
    with pytest.raises(DatasetError, match=f"meta/tasks.parquet.*{message}"):
        read_info(copied)


def spans(root, **columns):
    for name, values in columns.items():
        edits.set_column(root, edits.EPISODES, f"videos/{HIGH}/{name}", values)
    return read_spans(read_info(root), HIGH)


def test_video_spans(copied, dataset_info):
    found = read_spans(dataset_info, HIGH)
    np.testing.assert_allclose(found.start, [0, 0.7, 1.2, 2.0], atol=1e-9)
    assert found.chunk.tolist() == found.file.tolist() == [0, 0, 0, 0]
    gap = spans(copied, from_timestamp=[0.0, 0.7, 5.0, 7.0], to_timestamp=[0.7, 1.2, 5.8, 7.6])
    assert gap.start.tolist() == [0.0, 0.7, 5.0, 7.0], "frames of episodes that were removed may stay in a file"
    files = spans(
        copied, file_index=[0, 0, 1, 1], from_timestamp=[0.0, 0.7, 0.0, 0.8], to_timestamp=[0.7, 1.2, 0.8, 1.4]
    )
    assert files.file.tolist() == [0, 0, 1, 1]


def test_video_spans_that_contradict_the_episodes(copied):
    with pytest.raises(DatasetError, match=r"for 1 episodes, the first is episode 1: 0.8 to 1.2 s for 5 frames"):
        spans(copied, from_timestamp=[0.0, 0.8, 1.2, 2.0])
    with pytest.raises(DatasetError, match="overlap for episodes 1 and 2, in the same file"):
        spans(copied, from_timestamp=[0.0, 0.7, 0.9, 2.0], to_timestamp=[0.7, 1.2, 1.7, 2.6])
    with pytest.raises(DatasetError, match="the first is episode 3"):
        spans(copied, from_timestamp=[0.0, 0.7, 1.2, float("nan")], to_timestamp=[0.7, 1.2, 2.0, 2.6])
    assert len(read_spans(read_info(copied, episodes="0:3"), HIGH).start) == 3, "the remedy in the message"


def test_a_repo_id_is_looked_up_in_lerobots_cache(dataset_dir, tmp_path, monkeypatch):
    shutil.copytree(dataset_dir / "meta", tmp_path / "me" / "blocks" / "meta")
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    info = read_info("me/blocks")
    assert (info.repo_id, info.root, info.commit) == ("me/blocks", tmp_path / "me" / "blocks", None)


def test_a_repo_id_that_is_nowhere(tmp_path, monkeypatch):
    def resolve(repo, kind, revision, patterns):
        assert (kind, revision, patterns) == ("dataset", "main", ["meta/*"])
        raise FileNotFoundError(f"dataset {repo} is nowhere")

    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    monkeypatch.setattr("wallx_jax.utils.hub.resolve", resolve)
    message = f"^dataset me/blocks is nowhere \\(lerobot's cache {tmp_path} has no me/blocks either\\)$"
    with pytest.raises(FileNotFoundError, match=message):
        read_info("me/blocks", revision="main")
