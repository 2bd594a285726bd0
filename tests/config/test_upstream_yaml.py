import importlib.util
from pathlib import Path

import pytest

from wallx_jax.config import default_config, flatten, resolve
from wallx_jax.config.upstream_yaml import MAPPED, WITHOUT_MEANING, read_upstream_yaml
from wallx_jax.utils.errors import ConfigError

# All keys that upstream reads, nested as in its example files; values chosen to differ from our defaults.
SAMPLE = """
log_name: cabinet
log_project: arms
model_type: wall-oss
pretrained_wallx_path: "/models/wall-oss-flow"
qwen_vl_act_config_path: "/models/qwen25_config.json"
save_path: "/runs/cabinet"
use_fast_tokenizer: False
action_tokenizer_path: "/path/to/fast/"
norm_stats_path: "/stats/norm_stats.json"

profile: True
profile_save_path: /runs/trace
profile_wait_iters: 3
profile_warmup_iters: 2
profile_active_iters: 1

num_warmup_steps: 50
num_training_steps: 64000000
learning_rate: 5e-5       # YAML 1.1 reads this as a string
min_lr: 0.00001
num_epoch: 20
gradient_accumulation_steps: 4
batch_size_per_gpu: 2
eval_batch_size_per_gpu: 1
num_workers: 2
max_grad_norm: 0.5
padding_side: left
epoch_save_interval: 10
FSDP2: True
torch_compile: False
freeze_vlm: True
action_expert_learning_rate: 1e-4
train_action_expert_only: False
flow_loss_weight: 2

dof_config:                # the model's channels
  follow_left_arm: 6
  follow_left_gripper: 1
  car_pose: 13
agent_pos_config:
  follow_left_arm: 6
  follow_left_gripper: 1
  car_pose: 13

enable_customized_robot_config: true
customized_robot_config:
  name: "lerobot/aloha_mobile_cabinet"
  customized_dof_config:
    action_wrist: 6
    action_arm: 8
  customized_agent_pos_config:
    state_wrist: 6
    state_arm: 8

resume:
  ckpt: "/runs/old"
  load_ckpt_only: true
  validate_first: false

data:
  use_lerobot: true
  lerobot_config:
    repo_id: "lerobot/aloha_mobile_cabinet"
    root: /data/cabinet
    episodes: null
    image_transforms: null
    delta_timestamps: null
    tolerance_s: 1e-4
    revision: v3.0
    force_cache_sync: false
    download_videos: false
    video_backend: null
  action_horizon: 16
  train_test_split: 0.9
  split_seed: 7
  max_length: 512
  priority_order: null
  obs_action_keys: [follow_left_arm, follow_left_gripper, car_pose]
  predict_action_keys: [follow_left_arm, follow_left_gripper, car_pose]
  resolution:
    face_view: 224
    left_wrist_view: 112
    right_wrist_view: 112
    multi_modal: 256
"""
EXPECTED = {
    "log_name": "cabinet", "log_project": "arms", "pretrained_wallx_path": "/models/wall-oss-flow",
    "save_path": "/runs/cabinet", "use_fast_tokenizer": False, "action_tokenizer_path": "/path/to/fast/",
    "norm_stats_path": "/stats/norm_stats.json", "profile": True, "profile_save_path": "/runs/trace",
    "profile_wait_iters": 3, "profile_warmup_iters": 2, "profile_active_iters": 1, "num_warmup_steps": 50,
    "num_training_steps": 64000000, "learning_rate": 5e-5, "min_lr": 1e-5, "num_epoch": 20,
    "gradient_accumulation_steps": 4, "batch_size_per_gpu": 2, "eval_batch_size_per_gpu": 1, "num_workers": 2,
    "max_grad_norm": 0.5, "freeze_vlm": True, "train_action_heads": False, "action_expert_learning_rate": 1e-4,
    "flow_loss_weight": 2.0, "robot_name": "lerobot/aloha_mobile_cabinet", "repo_id": "lerobot/aloha_mobile_cabinet",
    "dof_config": {"action_wrist": 6, "action_arm": 8}, "agent_pos_config": {"state_wrist": 6, "state_arm": 8},
    "resume.ckpt": "/runs/old", "resume.load_ckpt_only": True, "dataset_root": "/data/cabinet",
    "dataset_revision": "v3.0", "download_videos": False, "action_horizon": 16, "train_test_split": 0.9,
    "split_mode": "frame", "split_seed": 7, "max_length": 512, "mesh.data": 1, "mesh.fsdp": -1,
    "resolution": {"face_view": 224, "left_wrist_view": 112, "right_wrist_view": 112},
}  # fmt: skip
MINIMAL = "pretrained_wallx_path: m\nsave_path: s\ndata: {lerobot_config: {repo_id: lerobot/aloha_mobile_cabinet}}\n"


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / "config.yml").write_text(text)
        return read_upstream_yaml(tmp_path / "config.yml")

    return read


def test_every_key_arrives(read):
    config, _ = read(SAMPLE)
    values, defaults = flatten(config), flatten(default_config())
    changed = {key for key in values if values[key] != defaults[key]} | {"use_fast_tokenizer"}
    assert {key: values[key] for key in changed} == EXPECTED
    assert list(values["dof_config"]) == ["action_wrist", "action_arm"]
    resolve(config)


def test_report_names_what_has_no_meaning(read):
    _, report = read(SAMPLE)
    for key in WITHOUT_MEANING.keys() - {"processor_path"}:
        assert key in report, key
    assert "num_training_steps" in report and "train_action_heads" in report
    assert "data.predict_action_keys" in report and "agent_pos_config" in report


def test_targets_exist():
    assert set(MAPPED.values()) <= flatten(default_config()).keys()


def test_without_customized_robot_dof_config_counts(read):
    config, _ = read(MINIMAL + "dof_config: {b: 3, a: 4}\nagent_pos_config: {b: 3, a: 4}\n")
    assert list(config.dof_config.items()) == [("b", 3), ("a", 4)] == list(config.agent_pos_config.items())
    off = SAMPLE.replace("enable_customized_robot_config: true", "enable_customized_robot_config: false")
    config, _ = read(off)
    assert config.dof_config.car_pose == 13 and config.robot_name is None
    assert config.predict_action_keys == ("follow_left_arm", "follow_left_gripper", "car_pose")


def test_example_placeholders_are_named_all_at_once(read):
    config, _ = read(
        MINIMAL.replace(": m", ": /path/to/wallx_model/").replace(": s", ": /path/to/workspace/")
        + "action_tokenizer_path: /path/to/fast/\nnorm_stats_path: /path/to/norm_stats.json\nresume:\n"
    )
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    assert [error.split(" =")[0] for error in caught.value.errors] == [
        "pretrained_wallx_path",
        "norm_stats_path",
        "save_path",
    ]


def test_example_robot_of_another_dataset(read):
    config, _ = read(SAMPLE.replace('name: "lerobot/aloha_mobile_cabinet"', 'name: "physical-intelligence/libero"'))
    with pytest.raises(ConfigError, match="physical-intelligence/libero"):
        resolve(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learnin_rate: 1\nbatch: 2\n", ["learnin_rate", '"learning_rate"', "batch"]),
        ("data: {action_horizn: 3}\n", ["data.action_horizn", '"data.action_horizon"']),
        ("data: {lerobot_config: {repo: x}}\n", ["data.lerobot_config.repo", "repo_id"]),
        ("learning_rate: fast\nnum_epoch: 1.5\n", ["learning_rate", "'fast'", "num_epoch", "1.5"]),
        ("dof_config: 3\n", ["dof_config", "table"]),
        ("profile: 'yes'\n", ["profile", "true or false"]),
        ("data: {resolution: 256}\n", ["data.resolution", "256", "table"]),
        ("data: {resolution: [256]}\n", ["data.resolution", "[256]", "table"]),
        ("data: {predict_action_keys: arm}\n", ["data.predict_action_keys", "'arm'", "list"]),
        ("customized_robot_config: {customized_dof_config: [a, b]}\n", ["customized_dof_config", "table"]),
        ("customized_robot_config: {customized_dof_config: {a: 1}}\ndata: {obs_action_keys: 3}\n", ["obs_act", "list"]),
        ("customized_robot_config: {customized_dof_config: 3}\n", ["customized_dof_config", "3", "table"]),
        ("save_path: 3\n", ["save_path", "3", "text"]),
        ("", ["config.yml is empty"]),
        ("version https://git-lfs.github.com/spec/v1\n", ["config.yml is a Git LFS pointer", "git lfs pull"]),
        ("min_lr: 1\nmin_lr: 2\n", ["min_lr", "twice"]),
        ("dof_config: {a: 1, a: 2}\n", ["'a'", "twice"]),
        ("a: [1\n", ["not YAML"]),
        ("- 1\n", ["no settings"]),
    ],
)
def test_errors_come_in_one_line(read, text, words):
    with pytest.raises(ValueError) as caught:
        read(text)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_a_file_is_utf8_with_or_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "config.yml"
    file.write_bytes(f"\ufeff{MINIMAL}log_name: Küche\n".encode())
    assert read_upstream_yaml(file)[0].log_name == "Küche"
    file.write_bytes(f"{MINIMAL}log_name: Küche\n".encode("latin-1"))
    with pytest.raises(ValueError, match="config.yml is not UTF-8 text"):
        read_upstream_yaml(file)


def test_config_file_prints_the_report(tmp_path, capsys):
    file = Path(__file__).parents[2] / "configs" / "upstream_yaml.py"
    spec = importlib.util.spec_from_file_location("upstream_yaml_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "config_qact.yml").write_text(SAMPLE)
    assert module.get_config(str(tmp_path / "config_qact.yml")).num_epoch == 20
    assert "torch_compile" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="upstream_yaml.py:PATH"):
        module.get_config("")
