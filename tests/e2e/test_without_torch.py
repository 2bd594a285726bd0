"""What the `train` extra promises: recording, checking, training, evaluating, plotting and exporting without PyTorch,
lerobot and what they bring along, whether these are installed or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Imported by every Python process before anything else.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "torchcodec", "lerobot", "datasets", "pandas"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.multiprocess
def test_from_recording_to_export(run, tmp_path):
    with pytest.raises(AssertionError, match="torch is blocked"):
        run("-c", "import torch")
    run("scripts/demo.py", f"--workdir={tmp_path}", "--episodes=20", "--steps=3")
    assert json.loads((tmp_path / "results.json").read_text())["held_out_frames"] > 0
    dataset, trained = tmp_path / "dataset", tmp_path / "run"
    run("scripts/check_dataset.py", f"--dataset={dataset}", "--decode=10", f"--output={tmp_path / 'check'}")
    run("scripts/compute_norm_stats.py", f"--dataset={dataset}", f"--output={tmp_path / 'stats'}")
    settings = [f"--config.pretrained_wallx_path={tmp_path / 'model'}", f"--config.repo_id={dataset}"]
    few = ["--config.frame_cache=None", "--config.num_workers=1", "--config.num_training_steps=2"]
    few += ["--config.batch_size_per_gpu=4"]
    run("-m", "wallx_jax.train", "--config=configs/demo.py", f"--workdir={tmp_path / 'workers'}", *settings, *few)
    plots = [f"--out={tmp_path / 'openloop'}", "--episodes=1", "--steps=1"]
    run("scripts/openloop_plot.py", f"--checkpoint={trained}", *plots)
    run("convert/export.py", f"--checkpoint={trained}", f"--output={tmp_path / 'exported'}")
    pictures = {path.name for path in tmp_path.rglob("*.png")}
    assert {"demo.png", "contact_sheet.png", "dimensions.png"} <= pictures
    assert (tmp_path / "exported" / "model.safetensors").stat().st_size > 10_000
