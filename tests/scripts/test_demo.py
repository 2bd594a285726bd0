"""The demo's parts: simulator, expert, dataset, tokenizer, model and configuration; and all of it in short."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tabletop import assets, simulator

import wallx_jax.train
from wallx_jax.config import resolve
from wallx_jax.data.images import target_size
from wallx_jax.data.lerobot import LeRobotSource, read_info
from wallx_jax.data.prompt import build_prefix
from wallx_jax.models.params import abstract_params
from wallx_jax.utils.tree import flatten
from wallx_jax.weights.load import load_params

ROOT = Path(__file__).resolve().parents[2]
IMAGE_TOKENS = [h * w // 28**2 for h, w in simulator.CAMERAS.values()]


def layout(seed: int) -> simulator.Layout:
    return simulator.sample_layout(np.random.default_rng(seed))


@given(x=st.floats(-0.25, 0.25), y=st.floats(0.1, 0.4), z=st.floats(0.0, 0.3), arm=st.integers(0, 1))
def test_joints_put_the_hand_where_they_should(x, y, z, arm):
    joints = simulator.joints_for((x, y, z), arm)
    np.testing.assert_allclose(simulator.hand_position(joints, arm), (x, y, z), atol=1e-9)
    assert np.isclose(joints[[1, 2, 4]].sum(), -np.pi / 2)  # the hand points down


def test_no_joint_moves_faster_than_its_limit():
    sim = simulator.Tabletop(layout(0))
    before = sim.state.copy()
    sim.step(before + np.linspace(-1, 1, simulator.DIMS))
    assert np.abs(sim.state - before).max() <= simulator.RATE + 1e-6
    sim.step(sim.state + 0.01)
    np.testing.assert_allclose(sim.state, before + np.clip(np.linspace(-1, 1, 14), -0.25, 0.25) + 0.01, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_expert_reaches_the_named_block_with_the_free_hand(seed):
    start = layout(seed)
    observations, actions = simulator.demonstrate(start)
    sim = simulator.Tabletop(start)
    for observation, action in zip(observations, actions, strict=True):
        np.testing.assert_array_equal(observation["state"], sim.state)
        sim.step(action)
    assert sim.reached() == start.target
    holding = 1 - start.free_arm
    np.testing.assert_allclose(sim.hand(holding), simulator.REST[holding], atol=1e-3)
    assert 2 <= len(actions) <= 12


def test_another_block_is_told_apart():
    start = layout(1)
    other = next(color for color in start.blocks if color != start.target)
    sim = simulator.Tabletop(start)
    assert sim.reached() is None or sim.reached() in start.blocks
    place = (*start.blocks[other][:2], simulator.REACH_HEIGHT)
    sim.state[7 * start.free_arm : 7 * start.free_arm + 6] = simulator.joints_for(place, start.free_arm)
    assert sim.reached() == other
    sim.state[7 * start.free_arm : 7 * start.free_arm + 6] = simulator.joints_for((0, 0.24, 0.3), start.free_arm)
    assert sim.reached() is None


def test_layouts_follow_their_seed_and_vary():
    a, b = layout(3), layout(3)
    assert a.blocks == b.blocks and np.array_equal(a.start, b.start)
    many = [layout(seed) for seed in range(60)]
    assert {each.target for each in many} == set(simulator.COLORS)
    assert {each.free_arm for each in many} == {0, 1}
    for each in many:
        assert set(each.blocks) == set(simulator.COLORS) and each.target in each.blocks
        points = np.array([block[:2] for block in each.blocks.values()])
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(len(points), 1)]
        assert gaps.min() > simulator.BLOCK


def test_pictures_reach_the_model_as_they_are():
    """No resize between the simulator and the model, and each place is the middle of one token of the overhead view."""
    for size in simulator.CAMERAS.values():
        assert target_size(*size) == size
    for place in simulator.PLACES:
        column, row = simulator.to_pixels(place)
        assert abs((column + 0.5) % 28 - 14) < 0.01 and abs((row + 0.5) % 28 - 14) < 0.01


def test_pictures_show_the_blocks_but_not_which_hand_is_free():
    start = layout(4)
    sim = simulator.Tabletop(start)
    images = sim.observation()["images"]
    for camera, size in simulator.CAMERAS.items():
        assert images[camera].shape == (*size, 3) and images[camera].dtype == np.uint8
    for color, (x, y, _) in start.blocks.items():
        column, row = simulator.to_pixels((x, y)).round().astype(int)
        np.testing.assert_allclose(images[simulator.OVERHEAD][row, column], simulator.COLORS[color], atol=1)
    sim.state[[6, 13]] = sim.state[[13, 6]]  # swap the grippers
    for camera, image in sim.observation()["images"].items():
        np.testing.assert_array_equal(image, images[camera])
    sim.state[7:] += 0.3  # the right arm is in no picture
    np.testing.assert_array_equal(sim.observation()["images"][simulator.WRIST], images[simulator.WRIST])
    sim.state[:7] += 0.3  # the left wrist's camera moves
    assert (sim.observation()["images"][simulator.WRIST] != images[simulator.WRIST]).any()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    assets.write_model(folder)
    return folder


def test_tokenizer_has_qwens_tokens_and_a_token_per_colour(tmp_path):
    tokenizer = assets.write_tokenizer(tmp_path)
    names = [*assets.CONTROL_TOKENS, *assets.PLAIN_TOKENS, "<|propri|>", "<|action|>"]
    first = tokenizer.token_id("<|endoftext|>")
    assert [tokenizer.token_id(name) for name in names] == list(range(first, first + 24)) and len(
        tokenizer
    ) == first + 24
    words = [*simulator.COLORS, simulator.UNNAMED]
    assert all(len(tokenizer.encode(word)) == 1 for word in words)
    prompts = [build_prefix(tokenizer, simulator.instruction(word), assets.VIEWS, IMAGE_TOKENS).ids for word in words]
    assert len(set(map(len, prompts))) == 1  # so that the unnamed one fits what training was set up for
    assert all(sum(a != b for a, b in zip(prompts[0], other, strict=True)) == 1 for other in prompts[1:])
    text = "anything else: 42 Würfel\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.medium
def test_model_directory_loads(model_dir):
    config, params = load_params(model_dir)
    assert config.action.action_dim == config.action.state_dim == simulator.DIMS
    expected = {path: x.shape for path, x in flatten(abstract_params(config)).items()}
    assert {path: x.shape for path, x in flatten(params).items()} == expected
    assert np.isclose(params["decoder"]["layers"]["attn"]["q"]["kernel"].std(), assets.WIDTH**-0.5, rtol=0.05)


def test_dataset_holds_what_the_expert_did(tmp_path):
    assets.write_dataset(tmp_path / "dataset", episodes=3, seed=7)
    info = read_info(tmp_path / "dataset")
    assert info.num_episodes == 3 and info.fps == simulator.FPS and info.camera_keys == tuple(simulator.CAMERAS)
    rng = np.random.default_rng(7)
    layouts = [simulator.sample_layout(rng) for _ in range(3)]
    demonstrations = [(each, *simulator.demonstrate(each)) for each in layouts]
    assert info.episode_lengths.tolist() == [len(actions) for _, _, actions in demonstrations]
    source = LeRobotSource(info, 4, tuple(simulator.CAMERAS))
    for episode, (start, observations, actions) in enumerate(demonstrations):
        sample = source[int(info.episode_starts[episode])]
        assert sample.instruction == simulator.instruction(start.target)
        np.testing.assert_array_equal(sample.state, start.start)
        np.testing.assert_allclose(sample.actions[0], actions[0], atol=1e-6)
        for image, camera in zip(sample.images, simulator.CAMERAS, strict=True):
            difference = image.astype(int) - observations[0]["images"][camera]
            assert np.abs(difference).mean() < 8  # lossy video


def test_configuration_resolves():
    run = resolve(runpy.run_path(str(ROOT / "configs/demo.py"))["get_config"]())
    assert [camera.view for camera in run.data.cameras] == list(assets.VIEWS)
    assert sum(dims for _, dims in run.robot.dof) == simulator.DIMS


@pytest.mark.slow
def test_the_whole_demo_in_short(tmp_path):
    command = [sys.executable, "scripts/demo.py", f"--workdir={tmp_path}", "--episodes=20", "--steps=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    blanked = {"trained", "picture blank", "words blank", "state blank", "untrained"}
    assert set(results["closed_loop"]) == blanked and set(results["open_loop"]) == blanked | {"hold still"}
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert "named block" in done.stdout


@pytest.mark.slow
def test_bfloat16_training_follows_float32(model_dir, tmp_path):
    """The demo's first updates with parameters and moments in bfloat16, rounded at random, and in float32."""
    assets.write_dataset(tmp_path / "dataset", episodes=12, seed=3)

    def losses(param_dtype: str) -> np.ndarray:
        c = runpy.run_path(str(ROOT / "configs/demo.py"))["get_config"]()
        c.pretrained_wallx_path, c.repo_id = str(model_dir), str(tmp_path / "dataset")
        c.save_path, c.frame_cache = str(tmp_path / param_dtype), str(tmp_path / "cache")
        c.numerics.param_dtype, c.numerics.compute_dtype = param_dtype, "float32"
        c.batch_size_per_gpu, c.num_training_steps, c.num_warmup_steps = 4, 60, 5  # on four virtual devices
        c.log_interval, c.eval_interval, c.compile_cache = 1, 0, "off"
        wallx_jax.train.run(c)
        lines = (tmp_path / param_dtype / "metrics.jsonl").read_text().splitlines()
        return np.array([json.loads(line)["loss"] for line in lines])

    wide, narrow = losses("float32"), losses("bfloat16")
    fallen = wide[:5].mean() - wide[-10:].mean()
    assert fallen > 0.3 * wide[:5].mean(), "the run learns something"
    assert abs(wide[-10:].mean() - narrow[-10:].mean()) < 0.1 * fallen
