"""The main job, end to end on a tiny model: weights and dataset in, checkpoint out, resumed, acted with."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny_run

import wallx_jax
import wallx_jax.train
from wallx_jax.checkpoints.checkpointer import restore_params
from wallx_jax.checkpoints.layout import CheckpointError, latest_step, read_metadata, read_model_config
from wallx_jax.config import default_config, resolve
from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.data.fast import FastDecodeError, FastTokenizer
from wallx_jax.training import init
from wallx_jax.training.loop import NonFiniteError
from wallx_jax.utils import tree
from wallx_jax.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


RNG = np.random.default_rng(0)
OBSERVATION = {
    "images": {
        "face_view": RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8),
        "observation.images.cam_left_wrist": RNG.integers(0, 256, (48, 48, 3), dtype=np.uint8),
    },
    "state": RNG.normal(size=14).astype(np.float32),
    "instruction": "open the cabinet",
}


def train(config):
    return wallx_jax.train.run(config)


@pytest.fixture(scope="module")
def four_steps(model_dir, dataset_dir, tmp_path_factory):
    """A run of four updates: (configuration, its last checkpoint)."""
    config = tiny_run.run_config(model_dir, dataset_dir, tmp_path_factory.mktemp("run") / "four")
    return config, train(config)


def curve(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def test_trains_logs_and_saves(four_steps, model_dir):
    config, last = four_steps
    assert last.name == "4"
    lines = curve(config.save_path)
    assert sorted(lines) == [1, 2, 3, 4]
    wanted = {
        "loss",
        "flow_loss",
        "grad_norm",
        "learning_rate",
        "samples_per_s",
        "data_wait_share",
    }
    assert wanted <= set(lines[4])
    assert lines[1]["learning_rate"] == 0 and lines[2]["learning_rate"] == pytest.approx(1e-3)
    assert any("val_loss" in line for line in (Path(config.save_path) / "metrics.jsonl").read_text().splitlines())
    assert list((Path(config.save_path) / "tensorboard").iterdir())
    before, after = tree.flatten(wallx_jax.load_params(model_dir)[1]), tree.flatten(restore_params(last))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == set(before), "weight decay alone moves every parameter"


def test_resume_equals_the_uninterrupted_run(four_steps, model_dir, dataset_dir, tmp_path):
    config, whole = four_steps
    killed = tiny_run.killed_after(Path(config.save_path), 2, tmp_path / "run")
    half = tiny_run.run_config(model_dir, dataset_dir, killed, resume__ckpt="latest")
    resumed = train(half)
    assert resumed.name == "4"
    a, b = (tree.flatten(restore_params(path)) for path in (whole, resumed))
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    ours, theirs = curve(half.save_path), curve(config.save_path)
    assert {s: line["loss"] for s, line in ours.items()} == {s: line["loss"] for s, line in theirs.items()}


def test_unrolled_layers_train_and_save_the_same(four_steps, model_dir, dataset_dir, tmp_path):
    """All of a run unrolled, only its first half, or only its second; what is stored is stacked in each case."""
    config, whole = four_steps
    unrolled = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "run", scan_layers=False)
    checkpoints = [train(unrolled)]
    for other, scan_layers in ((unrolled, True), (config, False)):
        killed = tiny_run.killed_after(Path(other.save_path), 2, tmp_path / str(scan_layers))
        checkpoints.append(
            train(tiny_run.run_config(model_dir, dataset_dir, killed, resume__ckpt="latest", scan_layers=scan_layers))
        )
    losses = [line["loss"] for line in curve(config.save_path).values()]
    for checkpoint in checkpoints:
        run = checkpoint.parents[1]
        np.testing.assert_allclose([line["loss"] for line in curve(run).values()], losses, rtol=1e-4)
    expected = tree.flatten(restore_params(whole))
    for checkpoint in checkpoints:
        stored = tree.flatten(restore_params(checkpoint))
        assert stored.keys() == expected.keys()
        for path in expected:
            np.testing.assert_allclose(stored[path], expected[path], rtol=1e-3, atol=2e-5, err_msg=path)


def test_checkpoints_act_with_the_moving_average(model_dir, dataset_dir, tmp_path):
    """It changes nothing of the training itself, and a resumed run goes on from both."""
    options = {"optimizer": "adafactor", "learning_rates": ("^vision/=1e-4",), "eval_interval": 0}
    plain, whole, half = (
        tiny_run.run_config(model_dir, dataset_dir, tmp_path / name, **options, **average)
        for name, average in (("plain", {}), ("whole", {"ema_decay": 0.5}), ("half", {"ema_decay": 0.5}))
    )
    train(plain)
    train(whole)
    tiny_run.killed_after(tmp_path / "whole", 2, tmp_path / "half")
    half.resume.ckpt = "latest"
    train(half)
    losses = [[line["loss"] for line in curve(config.save_path).values()] for config in (plain, whole, half)]
    assert losses[0] == losses[1] == losses[2]
    assert curve(whole.save_path)[2]["learning_rate/rule:^vision/"] == pytest.approx(1e-4), "after warm-up"
    last, average, resumed = (tree.flatten(restore_params(config.save_path)) for config in (plain, whole, half))
    for path in last:
        np.testing.assert_array_equal(average[path], resumed[path], err_msg=path)
    assert any(not np.array_equal(average[path], last[path]) for path in last)
    half.resume.ckpt, half.ema_decay, half.save_path = str(half.save_path), None, str(tmp_path / "other")
    with pytest.raises(ConfigError, match="ema_decay = None, but the run of resume.ckpt has 0.5"):
        train(half)


def test_updates_of_another_size_cannot_resume(four_steps, model_dir, dataset_dir, tmp_path):
    """The data position counts batches: with other ones the run would see other samples than without the break."""
    _, last = four_steps
    options = {"resume__ckpt": str(last), "num_training_steps": 6}
    config = tiny_run.run_config(model_dir, dataset_dir, tmp_path, gradient_accumulation_steps=2, **options)
    with pytest.raises(ConfigError, match="an update has 4 samples .* but the run of resume.ckpt has 2: change one"):
        train(config)
    config = tiny_run.run_config(
        model_dir, dataset_dir, tmp_path, batch_size_per_gpu=1, gradient_accumulation_steps=2, **options
    )
    assert train(config).name == "6"


def test_other_data_at_resume_are_told(four_steps, caplog):
    config, last = four_steps
    origin = SimpleNamespace(resumes=True, checkpoint=last)
    order = read_metadata(last)["data_order"]
    assert order == {"global_batch": 2, "seed": config.seed, "frames": [20], "episodes": [None], "weights": [1.0]}
    init.check_same_order(origin, order)
    assert not caplog.records
    init.check_same_order(origin, order | {"seed": 5, "frames": [30]})
    assert f"seed was {config.seed}, is 5; frames was [20], is [30]" in caplog.text


def test_weights_only_resume_starts_anew(four_steps, model_dir, dataset_dir, tmp_path):
    _, last = four_steps
    config = tiny_run.run_config(
        model_dir,
        dataset_dir,
        tmp_path / "run",
        resume__ckpt=str(last),
        resume__load_ckpt_only=True,
        num_training_steps=1,
    )
    done = train(config)
    assert done.name == "1"
    # One update at learning rate 0: the weights are those of the checkpoint.
    a, b = (tree.flatten(restore_params(path)) for path in (last, done))
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_policy_acts_from_the_checkpoint_alone(four_steps, tmp_path):
    _, last = four_steps
    shutil.copytree(last, tmp_path / "moved")
    policy = wallx_jax.load_policy(tmp_path / "moved")
    observation = OBSERVATION
    actions = policy.predict(observation).actions
    assert actions.shape == (4, 14) and np.isfinite(actions).all()
    np.testing.assert_array_equal(actions, policy.predict(observation).actions)
    assert not np.array_equal(actions, policy.predict(observation, seed=1).actions)
    pair = policy.predict([observation, observation | {"instruction": "pick up the red block"}]).actions
    assert pair.shape == (2, 4, 14)
    with pytest.raises(ValueError, match="left_wrist_view.*missing"):
        policy.predict(observation | {"images": {"face_view": observation["images"]["face_view"]}})
    np.testing.assert_array_equal(actions, policy.predict(observation).actions)


def test_accumulation_equals_one_batch(model_dir, dataset_dir, tmp_path):
    """2 micro-batches of 2 and one of 4 give the same updates: means are taken over the whole."""
    runs = [
        tiny_run.run_config(model_dir, dataset_dir, tmp_path / name, num_training_steps=3, batch_size_per_gpu=size,
                            gradient_accumulation_steps=n, eval_interval=0)
        for name, size, n in (("a", 2, 2), ("b", 4, 1))
    ]  # fmt: skip
    a, b = (tree.flatten(restore_params(train(config))) for config in runs)
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=2e-5, err_msg=path)


@pytest.mark.parametrize("mesh", [{"mesh__fsdp": 2}, {"mesh__data": 2}, {"mesh__tensor": 2}])
def test_sharded_run_equals_one_device(model_dir, dataset_dir, tmp_path, mesh, monkeypatch):
    per_device = 4 if "mesh__tensor" in mesh else 2
    base = {"num_training_steps": 2, "eval_interval": 0}
    one = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "one", batch_size_per_gpu=4, **base)
    many = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "many", batch_size_per_gpu=per_device, **base, **mesh)
    a = tree.flatten(restore_params(train(one)))
    tiny_run.use_devices(monkeypatch, 2)
    b = tree.flatten(restore_params(train(many)))
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=2e-5, err_msg=path)


def test_from_qwen_with_fast_tokens(dataset_dir, tmp_path, monkeypatch):
    model = tiny_run.write_model(tmp_path / "qwen", qwen=True)
    chunks = np.random.default_rng(0).uniform(-1, 1, (64, 4, 14))
    FastTokenizer.fit(chunks, vocab_size=400).save(tmp_path / "fast")
    config = tiny_run.run_config(
        model, dataset_dir, tmp_path / "run", use_fast_tokenizer=True, action_tokenizer_path=str(tmp_path / "fast"),
        num_training_steps=2, action_expert_intermediate_size=16,
    )  # fmt: skip
    last = train(config)
    line = curve(config.save_path)[2]
    assert "flow_loss" not in line and line["cross_entropy_loss"] > 1
    assert 0 <= line["action_accuracy"] < 1
    lines = map(json.loads, (Path(config.save_path) / "metrics.jsonl").read_text().splitlines())
    assert all(0 <= line["val_action_accuracy"] < 1 for line in lines if "val_loss" in line)
    saved = read_model_config(last)
    assert saved.action.intermediate_size == 16
    policy = wallx_jax.load_policy(last)
    tokenizer = policy.processor.tokenizer
    assert saved.text.vocab_size == len(tokenizer) == tokenizer.fast_start + tokenizer.fast_size

    # Two updates teach nothing: what it says is no chunk, and that is an error. A right answer is decoded.
    with pytest.raises(FastDecodeError):
        policy.predict(OBSERVATION)
    with pytest.raises(FastDecodeError, match=r"^no <\|im_end\|> within 3 tokens"):
        policy.predict(OBSERVATION, max_tokens=3)
    said = [tokenizer.fast_start + i for i in policy.processor.fast.encode(np.zeros((4, 14)))]
    answer = np.array([[*said, saved.tokens.eos, saved.tokens.pad]])
    monkeypatch.setattr(policy._sampler, "_program", lambda *inputs: answer)
    np.testing.assert_allclose(
        policy.predict(OBSERVATION).actions, policy.processor.decode_actions(np.zeros((4, 14))), atol=1e-5
    )


def test_padded_actions_left_out(four_steps, model_dir, dataset_dir, tmp_path):
    """The same samples and noise; only what the loss counts differs: episodes have 5 to 8 frames and chunks 4, so that
    many chunks reach past the end."""
    config = tiny_run.run_config(
        model_dir, dataset_dir, tmp_path / "run", mask_padded_actions=True, num_training_steps=1, eval_interval=0
    )
    train(config)
    ours, theirs = curve(config.save_path)[1], curve(four_steps[0].save_path)[1]
    assert np.isfinite(ours["flow_loss"]) and ours["flow_loss"] != theirs["flow_loss"]


def test_augmentation_is_for_training_only(model_dir, dataset_dir, tmp_path):
    """One update at learning rate 0: validation then sees the same weights in both runs."""
    lines = []
    for enabled in (False, True):
        config = tiny_run.run_config(
            model_dir, dataset_dir, tmp_path / str(enabled), augment__enabled=enabled, num_training_steps=1
        )
        train(config)
        text = (Path(config.save_path) / "metrics.jsonl").read_text().splitlines()
        lines.append({k: v for line in map(json.loads, text) for k, v in line.items()})
    plain, augmented = lines
    assert augmented["loss"] != plain["loss"] and augmented["val_loss"] == plain["val_loss"]


def test_freezing_moves_only_the_action_side(model_dir, dataset_dir, tmp_path):
    config = tiny_run.run_config(
        model_dir,
        dataset_dir,
        tmp_path / "run",
        freeze_vlm=True,
        action_expert_learning_rate=2e-3,
        num_training_steps=3,
    )
    before, after = tree.flatten(wallx_jax.load_params(model_dir)[1]), tree.flatten(restore_params(train(config)))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {p for p in before if p.startswith(("decoder/layers/mlp/action/", "action/"))}


def test_nothing_starts_on_a_wrong_configuration(four_steps, model_dir, dataset_dir, tmp_path):
    done, _ = four_steps
    for changes, error, match in (
        ({"dof_config": {"arm": 13}}, ConfigError, "sums to 13.*has 14"),
        ({"camera_views": {"face_view": "nowhere"}}, ConfigError, "no such camera"),
        ({"max_length": 60, "resolution__face_view": 280}, ConfigError, "raise max_length"),
        ({"repo_id": "nobody/nothing"}, FileNotFoundError, "nobody/nothing"),
        ({"pretrained_wallx_path": "nobody/nothing"}, FileNotFoundError, "nobody/nothing"),
        ({"save_path": done.save_path}, CheckpointError, "resume.ckpt"),
        ({"resume__ckpt": str(tmp_path / "gone")}, CheckpointError, "no such directory"),
        ({"resume__ckpt": done.save_path, "action_horizon": 5}, ConfigError, "action_horizon = 5.*has 4"),
        ({"prompt__action": "{images}{instruction}"}, ConfigError, "prompt.action = .*{proprioception} exactly once"),
    ):
        config = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "never")
        for key, value in changes.items():
            config.update_from_flattened_dict({key.replace("__", "."): value})
        with pytest.raises(error, match=match):
            train(config)
        assert not (tmp_path / "never").exists()


def test_words_of_the_prompt_travel_with_the_run(model_dir, dataset_dir, tmp_path):
    """Into its checkpoint and from there to the policy; a run that goes on must have the same."""
    words = {
        "prompt__system": "Act.",
        "prompt__image": "{image}{view}",
        "prompt__action": "{instruction}{images}{proprioception}",
        "prompt__language": "{images}{instruction}",
        "prompt__view_names": {"face_view": "head"},
    }
    base = {"num_training_steps": 1, "eval_interval": 0}
    config = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "run", **base, **words)
    policy = wallx_jax.load_policy(train(config))
    assert policy.processor.config.prompt == resolve(config).data.prompt != PromptTemplate()
    for task, end in (("action", "<|propri|>"), ("language", "open the cabinet")):
        sample = policy.encode(OBSERVATION, task)
        text = policy.processor.tokenizer.decode(sample.tokens[sample.token_mask])
        assert text.startswith("<|im_start|>system\nAct.<|im_end|>") and "<|vision_end|>head<|vision_start|>" in text
        assert text.endswith(f"{end}<|im_end|>\n<|im_start|>assistant\n")

    config.resume.ckpt, config.num_training_steps = "latest", 2
    config.prompt.view_names.top_view = "seen by no camera of this run"
    assert train(config).name == "2"
    for field in PromptTemplate.__dataclass_fields__:
        other = config.copy_and_resolve_references()
        other.prompt[field] = default_config().prompt[field]
        with pytest.raises(ConfigError, match=f"prompt.{field} = .*but the run of resume.ckpt has") as caught:
            train(other)
        assert len(caught.value.errors) == 1


def test_command_line(model_dir, dataset_dir, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from pathlib import Path\n"
        "from helpers import tiny_run\n"
        "def get_config(arg=''):\n"
        f"    return tiny_run.run_config(Path({str(model_dir)!r}), Path({str(dataset_dir)!r}), Path('unused'))\n"
    )

    def command(*settings, config=file):
        line = [sys.executable, "-m", "wallx_jax.train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
        environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
        return subprocess.run([*line, *settings], cwd=ROOT, capture_output=True, text=True, env=environment)

    ok = command("--config.num_training_steps=2", "--config.num_workers=1")
    assert ok.returncode == 0, ok.stderr
    assert "compiled the train step in" in ok.stderr and "Traceback" not in ok.stderr
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    again = command()
    assert again.returncode == 1 and "already contains checkpoints" in again.stderr and "Traceback" not in again.stderr
    wrong = command("--config.learning_rat=1")
    assert wrong.returncode == 2 and "learning_rate" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1
    offline = command(config="configs/aloha.py")
    assert offline.returncode == 1 and "Traceback" not in offline.stderr
    (line,) = [line for line in offline.stderr.splitlines() if line.startswith("error")]
    assert "lerobot/aloha_mobile_cabinet" in line and str(tmp_path) in line, "what was looked for, and where to put it"


def test_divergence_stops_the_run_and_keeps_the_batch(model_dir, dataset_dir, tmp_path):
    changes = {"learning_rate": 1e30, "num_warmup_steps": 0, "num_training_steps": 20, "max_nonfinite_steps": 2}
    config = tiny_run.run_config(
        model_dir, dataset_dir, tmp_path / "run", eval_interval=0, save_interval=100, **changes
    )
    with pytest.raises(NonFiniteError, match="max_nonfinite_steps = 2"):
        train(config)
    (file,) = (tmp_path / "run").glob("nonfinite_step_*.npz")
    with np.load(file) as batch:
        assert batch["image_0"].shape == (2, 56, 84, 3) and np.isfinite(batch["actions"]).all()
    assert latest_step(tmp_path / "run") is None


def test_a_disk_that_does_not_take_the_bad_batch_hides_no_divergence(model_dir, dataset_dir, tmp_path, monkeypatch):
    def full(file, **arrays):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    changes = {"learning_rate": 1e30, "num_warmup_steps": 0, "num_training_steps": 20, "max_nonfinite_steps": 1}
    config = tiny_run.run_config(
        model_dir, dataset_dir, tmp_path / "run", eval_interval=0, save_interval=100, **changes
    )
    with pytest.raises(NonFiniteError, match="could not be kept .*No space left"):
        train(config)
    assert not list((tmp_path / "run").glob("*nonfinite*"))


def test_frame_cache_and_profile(four_steps, model_dir, dataset_dir, tmp_path):
    """Cached frames give the very same run; a profile covers the steps it was asked for."""
    config, _ = four_steps
    changes = {"profile": True, "profile_wait_iters": 1, "profile_warmup_iters": 0, "profile_active_iters": 1}
    cached = tiny_run.run_config(
        model_dir, dataset_dir, tmp_path / "run", frame_cache=str(tmp_path / "cache"), **changes
    )
    train(cached)
    ours, theirs = curve(cached.save_path), curve(config.save_path)
    assert {s: line["loss"] for s, line in ours.items()} == {s: line["loss"] for s, line in theirs.items()}
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_what_the_disk_refuses_is_told(model_dir, dataset_dir, tmp_path, capsys, restored_state):
    (tmp_path / "file").touch()
    cached = tiny_run.run_config(model_dir, dataset_dir, tmp_path / "a", frame_cache=str(tmp_path / "file"))
    for config in (tiny_run.run_config(model_dir, dataset_dir, tmp_path / "file" / "run"), cached):
        with pytest.raises(SystemExit) as exit:
            wallx_jax.train.main(config)
        assert exit.value.code == 1
        assert re.search(r"^error: .*\n.* is a file, no folder", capsys.readouterr().err, re.MULTILINE)
