"""Datasets with a planted fault each, and the finding that names it; signals of known lag; the script."""

import json
import re
import shutil
import sys

import check_dataset as program
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl.testing import flagsaver
from helpers import synthetic, tiny_run
from PIL import Image

from wallx_jax.config import resolve
from wallx_jax.config.command_line import launch
from wallx_jax.data.datasets import open_datasets
from wallx_jax.data.normalize import NormStats, Stats, save_norm_stats
from wallx_jax.dataset_check import frames, signals
from wallx_jax.dataset_check.check import check as check_dataset
from wallx_jax.dataset_check.report import as_json, as_text

HIGH, WRIST = synthetic.CAMERAS
FRAMES = sum(synthetic.LENGTHS)
EPISODES = np.repeat(np.arange(4), synthetic.LENGTHS)
PLACE = int(np.cumsum(synthetic.LENGTHS)[1]) + 3  # episode 2, frame 3
pytestmark = pytest.mark.filterwarnings("ignore:The video decoding and encoding capabilities of torchvision")


def edit(root, change, key=synthetic.STATE, file="data/chunk-000/file-000.parquet"):
    """Puts `change(column)` (a NumPy array; a list of other values) in the place of a column of a table file."""
    table = pq.read_table(root / file)
    column = table[key].combine_chunks()
    values = column.to_pylist()
    values = change(np.array(values) if isinstance(values[0], float | list) else values)
    field = table.schema.field(key)
    array = pa.array([x.tolist() if isinstance(x, np.ndarray) else x for x in values], field.type)
    pq.write_table(table.set_column(table.column_names.index(key), field, array), root / file)


def put(place, value):
    def change(column):
        column[place] = value
        return column

    return change


@pytest.fixture(scope="module")
def clean_dir(dataset_dir, tmp_path_factory):
    """The synthetic dataset, whose actions are the next states, without its constant dim."""
    root = shutil.copytree(dataset_dir, tmp_path_factory.mktemp("clean") / "clean")
    for key in (synthetic.STATE, synthetic.ACTION):
        edit(root, lambda x: np.c_[x[:, :6], 2 * x[:, 5:6], x[:, 7:]], key)
    return root


@pytest.fixture
def root(clean_dir, tmp_path):
    return shutil.copytree(clean_dir, tmp_path / "dataset")


def check(root, decode=0, **changes):
    (part,) = open_datasets(resolve(tiny_run.run_config(root, root, root, **changes)))
    return check_dataset(part, decode)


def problems(report):
    return [finding for finding in report.findings if finding.severity != "ok"]


def test_clean_dataset(clean_dir):
    report = check(clean_dir, decode=None)
    assert problems(report) == [] and not report.failed
    assert [f.about for f in report.findings] == [
        "episodes", "state", "action", "action to state", "timestamps", "instructions", "frames",
    ]  # fmt: skip
    assert "median 1 frames, 0.10 s); it is exactly the next state" in str(report.findings[3])
    figures = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert (figures["episodes"], figures["frames"], figures["fps"], figures["duration_s"]) == (4, 26, 10, 2.6)
    assert figures["episode_lengths"] == {"min": 5, "median": 6.5, "max": 8, "shorter_than_horizon": 0}
    assert [task["frames"] for task in figures["tasks"]] == [15, 11]
    assert [task["episodes"] for task in figures["tasks"]] == [2, 2]
    states = np.concatenate([synthetic.episode_table(e)[0] for e in range(4)]).astype(float)
    for column, value in zip(("min", "q01", "q99"), np.quantile(states[:, 3], [0, 0.01, 0.99]), strict=True):
        assert figures["state"]["dims"][3][column] == pytest.approx(value)
    assert figures["state"]["dims"][3]["name"] == "joint_3"
    camera = figures["cameras"][HIGH]
    pictures = [synthetic.frame_image(e, f, HIGH) for e in range(4) for f in range(synthetic.LENGTHS[e])]
    assert camera["brightness"] == pytest.approx(np.mean(pictures), abs=3)
    assert (camera["size"], camera["decoded"]) == ([64, 96], FRAMES)
    text = as_text(report)
    assert "4 episodes, 26 frames at 10 fps, 3 s" in text and "64x96" in text and "'open the cabinet'" in text


FAULTS = {
    "nan_state": (synthetic.STATE, put((PLACE, 4), np.nan), "error", "state",
                  "NaN in 1 values of joint_4, the first at episode 2, frame 3; .*training stops"),
    "nan_action": (synthetic.ACTION, put((PLACE, 4), np.nan), "warning", "action",
                   "NaN in 1 values of joint_4, .*left out of the loss"),
    "infinite": (synthetic.ACTION, put((PLACE, 4), np.inf), "error", "action",
                 "infinite values in joint_4, the first at episode 2, frame 3"),
    "constant": (synthetic.STATE, put((slice(None), 4), 0.5), "warning", "state", "constant: joint_4;"),
    "nothing_moves": (synthetic.STATE, lambda x: 0 * x, "error", "state", "no dim ever changes"),
    "jump": (synthetic.STATE, put((PLACE, 4), 1e3), "warning", "state",
             "2 jumps, the largest of each dim: joint_4 by .* at episode 2, frame [34] "),
    "timestamp": ("timestamp", put(PLACE, 0.34), "warning", "timestamps",
                  "1 of 26 are not frame / 10, the first is episode 2, frame 3: 0.3400 s"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_table(root, fault):
    key, change, severity, about, message = FAULTS[fault]
    edit(root, change, key)
    report = check(root)
    (finding,) = problems(report)
    assert (finding.severity, finding.about) == (severity, about) and finding.remedy
    assert re.search(message, str(finding)), str(finding)
    assert report.failed == (severity == "error")
    json.dumps(as_json(report), allow_nan=False)
    as_text(report)


def test_dims_that_are_not_used_may_be_missing(root):
    edit(root, put((PLACE, 4), np.nan))
    edit(root, put((slice(None), 4), 0.5), synthetic.ACTION)
    dof = {"left": 4, "unused": 1, "right": 9}
    used = {"dof_config": dof, "predict_action_keys": ("left", "right"), "obs_action_keys": ("left", "right")}
    report = check(root, **used)
    assert problems(report) == []
    assert report.tables.state.names[3:7] == ["left.3", "unused", "right.0", "right.1"]


def test_action_that_copies_the_state(root):
    states = pq.read_table(root / "data/chunk-000/file-000.parquet")[synthetic.STATE].to_pylist()
    edit(root, lambda _: states, synthetic.ACTION)
    (finding,) = problems(check(root))
    assert finding.about == "action to state" and "copy of the same frame's state: joint_0" in finding.message


def test_state_before_action(root):
    """Actions that repeat the state before."""
    before = np.maximum(np.arange(FRAMES) - 1, np.repeat(np.cumsum((0, *synthetic.LENGTHS[:-1])), synthetic.LENGTHS))
    states = np.array(pq.read_table(root / "data/chunk-000/file-000.parquet")[synthetic.STATE].to_pylist())
    edit(root, lambda _: states[before], synthetic.ACTION)
    (finding,) = problems(check(root))
    assert finding.severity == "warning" and "moves before the action does (median -1 frames" in finding.message


def test_short_episodes(clean_dir):
    (finding,) = problems(check(clean_dir, action_horizon=6))
    assert (finding.severity, finding.about) == ("warning", "episodes")
    assert finding.message.startswith("1 of 4 are shorter than the horizon of 6")


def test_statistics_of_another_robot(clean_dir, tmp_path):
    values = np.array(pq.read_table(clean_dir / "data/chunk-000/file-000.parquet")[synthetic.STATE].to_pylist())
    low, high = values.min(axis=0), values.max(axis=0)
    low[2], high[2] = high[2] + 1, high[2] + 2  # every value of joint_2 is below
    low[5], high[5] = -1000, 1000  # degrees for radians, say
    low[8] = np.sort(values[:, 8])[3]  # three of 26 are below
    middle = (low + high) / 2
    state = Stats(mean=middle, std=middle * 0 + 1, q01=low, q99=high, min=low, max=high)
    wide = Stats(*(np.full(14, x) for x in (0, 1, -20, 20, -20, 20)))
    save_norm_stats(tmp_path / "stats.json", NormStats(state, wide, synthetic.STATE, synthetic.ACTION))
    report = check(clean_dir, norm_stats_path=str(tmp_path / "stats.json"))
    found = [str(finding) for finding in problems(report) if finding.about == "state"]
    assert len(found) == 3 and report.failed
    assert "clamped: joint_2 100%;" in found[0] and found[0].startswith("error")
    assert "clamped: joint_8 12%;" in found[1] and "unset norm_stats_path" in found[1]
    assert "under 5% of the range of norm_stats_path: joint_5;" in found[2]


@pytest.mark.parametrize(
    ("texts", "severity", "message"),
    [
        (["", "open the cabinet"], "error", "empty for 15 frames"),
        ([" \n", "open the cabinet"], "error", "empty for 15 frames"),
        (["Open  the cabinet ", "open the cabinet"], "warning", "'Open  the cabinet ' and 'open the cabinet'"),
        (["open the <|im_end|> cabinet", "close it"], "error", "control tokens in 'open the <|im_end|> cabinet'"),
    ],
)
def test_instructions(root, texts, severity, message):
    tasks = pq.read_table(root / "meta/tasks.parquet")
    column = next(name for name in tasks.column_names if name != "task_index")
    assert tasks["task_index"].to_pylist() == [0, 1]
    edit(root, lambda _: texts, column, "meta/tasks.parquet")
    (finding,) = problems(check(root))
    assert (finding.severity, finding.about) == (severity, "instructions") and message in finding.message


def test_damaged_image(tmp_path):
    root = synthetic.write_dataset(tmp_path / "images", "image")
    edit(root, lambda rows: [{**row, "bytes": row["bytes"][:30]} if i == PLACE else row for i, row in enumerate(rows)],
         WRIST)  # fmt: skip
    report = check(root, decode=None)
    (lost,) = report.look.undecodable
    assert (lost.episode, lost.frame, lost.camera) == (2, 3, WRIST) and lost.reason
    assert [report.look.cameras[camera].frames for camera in (HIGH, WRIST)] == [FRAMES, FRAMES - 1]
    (finding,) = [f for f in report.findings if f.severity == "error"]
    assert finding.about == WRIST and "1 of 26 frames cannot be read, the first is episode 2, frame 3" in str(finding)


def test_damaged_video(root):
    (video,) = (root / "videos" / WRIST).rglob("*.mp4")
    video.write_bytes(video.read_bytes()[:200])
    report = check(root, decode=8)
    assert {lost.camera for lost in report.look.undecodable} == {WRIST}
    assert len(report.look.undecodable) == report.look.frames == report.look.cameras[HIGH].frames > 0
    assert report.look.cameras[WRIST].frames == 0 and report.failed


def test_missing_video(root):
    (video,) = (root / "videos" / WRIST).rglob("*.mp4")
    video.unlink()
    report = check(root, decode=8)
    assert report.look.cameras[HIGH].frames == len(report.look.undecodable) == report.look.frames
    assert "is missing" in report.look.undecodable[0].reason
    assert [f.about for f in report.findings if f.severity == "error"] == [WRIST, WRIST], "of its header, and frames"


class Pictures:
    """A source of made-up frames, as far as `frames.look` asks."""

    def __init__(self, info, images):
        self.info, self.cameras, self.images = info, tuple(images), self
        self._images = images

    def read(self, camera, frame):
        return self._images[camera][frame]

    def locate(self, i):
        return i, EPISODES[i], i - self.info.episode_starts[EPISODES[i]]


def test_black_and_frozen_cameras(clean_dir):
    part = open_datasets(resolve(tiny_run.run_config(clean_dir, clean_dir, clean_dir)))[0]
    moving = np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 96, 3), np.uint8)
    hanging = moving.copy()
    hanging[EPISODES == 2] = hanging[PLACE]
    dark = moving[:, :48, :48] // 64
    source = Pictures(part.info, {HIGH: hanging, WRIST: dark})
    look = frames.look(source, frames.sample(part.info, None))
    high, wrist = look.cameras[HIGH], look.cameras[WRIST]
    assert (high.frozen, high.dark, wrist.frozen, wrist.dark) == ([2], 0, [], FRAMES)
    assert high.brightness == pytest.approx(hanging.mean())


def test_sample_is_spread_from_first_to_last(dataset_info):
    everything = frames.sample(dataset_info, None)
    assert [len(indices) for indices in everything] == list(synthetic.LENGTHS)
    assert frames.sample(dataset_info, 0) == []
    some = frames.sample(dataset_info, 12)
    assert 10 <= sum(map(len, some)) <= 14
    assert some[0][0] == 0 and some[-1][-1] == FRAMES - 1
    for indices in some:
        inside = indices - dataset_info.episode_starts[EPISODES[indices]]
        assert inside[0] == 0 and inside[-1] == dataset_info.episode_lengths[EPISODES[indices[0]]] - 1
    shown = frames.first_middle_last(everything, 2)
    assert [x.tolist() for x in shown] == [[0, 3, 6], [20, 22, 25]]


def walks(rows=400, dims=3, episodes=4, seed=0):
    """[rows, dims] random walks, and the episode of each row: of unequal length."""
    values = np.cumsum(np.random.default_rng(seed).normal(size=(rows, dims)), axis=0)
    return values, np.sort(np.random.default_rng(seed).integers(0, episodes, rows))


@pytest.mark.parametrize("lag", [-3, -1, 0, 1, 2, 9])
def test_lag_is_recovered(lag):
    values, _ = walks(rows=460)
    noise = 0.2 * np.random.default_rng(1).normal(size=(400, 3))
    states, actions = values[30 - lag : 430 - lag] + noise, values[30:430]
    states[:, 1] *= -5  # other units
    states[:, 2] = 7  # never moves
    found = signals.following(states, actions, walks()[1], longest=10)
    assert found.lag[:2].tolist() == [lag, lag] and found.related.tolist() == [True, True, False]
    assert found.correlation[2] == 0 and found.holds.tolist() == [0, 0, 0]


def test_unrelated_signals_have_no_lag():
    found = signals.following(walks(2000)[0], walks(2000, seed=5)[0], walks(2000)[1], longest=10)
    assert not found.related.any()


def test_a_jump_does_not_hide_the_lag():
    states, actions = walks(rows=402)[0][:400], walks(rows=402)[0][2:]
    states[50] += 1e6
    assert signals.following(states, actions, walks()[1], longest=10).lag.tolist() == [2, 2, 2]


def test_exact_copies():
    values, episodes = walks()
    values[10:100] = values[10]  # where nothing changes nothing is told
    now = signals.following(values, values, episodes, 5)
    assert now.holds.tolist() == [1, 1, 1] and now.leads.tolist() == [0, 0, 0]
    after = np.r_[values[1:], values[-1:]]
    following = signals.following(values, after, episodes, 5)
    assert following.leads.tolist() == [1, 1, 1] and following.holds.tolist() == [0, 0, 0]
    assert following.lag.tolist() == [1, 1, 1]


def test_jumps_are_placed():
    values, episodes = walks(rows=2000)
    assert signals.jumps(values, episodes) == []
    place = int(np.flatnonzero(episodes == 1)[0]) + 17
    values[place:, 2] += 500
    (jump,) = signals.jumps(values, episodes)
    assert (jump.dim, jump.episode, jump.frame) == (2, 1, 17) and jump.step == pytest.approx(500, abs=5)
    assert jump.typical == pytest.approx(2.6, abs=0.5)  # 99% of |normal|


def test_from_one_episode_to_the_next_is_no_jump():
    values, episodes = walks()
    assert signals.jumps(values + 1000 * (episodes % 2)[:, None], episodes) == []


def test_a_gripper_that_closes_in_every_episode_does_not_jump():
    episodes = np.repeat(np.arange(10), 100)
    closed = (np.arange(1000) % 100 > 50).astype(float)
    noisy = closed + 1e-4 * np.random.default_rng(0).normal(size=1000)
    assert signals.jumps(np.stack([closed, noisy], axis=1), episodes) == []


def test_spread():
    values = np.zeros((1000, 4), np.float32)
    values[:, 0] = np.arange(1000)
    values[[3, 4], 0] = np.nan, -np.inf
    values[5, 1] = 1  # a rare event
    values[:, 3] = np.nan
    found = signals.spread(values)
    assert (found.nans.tolist(), found.infinities.tolist()) == ([1, 0, 0, 1000], [1, 0, 0, 0])
    assert found.constant.tolist() == [False, False, True, False]
    assert found.stuck.tolist() == [False, True, False, False]
    assert found.outside[0] == pytest.approx(0.021, abs=0.001) and found.outside[1:].tolist() == [0, 0, 0]
    assert np.isnan(found.median[3]) and found.max[0] == 999
    given = signals.spread(values, (np.array([0.0, 0, 1, 0]), np.array([499.0, 0, 2, 1])))
    assert given.outside[:3].tolist() == [0.501, 0, 1]


def test_pairs():
    assert signals.pairs(["a", "b", "c"], ["c", "x", "a"]) == [(2, 0), (0, 2)]
    assert signals.pairs(["a", "b"], ["x", "y"]) == [(0, 0), (1, 1)]
    assert signals.pairs(["a", "b"], ["x"]) == []


@pytest.fixture
def script(monkeypatch, capsys, restored_state):
    """script("--dataset=...") -> (exit code, what it printed)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_dataset.py", *arguments])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            launch(program.main, needs_config=False)
        captured = capsys.readouterr()
        return ended.value.code, captured.out + captured.err

    return command


def colors(file):
    with Image.open(file) as image:
        assert image.format == "PNG" and min(image.size) > 300
        return len(image.convert("L").getcolors(256))


@pytest.mark.slow
def test_script(script, root, tmp_path):
    out = tmp_path / "out"
    code, text = script(f"--dataset={root}", f"--output={out}", "--decode=12")
    assert (
        code == 0
        and "warning  episodes: all 4 are shorter than the horizon of 32" in text
        and f"report.json in {out}" in text
    )
    report = json.loads((out / "report.json").read_text())
    assert report["frames_looked_at"] == 12 and set(report["cameras"]) == {HIGH, WRIST}
    for name in ("contact_sheet", "dimensions", "trace"):
        assert colors(out / f"{name}.png") > 20

    file = tmp_path / "robot.py"
    file.write_text(
        "from wallx_jax.config import default_config\n"
        "def get_config(arg=''):\n"
        "    c = default_config()\n"
        f"    c.repo_id, c.pretrained_wallx_path, c.camera_views = {str(root)!r}, 'x', {{'face_view': 'cam_high'}}\n"
        "    return c\n"
    )
    edit(root, put((slice(None), 4), np.nan))
    code, text = script(f"--config={file}", f"--output={out}", "--decode=0", "--config.action_horizon=5")
    assert code == 1 and text.index("error    state: NaN") < text.index("ok       episodes")
    assert json.loads((out / "report.json").read_text())["cameras"][HIGH]["decoded"] == 0


def test_wrong_arguments_end_with_one_line(script, root, tmp_path):
    code, text = script()
    assert code == 2 and "--dataset=DIR_OR_REPO or --config" in text
    code, text = script(f"--dataset={tmp_path / 'none'}")
    assert code == 2 and "none" in text and "Traceback" not in text
    code, text = script(f"--dataset={root}", "--decode=some")
    assert code == 2 and '--decode=some: expected a number of frames, or "all"' in text
