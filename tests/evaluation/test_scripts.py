"""The commands of acting and evaluating, on a run of ours, a Wall-X directory and a Qwen2.5-VL directory."""

import argparse
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import synthetic, tiny_run
from PIL import Image

import wallx_jax
from wallx_jax.checkpoints.layout import find_checkpoints
from wallx_jax.data.lerobot import LeRobotSource, read_info
from wallx_jax.evaluation import openloop
from wallx_jax.evaluation.target import load_eval_target

ROOT = Path(__file__).parents[2]
HELD_OUT = [3]  # of the synthetic dataset's four episodes, at train_test_split 0.75
pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, capsys, restored_state):
    """run("ablate", "--frames", "3") -> (exit code, what it printed)."""

    def command(name: str, *arguments) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().out

    return command


@pytest.fixture
def robot_config(wallx_dir, dataset_dir, tmp_path):
    """A configuration file that tells a model directory its robot."""
    file = tmp_path / "robot.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from helpers import tiny_run\n"
        f"def get_config(arg=''): return tiny_run.run_config({str(wallx_dir)!r}, {str(dataset_dir)!r}, 'unused')\n"
    )
    return file


def png(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        assert image.format == "PNG" and len(image.convert("L").getcolors(256)) > 10, "an empty picture"
        return image.size


def test_openloop_plot_of_a_run(run, run_dir, dataset_dir, tmp_path):
    out = tmp_path / "out"
    code, text = run("openloop_plot", "--checkpoint", run_dir, "--stride", 2, "--steps", 2, "--out", out)
    assert code == 0 and "mean absolute error" in text
    result = json.loads((out / "openloop.json").read_text())
    assert result["episodes"] == HELD_OUT and result["frames"] == 3 and len(result["dims"]) == 14
    assert set(result["per_episode"]) == {"3"}
    png(out / "episode_3.png")
    # The same numbers, worked out here.
    policy = wallx_jax.load_policy(run_dir)
    states, actions = synthetic.episode_table(3)
    source = LeRobotSource(read_info(dataset_dir), 4, tuple(synthetic.CAMERAS))
    start = sum(synthetic.LENGTHS[:3])
    compared, still = [], []
    for frame in (0, 2, 4):
        raw = source[start + frame]
        observation = {"images": dict(zip(synthetic.CAMERAS, raw.images, strict=True)), "state": raw.state,
                       "instruction": raw.instruction}  # fmt: skip
        valid = min(4, len(actions) - frame)
        compared.append((observation, valid, frame))
        still.append(np.abs(states[frame] - actions[frame : frame + valid]))
    assert result["hold_still"]["mae"] == pytest.approx(np.concatenate(still).mean(), rel=1e-5)
    chunks = openloop.predict(policy, [o for o, _, _ in compared], steps=2)
    found = [np.abs(c[:n] - actions[f : f + n]) for c, (_, n, f) in zip(chunks, compared, strict=True)]
    assert result["policy"]["mae"] == pytest.approx(np.concatenate(found).mean(), rel=1e-5)
    per_dim = np.concatenate(found).mean(axis=0)
    np.testing.assert_allclose(result["policy"]["mae_per_dim"], per_dim, rtol=1e-4)
    assert len(result["policy"]["mae_per_step"]) == 4 and result["mean_action"]["mae"] > 0


def test_openloop_plot_of_a_model_directory(run, wallx_dir, robot_config, tmp_path):
    options = ("--config", robot_config, "--steps", 1, "--out", tmp_path / "out")
    code, _ = run("openloop_plot", "--checkpoint", wallx_dir, *options)
    assert code == 0
    result = json.loads((tmp_path / "out" / "openloop.json").read_text())
    assert result["episodes"] == HELD_OUT and np.isfinite(result["policy"]["mae"])


def test_openloop_plot_of_a_policy_that_never_acts(run, run_dir, tmp_path, monkeypatch):
    def nothing(policy, observations, **options):
        return np.full((len(observations), 4, 14), np.nan)

    monkeypatch.setattr(openloop, "predict", nothing)
    code, text = run("openloop_plot", "--checkpoint", run_dir, "--stride", 2, "--out", tmp_path / "out")
    assert code == 0 and "3 of 3 frames have no prediction" in text
    assert re.search("policy +mean absolute error -\n", text)


def test_ablate(run, run_dir, tmp_path):
    out = tmp_path / "out"
    code, text = run("ablate", "--checkpoint", run_dir, "--frames", 4, "--steps", 1, "--out", out)
    assert code == 0 and "images noise" in text and "used" in text
    result = json.loads((out / "ablation.json").read_text())
    replaced = result["replaced"]
    # One held-out episode: there is no other to take images from.
    assert list(replaced) == ["nothing", "images noise", "instruction swapped", "state zeroed"]
    assert replaced["nothing"]["ratio"] == 1 and replaced["state zeroed"]["action_change"] > 0
    assert len(replaced["images noise"]["mae_per_dim"]) == 14 and len(replaced["images noise"]["mae_per_step"]) == 4
    width, height = png(out / "ablation.png")
    assert width > height


def test_semantics_measures_and_writes(run, run_dir, dataset_dir, wallx_dir, robot_config, tmp_path):
    out = tmp_path / "semantics.json"
    few = ("--batches", 2, "--batch-size", 2, "--frames", 2, "--steps", 1, "--json", out)
    code, text = run("semantics", "--checkpoint", run_dir, "--dataset", dataset_dir, *few)
    assert code == 0 and ("fits" in text or "undecided" in text)
    figures = json.loads(out.read_text())
    combinations = {(c["mrope_layout"], c["action_attention"]) for c in figures["combinations"]}
    assert len(combinations) == 4 and all(c["flow_loss"] > 0 for c in figures["combinations"])

    before = (wallx_dir / "config.json").read_bytes()
    code, _ = run("semantics", "--checkpoint", wallx_dir, "--config", robot_config, *few, "--write")
    decided = json.loads(out.read_text())["decided"]
    if decided:  # an untrained model seldom is
        numerics = json.loads((wallx_dir / "config.json").read_text())["wallx_jax"]
        assert numerics["mrope_layout"] == json.loads(out.read_text())["best"]["mrope_layout"]
        (wallx_dir / "config.json").write_bytes(before)
    else:
        assert "undecided" in str(code) and (wallx_dir / "config.json").read_bytes() == before


def test_vqa_of_pictures_and_a_video(run, tmp_path, dataset_dir):
    model = tiny_run.write_model(tmp_path / "qwen", qwen=True)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(tmp_path / f"{name}.png")
    video = next(dataset_dir.glob("videos/*/*/*.mp4"))
    out = tmp_path / "answer.json"
    pictures = ("--image", tmp_path / "a.png", "--image", tmp_path / "b.png", "--video", video, "--fps", 5)
    options = ("--question", "open the cabinet?", "--system", "stack", "--max-tokens", 5, "--json", out)
    code, text = run("vqa", "--model", model, *pictures, *options)
    answer = json.loads(out.read_text())
    assert code == 0 and len(answer["tokens"]) <= 5 and answer["text"] in text
    assert answer["finished"] or "raise --max-tokens" in text
    code, _ = run("vqa", "--model", model, "--image", tmp_path / "none.png", "--question", "?")
    assert "none.png" in str(code)
    code, _ = run("vqa", "--model", model, "--video", tmp_path / "a.png", "--fps", 0, "--question", "?")
    assert "fps is 0" in str(code)
    code, _ = run("vqa", "--model", model, "--video", tmp_path / "answer.json", "--question", "?")
    assert "cannot be opened as a video" in str(code)


def test_fake_inference(run, run_dir, wallx_dir, tmp_path):
    qwen = tiny_run.write_model(tmp_path / "qwen", qwen=True)
    out = tmp_path / "figures.json"
    few = ("--steps", 1, "--max-tokens", 2, "--repeats", 1, "--json", out)
    for model, chunk in ((wallx_dir, [1, 32, 20]), (run_dir, [1, 4, 14]), (qwen, None)):
        code, _ = run("fake_inference", "--model", model, *few)
        figures = json.loads(out.read_text())
        assert code == 0 and figures["finite"] and figures["parameters"] > 1000
        assert figures.get("actions") == chunk
        assert figures["text_tokens"] <= 2 and figures["text_ms"]["first"] >= figures["text_ms"]["best"] > 0


@pytest.mark.parametrize("factor", [np.nan, 1e25], ids=["weights", "actions"])
def test_fake_inference_finds_what_is_not_finite(run, tmp_path, factor):
    from safetensors.numpy import load_file, save_file

    folder = tiny_run.write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "action_preprocessor.action_proj_back.weight"):
        tensors[name] = tensors[name] * np.float32(factor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, text = run("fake_inference", "--model", folder, "--steps", 2, "--max-tokens", 1, "--repeats", 0)
    if np.isnan(factor):
        assert "action_proj_back.weight contains NaN or infinity" in code
    else:
        figures = json.loads(text)
        assert code == 1 and not figures["finite"] and "the actions are not finite at dims 0, 1" in figures["error"]


def test_inspect_batch(robot_config, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "scripts/inspect_batch.py",
        f"--config={robot_config}",
        f"--workdir={out}",
        "--samples=2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (out / "batch.txt").read_text()
    assert text.count("Observation: front view: <|vision_start|><|image_pad|>x6<|vision_end|>") == 2
    assert "face_view" not in text and "cam_high 56x84 px, 6 tokens" in text and "none (flow matching)" in text
    assert text.count("joint_13") == 2 * (1 + 4) and "(past the end)" in text or "0 of them past" in text
    assert "Proprioception: <|propri|>" in done.stdout and "6 channels that this robot lacks" in text
    width, height = png(out / "batch.png")
    assert width > 300 and height > 300
    done = subprocess.run([*command, "--config.lerning_rate=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "learning_rate" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["openloop_plot", "ablate", "semantics"])
def test_wrong_arguments_end_with_one_line(run, wallx_dir, run_dir, tmp_path, name):
    for arguments, message in (
        (("--checkpoint", wallx_dir), "error: .*does not describe a robot.*--config=configs/NAME.py or --dataset"),
        (("--checkpoint", tmp_path / "nowhere"), "error: .*nowhere"),
        (("--checkpoint", tmp_path), "error: no complete checkpoint"),
        (("--checkpoint", run_dir, "--dataset", tmp_path), "error: .*is not a LeRobot dataset"),
        (("--checkpoint", wallx_dir, "--config", tmp_path / "no.py"), "error: no such configuration file"),
        (("--checkpoint", wallx_dir, "--config", ROOT / "README.md"), "error: .*README.md: not a Python file"),
    ):
        code, _ = run(name, *arguments)
        assert isinstance(code, str) and "\n" not in code and re.search(message, code), f"{arguments}: {code}"


def test_a_run_is_compared_on_the_episodes_it_has_not_seen(run_dir):
    subject = load_eval_target(argparse.Namespace(checkpoint=run_dir, dataset=None, robot=None, config=None))
    episodes = {subject.held_out.low_dim(i).episode for i in range(len(subject.held_out))}
    assert sorted(episodes) == HELD_OUT and subject.folder == find_checkpoints(run_dir)[0]
