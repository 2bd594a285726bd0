"""The doctor: what it says of an installation, and of checkpoints whole and broken."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny_run
from orbax.checkpoint import v1 as ocp

from wallx_jax import doctor, train
from wallx_jax.checkpoints.checkpointer import Checkpointer
from wallx_jax.checkpoints.inspection import inspect_checkpoint
from wallx_jax.checkpoints.layout import read_model_config
from wallx_jax.config import flatten, resolve
from wallx_jax.data.build import split_datasets
from wallx_jax.data.datasets import open_datasets
from wallx_jax.models.params import abstract_params
from wallx_jax.training import init
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.training.state import create_state
from wallx_jax.utils import devices, tree

ROOT = Path(__file__).parents[1]


class Position:
    def get_state(self):
        return {"batches_drawn": 7}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def written(model_dir, dataset_dir, tmp_path_factory):
    """A run directory with the steps 2 and 4, as training writes them, of untrained weights."""
    folder = tmp_path_factory.mktemp("doctor") / "run"
    config = tiny_run.run_config(model_dir, dataset_dir, folder)
    specs = open_datasets(resolve(config))
    origin, processors = init.plan_datasets(specs)
    optimizer = make_optimizer(specs[0].settings.optim, 4)
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), abstract_params(origin.config))
    assets = folder / "assets"
    train.write_assets(split_datasets(specs, processors), origin.files, assets)
    with Checkpointer(folder) as checkpointer:
        for step in (2, 4):
            state = create_state(params, optimizer)
            checkpointer.save(step, state, Position(), flatten(config), origin.config, assets, loss=0.5)
    return folder


@pytest.fixture
def run(written, tmp_path):
    """A copy to break."""
    return shutil.copytree(written, tmp_path / "run")


@pytest.fixture
def command(monkeypatch, capsys, restored_state):
    """Runs the doctor in this process: (exit message or None, output)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["doctor", *map(str, arguments)])
        failed = None
        try:
            doctor.main()
        except SystemExit as end:
            failed = end.code
        return failed, capsys.readouterr().out

    return call


@pytest.mark.medium
def test_a_run_is_whole(command, written):
    failed, text = command("--checkpoint", written)
    assert failed is None and text.endswith("nothing is wrong\n")
    assert "complete steps: 2, 4" in text and f"{written}/checkpoints/4, complete" in text
    assert "at step 4, loss 0.5" in text and "with the versions that are installed here" in text
    assert "resume       yes" in text and "7 batches drawn" in text
    specs = tree.flatten(abstract_params(read_model_config(written)))
    assert f"{sum(spec.size for spec in specs.values()):,}" in text
    assert "face_view, left_wrist_view" in text
    assert f"jax {jax.__version__}" in text and "XLA_PYTHON_CLIENT_PREALLOCATE=false" in text


def test_arrays_are_not_loaded(written, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("arrays were loaded")

    monkeypatch.setattr(ocp, "load_checkpointables", refuse)
    assert not inspect_checkpoint(written).problems


def rewrite(file: Path, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def smaller(metadata):
    metadata["model"]["num_hidden_layers"] = 1


BREAKS = {
    "no commit": (lambda step: (step / "commit_success.txt").unlink(), "complete steps: 2", None),
    "metadata cut": (
        lambda step: (step / "metadata/metadata.json").write_text('{"step": 4, '),
        "",
        "its metadata cannot be read",
    ),
    "metadata of another model": (
        lambda step: rewrite(step / "metadata/metadata.json", smaller),
        "",
        "does not fit .params.",
    ),
    "metadata without entries": (
        lambda step: rewrite(step / "metadata/metadata.json", lambda m: m.pop("model")),
        "",
        "metadata.json lacks model",
    ),
    "metadata a list": (
        lambda step: (step / "metadata/metadata.json").write_text("[]"),
        "",
        "metadata.json contains a JSON array; expected an object",
    ),
    "metadata an LFS pointer": (
        lambda step: (step / "metadata/metadata.json").write_text("version https://git-lfs.github.com/spec/v1"),
        "",
        "metadata.json is a Git LFS pointer",
    ),
    "metadata of other types": (
        lambda step: rewrite(step / "metadata/metadata.json", lambda m: m.update(loss="low")),
        "",
        "metadata.json: loss is 'low'; copy it again",
    ),
    "position of another type": (
        lambda step: rewrite(step / "data/position.json", lambda p: p.update(batches_drawn="7")),
        "",
        "its position in the data cannot be read",
    ),
    "arrays gone": (
        lambda step: max((step / "params").rglob("d/*"), key=lambda file: file.stat().st_size).unlink(),
        "",
        r"params/ has .* on disk, its arrays take .*copy it again",
    ),
    "index gone": (
        lambda step: [f.unlink() for f in (step / "params").iterdir() if f.is_file()],
        "",
        "its parameters cannot be read",
    ),
    "no tokenizer": (lambda step: (step / "assets/tokenizer.json").unlink(), "", "its preprocessing cannot be read"),
    "no data position": (lambda step: shutil.rmtree(step / "data"), "resume       no, it has state/ alone", None),
    "position gone": (
        lambda step: (step / "data/position.json").unlink(),
        "",
        "its position in the data cannot be read",
    ),
    "weights alone": (
        lambda step: [shutil.rmtree(step / item) for item in ("state", "data")],
        "resume       no, it contains only weights",
        None,
    ),
}


@pytest.mark.parametrize("damage", BREAKS)
def test_damage_is_told_in_a_line(run, damage):
    break_it, found, problem = BREAKS[damage]
    break_it(run / "checkpoints" / "4")
    checkup = inspect_checkpoint(run)
    assert found in "\n".join(checkup.findings)
    if problem is None:
        assert not checkup.problems
    else:
        assert any(re.search(problem, line) for line in checkup.problems), checkup.problems
    assert all("\n" not in line and "Traceback" not in line for line in checkup.problems)


def test_other_directories(command, model_dir, tmp_path):
    failed, text = command("--checkpoint", model_dir)
    assert failed is None and "a PyTorch directory" in text and "tokenizer of" in text
    broken = shutil.copytree(model_dir, tmp_path / "model")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    failed, _ = command("--checkpoint", broken)
    assert failed.startswith("error: its weights cannot be read") and len(failed.splitlines()) == 1
    failed, _ = command("--checkpoint", tmp_path / "nowhere")
    assert failed == f"error: there is no directory {tmp_path / 'nowhere'}"
    (tmp_path / "empty").mkdir()
    failed, _ = command("--checkpoint", tmp_path / "empty")
    assert "no complete checkpoint" in failed


def test_a_silent_fall_to_the_cpu_is_refused(command, monkeypatch):
    jax.config.update("jax_platforms", None)
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(devices, "cuda_plugins", lambda: {})
    failed, text = command()
    assert failed.startswith("error: this machine has 1 x NVIDIA H100") and "jax[cuda12]" in failed
    assert "NVIDIA       1 x NVIDIA H100" in text and "nothing is wrong" not in text
    assert command("--platform", "cpu")[0] is None
    jax.config.update("jax_platforms", None)
    assert "asks for the TPU" in command("--platform", "tpu")[0]


def test_packages_are_compared_with_what_is_asked_for(command, monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["numpy<1", "nowhere>=2"])
    failed, _ = command()
    assert "numpy<1 is wanted" in failed and "nowhere is not installed" in failed and len(failed.splitlines()) == 2


def test_small_shared_memory_is_a_problem(command, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=64 << 20))
    failed, text = command()
    assert "--shm-size" in failed and "num_workers=0" in failed


def test_caches_that_cannot_be_written_are_said(command, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    text = command()[1]
    assert f"{tmp_path / 'file'} is a file, no folder: set HF_HOME to another folder" in text
    assert f"{tmp_path / 'file'} is a file, no folder: set XDG_CACHE_HOME to another folder" in text


@pytest.mark.medium
def test_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "wallx_jax.doctor", "--checkpoint", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 1 and "platform cpu" in done.stdout
    assert done.stderr.startswith("error: no complete checkpoint") and len(done.stderr.splitlines()) == 1
