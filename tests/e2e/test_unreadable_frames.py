"""A frame that cannot be decoded in mid-run: one line that names it, or, if so set, another frame in its place."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from helpers import edits, synthetic, tiny_run

import wallx_jax.train
from wallx_jax.checkpoints.layout import latest_step
from wallx_jax.data.errors import DatasetError
from wallx_jax.data.pipeline import DataLoader
from wallx_jax.training.loop import UnreadableData

BAD = (4, 9, 10, 17)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    tiny_run.use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    root = synthetic.write_dataset(tmp_path_factory.mktemp("damaged") / "damaged", camera_type="image")
    (camera, *_) = synthetic.CAMERAS
    images = edits.column(root, edits.DATA, camera)
    for frame in BAD:
        images[frame] = {"bytes": images[frame]["bytes"][:50], "path": None}
    edits.set_column(root, edits.DATA, camera, images)
    return root


def train(model, dataset, folder, **changes):
    config = tiny_run.run_config(model, dataset, folder, eval_interval=0, **changes)
    wallx_jax.train.run(config)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.medium
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.multiprocess])])
def test_the_run_saves_and_ends_with_one_line_and_goes_on_when_mended(
    model_dir, damaged, dataset_dir, tmp_path, capsys, restored_state, workers
):
    run, settings = tmp_path / "run", {"num_workers": workers, "num_training_steps": 12, "log_interval": 1}
    config = tiny_run.run_config(model_dir, damaged, run, eval_interval=0, save_interval=100, **settings)
    with pytest.raises(SystemExit) as exit:
        wallx_jax.train.main(config)
    assert exit.value.code == os.EX_DATAERR == 65
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    update, name, place = re.match(
        r"error: update (\d+): (\w+): (episode [0-3], frame [0-9]): .*cam_high", line
    ).groups()
    assert name == "damaged" and "file-000.parquet" in line
    done = int(update) - 1
    assert f"the {done} updates before it are saved as step {done}" in line
    assert latest_step(run) == done

    lines = train(model_dir, damaged, run, resume__ckpt="latest", unreadable_frames="skip", **settings)
    whole = train(model_dir, damaged, tmp_path / "whole", unreadable_frames="skip", **settings)
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]


@pytest.mark.medium
def test_a_held_out_frame_that_cannot_be_read_costs_no_update(model_dir, tmp_path):
    root = synthetic.write_dataset(tmp_path / "odd", camera_type="image")
    (camera, *_) = synthetic.CAMERAS
    images = edits.column(root, edits.DATA, camera)
    images[-1] = {"bytes": images[-1]["bytes"][:50], "path": None}  # always among the frames of a validation
    edits.set_column(root, edits.DATA, camera, images)
    config = tiny_run.run_config(model_dir, root, tmp_path / "run", save_interval=100, eval_interval=2)
    with pytest.raises(UnreadableData, match="^validation after update 2: odd: episode 3, .* saved as step 2"):
        wallx_jax.train.run(config)
    assert latest_step(tmp_path / "run") == 2


@pytest.mark.medium
def test_a_first_batch_that_cannot_be_read_saves_nothing(model_dir, damaged, tmp_path, monkeypatch):
    def broken(self):
        raise ValueError("episode 0, frame 3: NaN")

    monkeypatch.setattr(DataLoader, "__next__", broken)
    with pytest.raises(UnreadableData, match="update 1: episode 0, frame 3: NaN; nothing was trained"):
        train(model_dir, damaged, tmp_path / "run", num_training_steps=4)
    assert latest_step(tmp_path / "run") is None


@pytest.mark.medium
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.multiprocess])])
def test_skipped_frames_are_counted_and_a_resumed_run_is_the_same(model_dir, damaged, tmp_path, capsys, workers):
    settings = {"unreadable_frames": "skip", "num_workers": workers, "save_interval": 6, "log_interval": 6}
    whole = train(model_dir, damaged, tmp_path / "whole", num_training_steps=12, **settings)
    assert whole[-1]["skipped_frames"] == len(BAD)
    err = capsys.readouterr().err
    assert err.count("frame skipped: damaged: episode") == len(BAD) and "episode 0, frame 4: " in err
    parted = tmp_path / "parted"
    shutil.copytree(tmp_path / "whole", parted)
    shutil.rmtree(parted / "checkpoints" / "12")
    again = train(model_dir, damaged, parted, num_training_steps=12, resume__ckpt="latest", **settings)
    assert again[-1]["loss"] == whole[-1]["loss"] and np.isfinite(again[-1]["loss"])


def test_what_a_run_would_stop_at_is_said_before(model_dir, damaged, dataset_dir, tmp_path):
    """The first frame of a camera, and values that are missing."""
    first = shutil.copytree(damaged, tmp_path / "first")
    (camera, *_) = synthetic.CAMERAS
    images = edits.column(first, edits.DATA, camera)
    edits.set_column(first, edits.DATA, camera, [{"bytes": b"no image", "path": None}, *images[1:]])
    with pytest.raises(DatasetError, match=f"first cannot be trained on:\n  - {camera}: .*episode 0, frame 0"):
        train(model_dir, first, tmp_path / "run")
    states = edits.column(damaged, edits.DATA, synthetic.STATE)
    states[20][3] = float("nan")
    edits.set_column(first, edits.DATA, synthetic.STATE, states)
    message = "  - state: NaN in 1 values of joint_3, the first at episode 3, frame 0; repair these frames"
    with pytest.raises(DatasetError, match=message) as error:
        train(model_dir, first, tmp_path / "run", unreadable_frames="skip")
    assert "cam_high" not in str(error.value)
    assert not (tmp_path / "run").exists()
