"""Statistics from the command line: a dataset by its name or a configuration, a table, and a file to train with."""

import json
import subprocess
import sys
from pathlib import Path

import compute_norm_stats
import numpy as np
import pytest
from absl.testing import flagsaver
from bench import benchmark_stats
from helpers import synthetic, tiny_run

from wallx_jax.config import resolve
from wallx_jax.config.command_line import CommandLineError
from wallx_jax.data.build import load_stats
from wallx_jax.data.datasets import open_datasets
from wallx_jax.data.lerobot import LeRobotSource, read_info
from wallx_jax.data.normalize import load_norm_stats
from wallx_jax.data.stats import compute_stats
from wallx_jax.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]
FRAMES, DIMS = 1000, 3


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Three table files and no video."""
    root = tmp_path_factory.mktemp("stats") / "walk"
    benchmark_stats.write_dataset(root, FRAMES, DIMS, files=3)
    return root


@pytest.fixture
def run(tmp_path, capsys):
    """run(config, flag=value) -> (what was printed, what went to stderr)."""

    def call(config=None, **values):
        with flagsaver.flagsaver(**{"output": str(tmp_path / "norm_stats.json")} | values):
            compute_norm_stats.main(config)
        return capsys.readouterr()

    return call


def test_of_a_dataset(run, tables, tmp_path):
    out, err = run(dataset=str(tables))
    table = LeRobotSource(read_info(tables), 1, []).table
    table.load()
    states, actions = table.state, table.action
    read = load_norm_stats(tmp_path)
    for part, values in ((read.state, states), (read.action, actions)):
        values = values.astype(np.float64)
        np.testing.assert_array_equal(part.q01, np.quantile(values, 0.01, axis=0))
        np.testing.assert_array_equal(part.q99, np.quantile(values, 0.99, axis=0))
        np.testing.assert_allclose(part.mean, values.mean(axis=0))
    content = json.loads((tmp_path / "norm_stats.json").read_text())
    assert set(content) == {"norm_stats"} and set(content["norm_stats"]) == {"observation.state", "action"}
    assert out.count("joint_2") == 2 and f"{read.action.q99[1]:.5g}" in out and "norm_stats.json" in out
    assert "reading walk: 100%" in err and "3/3" in err and "reading" not in out


def test_of_parts_of_features_into_a_directory(run, tables, tmp_path):
    run(dataset=str(tables), state_key="action[1:2],observation.state[0:2]", output=str(tmp_path / "new" / "folder"))
    read = load_norm_stats(tmp_path / "new" / "folder", "action[1:2],observation.state[0:2]", "action")
    whole = compute_stats(tables)
    assert read.state.q99.tolist() == [whole.action.q99[1], *whole.state.q99[:2]]


def test_of_a_configuration_as_training_reads_it(run, dataset_dir, tmp_path):
    robot = {"right": "action[7:14]", "still": "action[6:7]"}, {"right": "observation.state[7:14]"}
    config = tiny_run.run_config("model", dataset_dir, "out", relative_action_keys=("right",))
    config.dof_config, config.agent_pos_config = robot
    out, _ = run(config)
    assert "joint_7" in out and "minus the state's joint_7" in out and "never moves" in out
    (part,) = open_datasets(resolve(config))
    computed = load_stats(part.settings, part.source)
    config.norm_stats_path = str(tmp_path / "norm_stats.json")
    (part,) = open_datasets(resolve(config))
    read = load_stats(part.settings, part.source)
    np.testing.assert_array_equal(read.action.q01, computed.action.q01)
    assert read.relative_to == (*range(7), -1) and read.horizon == 4
    _, actions = synthetic.episode_table(0)
    assert read.action.min[7] == actions[0, synthetic.CONSTANT_DIM]


def test_of_several_datasets(run, dataset_dir, tables, tmp_path):
    entry = {"repo_id": str(dataset_dir), "dof_config": {"arm": "action[0:7]"}}
    config = tiny_run.run_config("model", dataset_dir, "out", datasets={"seven": entry})
    run(config, output=str(tmp_path / "stats"))
    assert len(load_norm_stats(tmp_path / "stats" / "synthetic", action_key="action").action) == 14
    assert len(load_norm_stats(tmp_path / "stats" / "seven", action_key="action[0:7]").action) == 7
    with pytest.raises(CommandLineError, match="several datasets; give a directory"):
        run(config)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"dataset": "nobody/nothing"}, "error: .*nobody/nothing"),
        ({"dataset": "TABLES", "state_key": "state"}, "no feature 'state' .*'observation.state'"),
        ({"dataset": "TABLES", "action_key": "action[2:9]"}, "goes beyond the 3 dims"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(run, tables, tmp_path, values, match):
    with pytest.raises(SystemExit, match=match):
        run(**{key: str(tables) if value == "TABLES" else value for key, value in values.items()})
    assert not list(tmp_path.iterdir())


def test_settings_that_do_not_fit(run, dataset_dir):
    config = tiny_run.run_config("model", dataset_dir, "out", dof_config={"arm": 13})
    with pytest.raises(ConfigError, match=r"(?s)sums to 13.*synthetic offers.*vector action: 14 dims"):
        run(config)
    with pytest.raises(CommandLineError, match="of what"):
        run()
    with pytest.raises(CommandLineError, match="give one of them"):
        run(config, dataset=str(dataset_dir))
    with pytest.raises(CommandLineError, match="go with --dataset"):
        run(config, state_key="observation.state")


@pytest.mark.medium
def test_command_line_without_torch(tables, tmp_path):
    """The script as a program: it imports neither torch nor lerobot, which reading a table does not need."""
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['lerobot'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, "scripts/compute_norm_stats.py", "--dataset", str(tables)]
    done = subprocess.run([*command, "--output", str(tmp_path / "out.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(load_norm_stats(tmp_path / "out.json").action) == DIMS
    assert "reading walk: 100%" in done.stderr and done.stdout.endswith("out.json\n")
    wrong = subprocess.run([*command, "--ouput=x"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "ouput" in wrong.stderr and "Traceback" not in wrong.stderr


def test_benchmark(tmp_path, capsys, monkeypatch):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(
        sys, "argv", ["benchmark_stats.py", "--frames", "900", "--folder", str(tmp_path), "--json", str(out)]
    )
    benchmark_stats.main()
    figures = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == figures and figures["frames"] == 900
    for name in ("absolute", "relative"):
        assert figures[name]["frames_per_second"] == 900 / figures[name]["seconds"] > 0
    assert (
        figures["peak_rss_bytes_before"]
        <= figures["absolute"]["peak_rss_bytes"]
        <= figures["relative"]["peak_rss_bytes"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"], "temporary files are gone"
