import ast
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.usable_config import usable

from wallx_jax.config import default_config, flatten, resolve, robots
from wallx_jax.config.command_line import render
from wallx_jax.config.prompt_template import VIEW_NAMES, PromptTemplate
from wallx_jax.data.metadata import DatasetInfo
from wallx_jax.data.validate import check_dataset, check_horizon
from wallx_jax.models.config import Numerics
from wallx_jax.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]
GUIDE = {  # the training guide's keys and, where it gives one, defaults
    "learning_rate": 9e-5, "min_lr": 5e-5, "num_warmup_steps": 100, "train_test_split": 0.95, "action_horizon": 32,
    "use_fast_tokenizer": False, "profile": False, "pretrained_wallx_path": None, "save_path": None,
    "action_tokenizer_path": None, "norm_stats_path": None, "batch_size_per_gpu": 8, "gradient_accumulation_steps": 1,
    "num_training_steps": None, "num_epoch": 100, "dof_config": {}, "agent_pos_config": {}, "obs_action_keys": (),
    "predict_action_keys": (), "repo_id": None, "download_videos": True, "resume.ckpt": None,
    "resume.load_ckpt_only": False, "freeze_vlm": False, "action_expert_learning_rate": None, "flow_loss_weight": 1.0,
}  # fmt: skip


def dataset(**changes) -> DatasetInfo:
    cameras = [f"observation.images.cam_{name}" for name in ("high", "left_wrist", "right_wrist")]
    joints = {"dtype": "float32", "shape": [14], "names": {"motors": list(robots.ALOHA_DOF)}}
    vectors = {"observation.state": joints, "action": joints, "timestamp": {"dtype": "float32", "shape": [1]}}
    vectors |= {"observation.base": {"dtype": "float32", "shape": [2], "names": None}}
    info = DatasetInfo(
        repo_id="lerobot/aloha_mobile_cabinet",
        root=Path("nowhere"),
        fps=50,
        features=vectors | {camera: {"dtype": "video", "shape": [480, 640, 3]} for camera in cameras},
        tasks={0: "Open the cabinet."},
        episode_numbers=np.array([0]),
        episode_lengths=np.array([10]),
        first_indices=np.array([0]),
        data_path="",
    )
    return dataclasses.replace(info, **changes)


def errors_of(function, *args) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    return list(caught.value.errors)


def load(file: Path):
    spec = importlib.util.spec_from_file_location("a_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Defaults


@pytest.mark.parametrize("key", GUIDE)
def test_defaults_are_the_guides(key):
    assert flatten(default_config())[key] == GUIDE[key]


def test_default_resolution_is_the_guides():
    views = {"face_view", "left_wrist_view", "right_wrist_view", "move1_view", "move2_view", "top_view", "wall_view"}
    assert flatten(default_config())["resolution"] == dict.fromkeys(views, 256)


def test_numerics_section_mirrors_the_dataclass():
    assert set(default_config().numerics) == {f.name for f in dataclasses.fields(Numerics)}


def test_unknown_setting_in_a_file_is_refused():
    with pytest.raises(AttributeError, match="learning_rate"):
        default_config().learning_rat = 1.0


def test_tables_keep_the_order_in_which_they_were_written():
    run = resolve(usable(dof_config={"z": 1, "a": 2}, camera_views={"top_view": "t", "face_view": "f"}))
    assert run.robot.dof == (("z", 1), ("a", 2))
    assert [camera.view for camera in run.data.cameras] == ["top_view", "face_view"]


# resolve


def test_resolve_fills_in_what_follows():
    run = resolve(usable(batch_size_per_gpu=4, save_path="runs/mine/"))
    assert (run.data.batch_size, run.data.eval_batch_size) == (4, 4)
    assert (run.loop.log_name, run.loop.profile_save_path) == ("mine", "runs/mine//profile")
    assert [(c.view, c.key, c.resolution) for c in run.data.cameras] == [
        ("face_view", "observation.images.cam_high", 256),
        ("left_wrist_view", "observation.images.cam_left_wrist", 256),
        ("right_wrist_view", "observation.images.cam_right_wrist", 256),
    ]
    assert run.data.location == "lerobot/aloha_mobile_cabinet"
    assert resolve(usable(dataset_root="/here")).data.location == "/here"


def test_numerics_replace_only_what_was_set():
    base = Numerics(action_attention="causal", remat="dots")
    run = resolve(usable(numerics__remat="none", numerics__float32_islands=False))
    assert run.model.apply_numerics(base) == dataclasses.replace(base, remat="none", float32_islands=False)


def test_run_ends_at_steps_or_epochs_whichever_comes_first():
    assert resolve(usable(num_epoch=3)).loop.total_steps(frames=70, global_batch=10) == 21
    assert resolve(usable(num_training_steps=5, num_epoch=3)).loop.total_steps(70, 10) == 5
    loop = resolve(usable(num_training_steps=50, num_epoch=3)).loop
    assert (loop.total_steps(70, 10), loop.decay_steps(70, 10)) == (21, 50)
    assert resolve(usable(num_training_steps=50, num_epoch=0)).loop.total_steps(70, 10) == 50


@pytest.mark.parametrize(("frames", "batch"), [(265, 200), (399, 200), (7, 200), (200, 200), (1000, 3)])
def test_epochs_are_passes_over_the_frames(frames, batch):
    steps = resolve(usable(num_epoch=10)).loop.total_steps(frames, batch)
    assert 10 * frames <= steps * batch < 10 * frames + batch


def test_key_masks():
    robot = resolve(usable(dof_config={"arm": 2, "hand": 1}, predict_action_keys=("hand",), obs_action_keys=())).robot
    assert robot.predicted() == (False, False, True)
    robot = dataclasses.replace(robot, agent_pos=robot.dof)
    assert robot.observed() == (True, True, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pretrained_wallx_path": None}, ["pretrained_wallx_path", "required"]),
        ({"repo_id": None}, ["repo_id", "required"]),
        ({"save_path": "/path/to/workspace/"}, ["save_path", "/path/to/workspace/", "real path"]),
        ({"resume__ckpt": "/path/to/resume_model/"}, ["resume.ckpt", "real path"]),
        ({"learning_rate": 0.0, "min_lr": 0.0}, ["learning_rate", "above 0"]),
        ({"learning_rate": math.nan}, ["learning_rate", "finite"]),
        ({"learning_rate": None}, ["learning_rate", "float"]),
        ({"learning_rate": 1e-5}, ["min_lr", "5e-05", "1e-05"]),
        ({"batch_size_per_gpu": 0}, ["batch_size_per_gpu", "above 0"]),
        ({"num_workers": -1}, ["num_workers", "negative"]),
        ({"seed": -1}, ["seed = -1", "negative"]),
        ({"seed": 2**32}, ["seed = 4294967296", "below 2**32"]),
        ({"weight_decay": math.inf}, ["weight_decay", "finite"]),
        ({"lora__alpha": math.nan}, ["lora.alpha", "finite"]),
        ({"learning_rates": ("^vision/=nan",)}, ["learning_rates", "PATTERN=RATE"]),
        ({"datasets": {"a": {"repo_id": "b", "weight": math.nan}}}, ["datasets.a.weight = nan", "above 0"]),
        ({"datasets": {"a": {"repo_id": "b", "weight": True}}}, ["datasets.a.weight = True", "above 0"]),
        ({"datasets": {"a": {"repo_id": "b", "weight": "2"}}}, ["datasets.a.weight = '2'", "above 0"]),
        ({"dof_config": {"arm": True}}, ["dof_config.arm = True", "a number of dims"]),
        ({"resolution__face_view": True}, ["resolution.face_view = True", "pixels"]),
        ({"platform": "gpus"}, ["platform = 'gpus'", "'cpu', 'gpu', 'tpu'", 'did you mean "gpu"']),
        ({"compile_cache": ""}, ["compile_cache = ''", "'auto' or 'off'"]),
        ({"eval_batches": True}, ["eval_batches", "int", "bool"]),
        ({"num_epoch": 0}, ["num_training_steps", "num_epoch"]),
        ({"num_epoch": None}, ["num_epoch", "int"]),
        ({"train_test_split": 1.5}, ["train_test_split", "1.5"]),
        ({"split_mode": "random"}, ["split_mode", "random", "episode", "frame"]),
        ({"use_fast_tokenizer": True}, ["action_tokenizer_path", "required"]),
        ({"train_action_heads": False}, ["train_action_heads", "freeze_vlm"]),
        ({"resume__load_ckpt_only": True}, ["resume.load_ckpt_only", "resume.ckpt"]),
        (
            {"distributed__num_processes": 2},
            ["distributed.coordinator and distributed.process_id", "required as well"],
        ),
        (
            {"distributed__coordinator": "h", "distributed__num_processes": 2, "distributed__process_id": 1},
            ["'h'", "HOST:PORT"],
        ),
        (
            {"distributed__coordinator": "h:1", "distributed__num_processes": 2, "distributed__process_id": 2},
            ["distributed.process_id = 2 of distributed.num_processes = 2"],
        ),
        ({"resume": {"ckp": "x"}}, ["resume.ckp", 'did you mean "resume.ckpt"']),
        (
            {"robot_name": "physical-intelligence/libero"},
            ["physical-intelligence/libero", "lerobot/aloha_mobile_cabinet"],
        ),
        ({"dof_config": {"arm": 0}}, ["dof_config.arm", "at least 1"]),
        ({"dof_config": {"arm": "x[3]"}}, ["dof_config.arm", "'x[3]'", "FEATURE[START:STOP]"]),
        ({"dof_config": {"arm": "x[3:3]"}}, ["dof_config.arm", "'x[3:3]'"]),
        ({"dof_config": {"arm": "x[0:3]", "hand": 1}}, ["dof_config", "['arm'] say places", "['hand'] numbers"]),
        ({"relative_action_keys": ("arm",)}, ["relative_action_keys", "'arm' is not in dof_config"]),
        (
            {"dof_config": {"arm": 7}, "agent_pos_config": {"am": 7}, "relative_action_keys": ("arm",)},
            ["relative_action_keys", "'arm' is not in agent_pos_config", '"am"'],
        ),
        (
            {"dof_config": {"arm": "action[0:7]"}, "relative_action_keys": ("arm",)},
            ["relative_action_keys", "'arm' is not in agent_pos_config"],
        ),
        ({"dof_config": None}, ["dof_config", "dict", "None"]),
        (
            {"dof_config": {"arm": 7}, "predict_action_keys": ("amr",)},
            ["predict_action_keys", "amr", '"arm"'],
        ),
        ({"dof_config": {"a": 1}, "agent_pos_config": {"s": 1}, "obs_action_keys": ("a",)}, ["obs_action_keys", "'s'"]),
        ({"dof_config": {"arm": 7}, "predict_action_keys": ("arm", "arm")}, ["predict_action_keys", "twice"]),
        ({"dof_config": {"arm": 7}, "predict_action_keys": (7,)}, ["predict_action_keys", "7", "strings"]),
        ({"resolution__face_view": 7}, ["resolution.face_view", "7", "28"]),
        ({"camera_views": {"overhead": "cam"}}, ["resolution.overhead", "missing"]),
        ({"camera_views": {"left_wrist": "cam"}}, ["resolution.left_wrist: missing", 'did you mean "left_wrist_view"']),
        ({"camera_views": {"face_view": "cam", "top_view": "cam"}}, ["camera_views", "two views"]),
        ({"camera_views": {"face_view": 3}}, ["camera_views.face_view", "3"]),
        ({"frame_cache": ""}, ["frame_cache", "empty"]),
        ({"numerics__remat": "some"}, ["numerics.remat", "some", "full"]),
        ({"mesh__fsdp": -1}, ["mesh", "-1"]),
        ({"mesh__fsdp": 0}, ["mesh", "0"]),
        ({"action_horizon": 800}, ["action_horizon", "800", "768"]),
        ({"augment__crop": 0.0}, ["augment.crop", "0.0"]),
        ({"augment__contrast": 1.5}, ["augment.contrast", "1.5", "0 to 1"]),
    ],
)
def test_one_wrong_setting_is_one_error(changes, words):
    (error,) = errors_of(resolve, usable(**changes))
    assert all(word in error for word in words), error


# The prompt


def test_default_prompt_is_the_dataclass_of_it():
    assert resolve(usable()).data.prompt == PromptTemplate()
    assert flatten(default_config())["prompt.view_names"] == VIEW_NAMES
    assert set(default_config().prompt) == {f.name for f in dataclasses.fields(PromptTemplate)}


def test_prompt_settings_reach_the_run():
    words = {"system": "Act.", "image": "{image}{view}", "action": "{images}{instruction}{proprioception}",
             "language": "{instruction}{images}"}  # fmt: skip
    run = resolve(usable(**{f"prompt__{k}": v for k, v in words.items()}, prompt__view_names__top_view="from above"))
    assert run.data.prompt == PromptTemplate(**words, view_names={"top_view": "from above"})
    other = usable(camera_views={"elbow": "cam"}, resolution__face_view=84, prompt__view_names={"elbow": "elbow view"})
    other.resolution = {**other.resolution, "elbow": 84}
    template = resolve(other).data.prompt
    assert (template.view_label("elbow"), template.view_label("face_view")) == ("elbow view", "front view")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("system", "a<|im_end|>", ["prompt.system = 'a<|im_end|>'", "control tokens", "leave them out"]),
        ("system", None, ["prompt.system = None", "expected str"]),
        ("image", "{view}", ["prompt.image = '{view}'", "write {image} exactly once, it is there 0 times"]),
        ("action", "{images}{instruction}", ["prompt.action = ", "write {proprioception} exactly once"]),
        ("language", "{images}{instruction}}", ["prompt.language = ", "Single '}'", "write {{ and }}"]),
        ("language", "{images}{instruction}{x}", ["{x} is none of the placeholders {images}, {instruction}"]),
        ("view_names", {"face_veiw": "x"}, ["prompt.view_names.face_veiw = 'x'", 'did you mean "face_view"']),
        ("view_names", {"top_view": " "}, ["prompt.view_names.top_view = ' '", "expected the words"]),
        ("view_names", {"top_view": 3}, ["prompt.view_names.top_view = 3", "expected the words"]),
        ("view_names", {"top_view": "<|a|>"}, ["prompt.view_names.top_view = '<|a|>'", "control tokens"]),
        ("view_names", None, ["prompt.view_names = None", "expected dict"]),
        ("sytem", "x", ["prompt.sytem", 'did you mean "prompt.system"']),
    ],
)
def test_one_wrong_word_of_the_prompt_is_one_error(field, value, words):
    c = usable()
    with c.unlocked():
        c.prompt[field] = value
    (error,) = errors_of(resolve, c)
    assert all(word in error for word in words), error


def test_words_of_the_prompt_fail_together():
    c = usable(prompt__system="<|x|>", prompt__image="", prompt__view_names={"top_view": "", "nowhere": "x"})
    assert len(errors_of(resolve, c)) == 4


def test_unknown_view_names_the_nearest():
    views = dict(default_config().resolution.items())
    (error,) = errors_of(resolve, usable(resolution=views | {"face_veiw": 128}))
    assert "face_veiw" in error and 'did you mean "face_view"' in error


@pytest.mark.parametrize(
    "view", ["face_veiw", "fase_view", "faceview", "Face_view", "topview", "right_wirst_view", "front_view"]
)
@pytest.mark.parametrize("pixels", [False, True])
def test_a_misspelt_view_is_asked_about_before_its_pixels_are(view, pixels):
    """Its name would stand in the prompt."""
    c = usable(camera_views={view: "cam"})
    if pixels:
        c.resolution = {**c.resolution, view: 256}
    (error,) = errors_of(resolve, c)
    assert error.startswith(f'camera_views.{view}: did you mean "') and f"prompt.view_names.{view}" in error
    c.prompt.view_names = {view: "words of its own"}
    c.resolution = {**c.resolution, view: 256}
    assert resolve(c).data.prompt.view_label(view) == "words of its own"


@pytest.mark.parametrize("view", ["elbow", "wrist_view", "left_view", "overhead"])
def test_a_view_of_ones_own_needs_pixels_alone(view):
    c = usable(camera_views={view: "cam"})
    c.resolution = {**c.resolution, view: 256}
    assert resolve(c).data.prompt.view_label(view) == view


def test_fast_with_frozen_vlm_has_nothing_to_train():
    (error,) = errors_of(resolve, usable(use_fast_tokenizer=True, action_tokenizer_path="fast", freeze_vlm=True))
    assert "nothing to train" in error


def test_fast_chunks_have_no_padded_actions_to_mask():
    (error,) = errors_of(
        resolve, usable(use_fast_tokenizer=True, action_tokenizer_path="fast", mask_padded_actions=True)
    )
    assert "mask_padded_actions" in error


def test_augmentation_is_off_until_enabled():
    assert resolve(usable(augment__crop=0.9)).data.augment is None
    augment = resolve(usable(augment__crop=0.9, augment__enabled=True)).data.augment
    assert (augment.crop, augment.rotate_deg, augment.wrist_geometry) == (0.9, 5.0, False)


def test_all_errors_come_at_once():
    errors = errors_of(resolve, usable(repo_id=None, learning_rate=-1.0, min_lr=-2.0, numerics__flow_loss="sum"))
    assert len(errors) == 4


def test_none_on_the_command_line_is_none():
    given = usable(frame_cache="None", norm_stats_path="None", repo_id="None")
    assert errors_of(resolve, given) == ["repo_id: required; set it in the file or with --config.repo_id=..."]
    run = resolve(usable(frame_cache="None", resume__ckpt="None"))
    assert run.data.frame_cache is None and run.loop.resume_ckpt is None


def test_unused_placeholders_do_no_harm():
    resolve(usable(action_tokenizer_path="/path/to/fast/", profile_save_path="/path/to/profile/"))


# The dataset


@pytest.mark.parametrize(
    ("repo_id", "cameras", "state", "action"),
    [
        (
            "lerobot/aloha_mobile_cabinet",
            {
                "face_view": "observation.images.cam_high",
                "left_wrist_view": "observation.images.cam_left_wrist",
                "right_wrist_view": "observation.images.cam_right_wrist",
            },
            "observation.state",
            "action",
        ),
        ("physical-intelligence/libero", {"face_view": "image", "left_wrist_view": "wrist_image"}, "state", "actions"),
        (
            "x2",
            {
                "face_view": "observation.images.faceImg",
                "left_wrist_view": "observation.images.leftImg",
                "right_wrist_view": "observation.images.rightImg",
            },
            "observation.state",
            "action",
        ),
    ],
)
def test_upstreams_mappings_are_known(repo_id, cameras, state, action):
    data = resolve(usable(repo_id=repo_id)).data
    assert [(camera.view, camera.key) for camera in data.cameras] == list(cameras.items())
    assert (data.state_key, data.action_key) == (state, action)


def test_dataset_completes_the_configuration():
    run = check_dataset(resolve(usable()), dataset())
    assert run.robot.dof == (("action", 14),) and run.robot.agent_pos == (("state", 14),)
    run = check_dataset(resolve(usable(dof_config=robots.ALOHA_DOF)), dataset())
    assert run.robot.agent_pos == run.robot.dof and len(run.robot.dof) == 14


def test_cameras_may_be_written_without_their_prefix():
    run = check_dataset(resolve(usable(camera_views={"top_view": "cam_high"})), dataset())
    assert run.data.cameras[0].key == "observation.images.cam_high"


def test_upstreams_thirteen_keys_for_fourteen_dimensions():
    thirteen = {name: 1 for name in robots.ALOHA_DOF if name != "left_waist"}
    with pytest.raises(ConfigError) as caught:
        check_dataset(resolve(usable(dof_config=thirteen, agent_pos_config=thirteen)), dataset())
    action, state = caught.value.errors
    assert "dof_config sums to 13" in action and "has 14" in action
    assert "agent_pos_config sums to 13" in state
    assert "  vector action: 14 dims: left_waist, left_shoulder" in str(caught.value)


def test_all_mismatches_with_the_dataset_come_at_once_beside_what_it_offers():
    run = resolve(usable(camera_views={"face_view": "cam_hihg"}, state_key="state", action_key="actoin"))
    with pytest.raises(ConfigError) as caught:
        check_dataset(run, dataset())
    camera, action, state = caught.value.errors
    assert 'did you mean "observation.images.cam_high"' in camera
    assert "actoin" in action and 'did you mean "action"' in action
    assert "state_key = 'state'" in state
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 wrong settings:" and lines[4] == "lerobot/aloha_mobile_cabinet offers"
    assert lines[5] == "  camera observation.images.cam_high: 480 x 640 (height x width)"
    assert lines[8].startswith("  vector observation.state: 14 dims: left_waist, left_shoulder, ")
    assert lines[-1] == "  vector observation.base: 2 dims" and "timestamp" not in str(caught.value)


def test_places_in_the_dataset_become_one_vector():
    dof = {"grip": "action[6:7]", "base": "observation.base", "right": "action[7:14]"}
    state = {"left": "observation.state[0:7]", "right": "observation.state[7:14]"}
    run = check_dataset(
        resolve(usable(dof_config=dof, agent_pos_config=state, relative_action_keys=("right",))), dataset()
    )
    assert run.robot.dof == (("grip", 1), ("base", 2), ("right", 7))
    assert run.data.action_key == "action[6:7],observation.base,action[7:14]"
    assert run.data.state_key == "observation.state", "all of it, in its order"
    assert run.robot.relative_to() == (-1, -1, -1, *range(7, 14))
    assert check_dataset(run, dataset()) == run


def test_places_that_do_not_fit_come_at_once():
    dof = {"a": "acton[0:3]", "b": "action[10:15]", "c": "action[0:4]", "d": "action[3:6]"}
    state = {"c": "observation.base"}
    run = resolve(usable(dof_config=dof, agent_pos_config=state, relative_action_keys=("c",)))
    unknown, beyond, twice, relative = errors_of(check_dataset, run, dataset())
    assert "dof_config.a = 'acton[0:3]'" in unknown and 'did you mean "action"' in unknown
    assert "dof_config.b" in beyond and "action[10:15] goes beyond the 14 dims of 'action'" in beyond
    assert "'c' and 'd' both have 1 dims of 'action', from dim 3 on" in twice
    assert "relative_action_keys: 'c' has 4 dims in dof_config and 2 in agent_pos_config" in relative


SO101 = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos", "gripper.pos"]


def robot_of(names, count=None, state_names=None, **changes):
    """What check_dataset makes of a dataset with dims of these names."""
    vectors = {
        key: {"dtype": "float32", "shape": [count or len(names)], "names": names_of}
        for key, names_of in (("action", names), ("observation.state", state_names or names))
    }
    camera = {"observation.images.cam": {"dtype": "video", "shape": [480, 640, 3]}}
    run = resolve(usable(repo_id="me/mine", camera_views={"face_view": "cam"}, **changes))
    return check_dataset(run, dataset(repo_id="me/mine", features=vectors | camera)).robot


@pytest.mark.parametrize(
    ("names", "table", "words"),
    [
        (SO101, ["gripper", *[name[:-4] for name in SO101[:-1]]],
         ["'gripper' covers dim 0, which the dataset calls 'shoulder_pan.pos'; its 'gripper.pos' is dim 5;",
          "give a feature slice for each: {'gripper': 'action[5:6]', ...}"]),
        (SO101, ["shoulder_lift", "shoulder_pan", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"],
         ["'shoulder_lift' covers dim 0, which the dataset calls 'shoulder_pan.pos'"]),
        (["a", "B", "c"], ["b", "A", "c"], ["'b' covers dim 0, which the dataset calls 'a'"]),
        (["main_pan", "main_lift", "main_gripper"], ["gripper", "lift", "pan"], ["'gripper' covers dim 0"]),
        (["left_a", "left_b", "right_a", "right_b"], {"right": 2, "left": 2}, ["'right' covers dim 0", "'left_a'"]),
        (["left_a", "left_b", "right_a", "right_b", "right_c"], {"left": 3, "right": 2},
         ["'left' covers dim 2, which the dataset calls 'right_a'"]),
        ({"motors": ["x", "y", "gripper"]}, {"gripper": 1, "arm": 2}, ["'gripper' covers dim 0", "calls 'x'"]),
    ],
)  # fmt: skip
def test_names_in_another_order_than_the_datasets_are_refused(names, table, words):
    """Another joint would be trained."""
    table = table if isinstance(table, dict) else dict.fromkeys(table, 1)
    count = sum(table.values())
    names = {"motors": names} if isinstance(names, list) else names
    with pytest.raises(ConfigError) as caught:
        robot_of(names, count, dof_config=table, predict_action_keys=(next(iter(table)),))
    (error,) = caught.value.errors
    assert (
        error.startswith("dof_config: ") and "list the names in the dataset's order, or give a feature slice" in error
    )
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (SO101, dict.fromkeys([name[:-4] for name in SO101], 1)),
        (SO101, {"arm": 5, "gripper": 1}),
        (SO101, dict.fromkeys("abcdef", 1)),
        (None, {"b": 1, "a": 1, "c": 4}),
        (["0", "1", "2", "3", "4", "5"], {"x": 1, "rest": 5}),
        (["pos_x", "pos_y", "pos_z", "rot_x", "rot_y", "rot_z"], dict.fromkeys(["x", "y", "z", "a", "b", "c"], 1)),
        (["j", "gripper", "gripper_force", "a", "b", "c"], dict.fromkeys(["j", "gripper", "aux", "a", "b", "c"], 1)),
        (["joint_1", "joint_10", "c", "d", "e", "f"], dict.fromkeys(["joint_1", "tool", "c", "d", "e", "f"], 1)),
        (["left_a", "left_b", "left_c", "right_a", "right_b", "right_c"], {"left": 3, "right": 3}),
        (["arm_left_1", "arm_left_2", "arm_2", "x", "y", "z"], {"arm_left": 2, "arm": 1, "rest": 3}),
        (["x", "x", "y", "y", "z", "z"], {"x": 2, "y": 2, "z": 2}),
    ],
)  # fmt: skip
def test_names_in_the_datasets_order_or_of_ones_own_are_taken(names, table):
    found = robot_of(names, 6, dof_config=table, agent_pos_config=table)
    assert dict(found.dof) == dict(found.agent_pos) == table


def test_the_order_of_the_state_is_checked_like_that_of_the_action():
    table = {"arm": 1, "hand": 1}
    with pytest.raises(ConfigError, match="agent_pos_config: 'arm' covers dim 0, which the dataset calls 'hand'"):
        robot_of(["arm", "hand"], state_names=["hand", "arm"], dof_config=table, agent_pos_config=table)
    found = robot_of(["arm", "hand"], state_names=["hand", "arm"], dof_config=table)
    assert found.agent_pos == (("state", 2),), "the action's names would be wrong for it"


def test_an_action_is_relative_to_its_own_state():
    changes = {"dof_config": {"both": 2}, "agent_pos_config": {"both": 2}, "relative_action_keys": ("both",)}
    with pytest.raises(
        ConfigError,
        match=r"'arm' would be relative to the state 'hand', but the state of the same name is dim 1.*state\[1:2\]",
    ):
        robot_of(["arm", "hand"], state_names=["hand", "arm"], **changes)
    by_place = {
        "dof_config": {"arm": "action[0:1]", "hand": "action[1:2]"},
        "agent_pos_config": {"arm": "observation.state[1:2]", "hand": "observation.state[0:1]"},
    }
    found = robot_of(["arm", "hand"], state_names=["hand", "arm"], **by_place, relative_action_keys=("arm", "hand"))
    assert found.relative_to() == (0, 1)
    assert robot_of(["a", "b"], state_names=["c", "d"], **changes).relative_to() == (0, 1), "other names say nothing"


def test_a_state_that_is_not_named_like_the_action_has_nothing_to_be_relative_to():
    run = resolve(usable(dof_config={"arm": 14}, state_key="observation.base", relative_action_keys=("arm",)))
    (error,) = errors_of(check_dataset, run, dataset())
    assert "relative_action_keys: ['arm'] are not among the names of agent_pos_config, ['state']" in error


def test_unknown_dataset_needs_camera_views():
    (error,) = errors_of(check_dataset, resolve(usable(repo_id="me/mine")), dataset(repo_id="me/mine"))
    assert "camera_views" in error and "me/mine" in error and "observation.images.cam_high" in error


def test_dataset_without_instructions():
    (error,) = errors_of(check_dataset, resolve(usable()), dataset(tasks={0: ""}))
    assert "instruction" in error


def test_horizon_must_fit_the_prompt():
    run = resolve(usable(max_length=300))
    check_horizon(run, 268)
    (error,) = errors_of(check_horizon, run, 269)
    assert all(word in error for word in ("max_length = 300", "269", "action_horizon", "32", "301"))
    fast = resolve(usable(max_length=300, use_fast_tokenizer=True, action_tokenizer_path="fast"))
    check_horizon(fast, 42)  # 256 tokens and two that close the answer
    (error,) = errors_of(check_horizon, fast, 43)
    assert "max_fast_tokens" in error and "301" in error


# Files and the command line


SHIPPED = [file for file in sorted((ROOT / "configs").glob("*.py")) if file.stem != "upstream_yaml"]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configurations_resolve(file):
    config = load(file).get_config()
    assert config.is_locked
    resolve(config)


@pytest.mark.parametrize("name", ["aloha", "aloha_fast", "aloha_from_vlm"])
def test_aloha_fits_its_dataset(name):
    run = check_dataset(resolve(load(ROOT / "configs" / f"{name}.py").get_config()), dataset())
    assert len(run.robot.predicted()) == len(run.robot.observed()) == 14 and all(run.robot.predicted())


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32, 64, 128])
def test_from_vlm_global_batch_is_128(devices):
    c = load(ROOT / "configs" / "aloha_from_vlm.py").get_config(str(devices))
    assert devices * c.batch_size_per_gpu * c.gradient_accumulation_steps == 128 and c.batch_size_per_gpu <= 8


def test_render_is_yaml_that_marks_changes():
    text = render(usable(learning_rate=1e-4, dof_config={"z": 1, "a": 2}, obs_action_keys=("z",)))
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == sorted(flatten(default_config()))
    marked = {line.split(":")[0] for line in lines if "# *" in line}
    assert marked == {"pretrained_wallx_path", "repo_id", "save_path", "learning_rate", "dof_config", "obs_action_keys"}
    assert yaml.safe_load(text) == {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(
        usable(learning_rate=1e-4, dof_config={"z": 1, "a": 2}, obs_action_keys=("z",))).items()}  # fmt: skip


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """Runs a tiny program that prints a few settings; returns (exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "app.py").write_text(
        "from wallx_jax.config.command_line import launch\n"
        "from wallx_jax.config import flatten, resolve\n"
        "from wallx_jax.config.defaults import TABLES\n"
        "def main(c):\n"
        "    c.split_mode == 'x' and resolve(c)\n"
        "    print(c.learning_rate, c.num_epoch, c.save_path, c.resolution.face_view, c.resume.ckpt)\n"
        "    c.log_name == 'tables' and print({name: flatten(c)[name] for name in TABLES})\n"
        "launch(main)\n"
    )
    head = "from wallx_jax.config import default_config\ndef get_config(arg=''):\n    c = default_config()\n"
    (folder / "good.py").write_text(f"{head}    c.num_epoch = 7\n    c.save_path = 'here' + arg\n    return c\n")
    (folder / "typo.py").write_text(f"{head}    c.learning_rat = 1.0\n    return c\n")
    (folder / "type.py").write_text(f"{head}    c.learning_rate = 'fast'\n    return c\n")
    (folder / "tuple.py").write_text(f"{head}    c.relative_action_keys = ('arm')\n    return c\n")
    (folder / "raises.py").write_text(f"{head}    raise ValueError('no robot today')\n")
    (folder / "returns.py").write_text("def get_config(arg=''):\n    return 3\n")

    def run(*arguments, env=None):
        command, environment = [sys.executable, "app.py", *arguments], os.environ | (env or {})
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment)
        return done.returncode, done.stdout, done.stderr

    return run


def test_overrides(app):
    good = [
        "--config=good.py:X",
        "--config.learning_rate=1",
        "--config.resolution.face_view=84",
        "--config.resume.ckpt=c",
    ]
    assert app(*good)[:2] == (0, "1.0 7 hereX 84 c\n")
    assert app("--config=good.py", "--workdir=there", "--config.save_path=elsewhere")[1] == "9e-05 7 there 256 None\n"


def tables_of(app, *arguments):
    code, out, err = app("--config=good.py", "--config.log_name=tables", *arguments)
    assert code == 0, err
    return ast.literal_eval(out.splitlines()[1])


def test_tables_on_the_command_line(app):
    """A whole table takes the place of another, in its order; an entry is added or changed. A camera is text."""
    views = dict(default_config().resolution.items())
    found = tables_of(
        app,
        '--config.camera_views={"top_view": "b", "face_view": "observation.images.a"}',
        "--config.camera_views.wall_view=7",
        "--config.dof_config.hand=1",
        "--config.dof_config.arm=action[0:6]",
        "--config.resolution.face_view", "84",
        "--config.resolution.elbow=-1",
        "--config.prompt.view_names.elbow=elbow view",
    )  # fmt: skip
    assert list(found["camera_views"].items()) == [
        ("top_view", "b"), ("face_view", "observation.images.a"), ("wall_view", "7"),
    ]  # fmt: skip
    assert list(found["dof_config"].items()) == [("hand", 1), ("arm", "action[0:6]")]
    assert found["resolution"] == views | {"face_view": 84, "elbow": -1}
    assert found["prompt.view_names"] == VIEW_NAMES | {"elbow": "elbow view"}
    assert tables_of(app, "--config.dof_config.arm=6", "--config.dof_config={}")["dof_config"] == {}


def test_datasets_on_the_command_line(app):
    found = tables_of(
        app,
        "--config.datasets={'kitchen': {'repo_id': 'me/kitchen', 'weight': 2}}",
        "--config.datasets.kitchen.weight=0.5",
        "--config.datasets.kitchen.episodes=3",
        "--config.datasets.kitchen.predict_action_keys=('arm',)",
        "--config.datasets.kitchen.camera_views.face_view=0",
        "--config.datasets.hall.repo_id=me/hall",
    )
    assert found["datasets"] == {
        "kitchen": {"repo_id": "me/kitchen", "weight": 0.5, "episodes": "3", "predict_action_keys": ("arm",),
                    "camera_views": {"face_view": "0"}},
        "hall": {"repo_id": "me/hall"},
    }  # fmt: skip


def test_help_lists_the_flags_of_a_run(app):
    code, out, err = app("--help")
    assert code == 0 and not err and "--config" in out and "--workdir" in out


def test_names_print_in_a_locale_without_their_letters(app):
    code, out, err = app(
        "--config=good.py", "--config.log_name=tables", "--config.camera_views.top_view=küche",
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert code == 0 and "'top_view': 'k" in out, err


def test_refused_settings_are_a_list_without_a_traceback(app):
    code, out, err = app("--config=good.py", "--config.split_mode=x", "--config.seed=-1")
    assert (code, out) == (2, "") and err.startswith("error: 4 wrong settings:")
    assert "seed = -1" in err and "split_mode = 'x'" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=good.py", "--config.learning_rat=3"], ["'learning_rat'", "did you mean --config.learning_rate?"]),
        (["--config=good.py", "--config.xyz=3"], ["'xyz'", "configuration.md lists"]),
        (["--config=good.py", "--config.resume.ckp=3"], ["'resume.ckp'", "did you mean --config.resume.ckpt?"]),
        (["--config=good.py", "--config.load_ckpt_only=True"], ["did you mean --config.resume.load_ckpt_only?"]),
        (["--config=good.py", "--config.num_epoch=1.5"], ["config.num_epoch", "1.5"]),
        (["--config=good.py", "--config.learning_rate=abc"], ["config.learning_rate", "abc"]),
        (["--config=good.py", "--config.freeze_vlm=maybe"], ["config.freeze_vlm", "maybe"]),
        (
            ["--config=good.py", "--config.camera_views=front"],
            ["camera_views=front: not a table", "camera_views.NAME="],
        ),
        (["--config=good.py", '--config.camera_views={"a": '], ["not a table; write --config.camera_views='{"]),
        (["--config=good.py", "--config.dof_config=('arm', 3)"], ["not a table; write --config.dof_config='{"]),
        (["--config=good.py", "--config.camera_views"], ["--config.camera_views: the value is missing"]),
        (["--config=good.py", "--config.camera_views", "--workdir=x"], ["camera_views: the value is missing"]),
        (["--config=good.py", "--config.dof_config.gripper.pos=1"], ["gripper.pos=1: a name has a dot"]),
        (
            ["--config=good.py", "--config.datasets.a=x", "--config.datasets.a.weight=2"],
            ["'a' is 'x', and has no"],
        ),
        (["--config=good.py", "--config.prompt.sytem=x"], ["did you mean --config.prompt.system?"]),
        (["--config=typo.py", "--config.resolution.face_view=84"], ["'learning_rat'", "did you mean"]),
        (["--config=good.py", "--confg.num_epoch=1"], ["confg.num_epoch"]),
        (["--config=good.py", "--wrokdir=x"], ["wrokdir", "workdir"]),
        (["--config=good.py", "num_epoch=1"], ["'num_epoch=1'", "--config.key=value"]),
        (["--config=nowhere.py"], ["nowhere.py"]),
        ([], ["--config=FILE"]),
        (["--config=typo.py"], ["'learning_rat'", "did you mean --config.learning_rate?"]),
        (["--config=type.py"], ["learning_rate", "fast"]),
        (["--config=raises.py"], ["no robot today"]),
        (["--config=tuple.py"], ["error: tuple.py, line 4: ", "'relative_action_keys'", "tuple"]),
        (["--config=returns.py"], ["int", "default_config"]),
    ],
)
def test_wrong_command_line_is_one_line(app, arguments, words):
    code, out, err = app(*arguments)
    assert code == 2 and not out
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and "Traceback" not in err, err
    assert all(word in err for word in words), err
