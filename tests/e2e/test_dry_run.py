"""--dry_run: the plan of a run, without loading weights or writing anything."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_run

import wallx_jax.train
from wallx_jax.checkpoints.layout import CheckpointError
from wallx_jax.config import resolve
from wallx_jax.data.datasets import open_datasets
from wallx_jax.data.fast import FastTokenizer
from wallx_jax.data.lerobot import LeRobotSource
from wallx_jax.models.params import abstract_params
from wallx_jax.training import init
from wallx_jax.utils import tree
from wallx_jax.utils.errors import ConfigError
from wallx_jax.weights.load import Weights, read_config
from wallx_jax.weights.safetensors_io import WeightsError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    tiny_run.use_devices(monkeypatch, 2)


@pytest.fixture
def plan_of(model_dir, dataset_dir, tmp_path, capsys, monkeypatch):
    """The printed plan; reading a weight or a frame is an error, and so is a trace in the save path."""

    def refuse(*_, **__):
        raise AssertionError("a dry run read data")

    monkeypatch.setattr(Weights, "read", refuse)
    monkeypatch.setattr(LeRobotSource, "__getitem__", refuse)

    def call(model=model_dir, save_path=tmp_path / "run", **changes):
        changes = {"mesh__fsdp": 2} | changes
        config = tiny_run.run_config(model, dataset_dir, save_path, **changes)
        assert wallx_jax.train.run(config, dry_run=True) is None
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().out

    return call


@pytest.mark.medium
def test_the_plan(plan_of, model_dir):
    text = plan_of(gradient_accumulation_steps=3, num_training_steps=20, num_warmup_steps=5, frame_cache="cache")
    specs = tree.flatten(abstract_params(read_config(model_dir)))
    assert re.search(rf"all +{sum(spec.size for spec in specs.values()):,} ", text)
    # 56 x 84 and 56 x 56 pixels in cells of 28 x 28.
    assert "of images: face_view 6, left_wrist_view 4) and 4 action tokens" in text
    assert "4 episodes, 26 frames at 10 fps (20 train, 6 held out)" in text
    assert "face_view = observation.images.cam_high 64x96 read at 56x84" in text
    # 2 samples x 2 devices x 3; an update takes more than half an epoch of 20 frames.
    assert "batch        12 = 2 samples x 2 copies x 3 micro-batches; 2 x cpu, mesh data 1, fsdp 2, tensor 1" in text
    assert "length       20 updates of 12 samples, 1.667 per epoch: 12 epochs" in text
    assert re.search(r"rate +(vlm|action_expert), peak 0\.001; .*: 0 at 0, 0\.001 at 5, .*, 0\.0001 at 20\n", text)
    sizes = re.search(r"parameters ([\d.]+) MiB, gradients ([\d.]+) MiB, optimizer ([\d.]+) MiB", text)
    parameters, gradients, optimizer = map(float, sizes.groups())
    assert gradients == pytest.approx(2 * parameters, abs=0.11) and optimizer == pytest.approx(2 * parameters, abs=0.11)
    assert "activations on top" in text and not Path("cache").exists()


def test_an_accelerator_is_measured_against_the_plan(model_dir, dataset_dir, tmp_path):
    config = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "run", mesh__fsdp=2)
    settings = resolve(config)
    specs = open_datasets(settings)
    source, processors = init.plan_datasets(specs)
    mesh = wallx_jax.train.connect_devices(settings)
    plan = wallx_jax.train.plan_run(config, specs, processors, source, mesh, None).plan
    assert "device has" not in str(plan) and "at the peak" not in str(plan), "a CPU has neither"
    update = plan.flops * plan.length.global_batch
    on_device = dataclasses.replace(plan, device_limit=80 << 30, peak_flops=update / 1800)
    assert "a device has 80.00 GiB)" in str(on_device)
    assert "at the peak of these devices 1.8e+03 s, and 2 h for the run" in str(on_device), "4 updates"
    assert "IT DOES NOT FIT" in str(dataclasses.replace(plan, device_limit=plan.memory.total - 1))


def test_what_is_frozen(plan_of):
    text = plan_of(freeze_vlm=True, action_expert_learning_rate=2e-3)
    assert re.search(r"vision tower .* frozen\n", text)
    assert re.search(r"decoder, action expert .* action_expert, peak 0\.002\n", text)
    text = plan_of(lora__rank=2)
    assert re.search(r"adapters .* vlm, peak 0\.001\n", text) and re.search(r"decoder, VLM expert .* frozen\n", text)


def test_fast_tokens(plan_of, dataset_dir, tmp_path):
    model = tiny_run.write_model(tmp_path / "qwen", qwen=True)
    FastTokenizer.fit(np.random.default_rng(0).uniform(-1, 1, (64, 4, 14)), vocab_size=400).save(tmp_path / "fast")
    text = plan_of(model, use_fast_tokenizer=True, action_tokenizer_path=str(tmp_path / "fast"))
    assert "up to 256 of FAST actions)" in text and "action tokens" not in text


def test_what_is_wrong_is_an_error_as_in_a_real_run(plan_of, model_dir, tmp_path):
    for changes, error, match in (
        ({"dof_config": {"arm": 13}}, ConfigError, "sums to 13.*has 14"),
        ({"learning_rates": ("^vison/=1e-5",)}, ConfigError, r"'\^vison/' matches no parameter .*\"vision\""),
        ({"lora__rank": 2, "lora__targets": ("decoder/", "visoin")}, ConfigError, "'visoin' matches no linear layer"),
        ({"max_length": 20}, ConfigError, "raise max_length"),
        ({"mesh__fsdp": 3}, ValueError, "does not fit 2 devices"),
        ({"platform": "tpu"}, wallx_jax.train.devices.DeviceError, "asks for the TPU"),
        ({"resume__ckpt": str(tmp_path / "gone")}, CheckpointError, "no such directory"),
    ):
        with pytest.raises(error, match=match):
            plan_of(**changes)
    broken = tiny_run.write_model(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(WeightsError):
        plan_of(broken)
    assert not (tmp_path / "run").exists()


def test_no_frame_is_cached_before_everything_is_checked(model_dir, dataset_dir, tmp_path):
    cache = tmp_path / "cache"
    config = tiny_run.run_config(
        model_dir, dataset_dir, tmp_path / "run", mesh__fsdp=2, frame_cache=str(cache), learning_rates=("^vison/=1",)
    )
    with pytest.raises(ConfigError, match="matches no parameter"):
        wallx_jax.train.run(config)
    assert not cache.exists()


def test_no_dataset_of_a_mixture_is_cached(plan_of, dataset_dir, tmp_path):
    text = plan_of(datasets={"other": {"repo_id": str(dataset_dir)}}, frame_cache=str(tmp_path / "cache"))
    assert text.count("4 episodes, 26 frames") == 2 and not (tmp_path / "cache").exists()


def test_folders_that_cannot_be_written_are_found(plan_of, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    folders = {"save_path": "file", "frame_cache": "file/below", "profile_save_path": "link"}
    with pytest.raises(ConfigError) as error:
        plan_of(profile=True, **{key: str(tmp_path / name) for key, name in folders.items()})
    assert [re.split(": | = ", text)[0] for text in error.value.errors] == list(folders)
    assert error.value.errors[0].endswith(f"{tmp_path / 'file'} is a file, no folder; choose another folder")
    assert error.value.errors[1].endswith(f"{tmp_path / 'file'} is a file, no folder; choose another folder")
    assert error.value.errors[2].endswith(f"{tmp_path / 'link'} is a broken link, no folder; choose another folder")
    with pytest.raises(ConfigError, match="save_path = '/proc/x/run': .*cannot be written"):
        plan_of(save_path="/proc/x/run")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != "m") == ["file", "link"]


def test_what_cannot_be_meant_is_said(plan_of):
    text = plan_of(num_training_steps=20, num_warmup_steps=20, gradient_accumulation_steps=6, action_horizon=9)
    assert "warning  episodes: all 4 are shorter than the horizon of 9 frames, the longest has 8; lower" in text
    assert (
        "settings: warning  num_warmup_steps: 20 updates of warm-up in a run of 20: the peak is never reached; lower it"
    ) in text
    assert "settings: warning  batch_size_per_gpu: an update has 24 samples, more than there are training fr" in text
    text = plan_of(num_training_steps=20, num_warmup_steps=19, gradient_accumulation_steps=5)
    assert "settings: " not in text


def test_epochs_are_passes_over_the_frames(plan_of):
    text = plan_of(num_training_steps=None, num_epoch=10, gradient_accumulation_steps=4)
    assert "length       13 updates of 16 samples, 1.25 per epoch: 10.4 epochs" in text


@pytest.mark.slow
def test_command_line_and_kept_compilations(model_dir, dataset_dir, tmp_path):
    """A dry run, then two runs, of which the second does not compile."""
    file = tmp_path / "config.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from pathlib import Path\n"
        "import jax\n"
        "from helpers import tiny_run\n"
        "jax.monitoring.register_event_listener(lambda event, **_: print('EVENT', event))\n"
        "def get_config(arg=''):\n"
        f"    c = tiny_run.run_config(Path({str(model_dir)!r}), Path({str(dataset_dir)!r}), Path('unused'))\n"
        "    c.num_training_steps, c.compile_cache, c.eval_interval = 3, 'auto', 0\n"
        "    return c\n"
    )

    def command(workdir, *settings):
        line = [sys.executable, "-m", "wallx_jax.train", f"--config={file}", f"--workdir={tmp_path / workdir}"]
        environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
        done = subprocess.run([*line, *settings], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = command("dry", "--dry_run")
    assert "length       3 updates" in text and "dry run: nothing was loaded or written" in text
    assert not (tmp_path / "dry").exists()
    events = [command(name, "--config.log_interval=1").count("compilation_cache/cache_hits") for name in ("a", "b")]
    assert events[1] > events[0] and list((tmp_path / ".cache/wallx_jax/xla").iterdir())
    texts = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("a", "b"))
    a, b = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert [line["loss"] for line in a] == [line["loss"] for line in b] and len(a) == 3
    assert b[-1]["tflops_per_device"] > 0 and "mfu" not in b[-1], "a CPU has no published peak"
