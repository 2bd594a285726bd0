"""What README and guides say is done, block by block, with a tiny model and short recordings in the places of the
published ones. Of training commands those that only name the run are carried out; those with other settings are planned
(--dry_run), since what the settings do is tested where they belong."""

import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import guides, tiny_run

import wallx_jax.train
from wallx_jax.config import default_config
from wallx_jax.data.writer import DatasetWriter

pytestmark = pytest.mark.slow

# Programs that other tests run, or that need a launcher, a robot or much time; test_docs.py has parsed their arguments.
NOT_HERE = ("make", "srun", "mpirun", "tensorboard", "lerobot-", "JAX_", "CUDA_", "python -m lerobot.",
            "python scripts/parity.py", "python scripts/benchmark", "python scripts/bench/")  # fmt: skip
FEWER = {
    "openloop_plot": "--steps 1 --episodes 1",
    "ablate": "--steps 1 --frames 2",
    "semantics": "--batches 1 --batch-size 2 --frames 2 --steps 1",
}
SMALL = """
import runpy
def get_config(arg=""):
    c = runpy.run_path({real!r})["get_config"](*([arg] if arg else []))
    c.numerics.param_dtype = c.numerics.compute_dtype = "float32"
    for view in c.resolution:
        c.resolution[view] = 56
    c.num_training_steps, c.batch_size_per_gpu, c.gradient_accumulation_steps = 2, 2, 1
    c.log_interval, c.eval_interval, c.num_workers = 1, 0, 0
    return c
"""
VECTORS = ("observation.state", "action")
CAMERAS = {"lerobot/aloha_mobile_cabinet": ("cam_high", "cam_left_wrist", "cam_right_wrist"),
           "me/so101_pick": ("front", "wrist")}  # fmt: skip
JOINTS = [
    f"{joint}.pos" for joint in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
]


def record(root: Path, cameras: tuple[str, ...], names: list[str], task: str) -> None:
    """Two short episodes."""
    pictures = [f"observation.images.{camera}" for camera in cameras]
    vector = {"dtype": "float32", "shape": (len(names),), "names": names}
    video = {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
    features = dict.fromkeys(VECTORS, vector) | dict.fromkeys(pictures, video)
    rng = np.random.default_rng(0)
    with DatasetWriter(root, 30, features, codec="h264") as writer:
        for _ in range(2):
            values = {key: rng.normal(size=(6, len(names))).astype(np.float32) for key in VECTORS}
            frames = {key: rng.integers(0, 256, (6, 48, 64, 3), np.uint8) for key in pictures}
            writer.add_episode(values | frames, task)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Models and datasets under the names of the published ones, and a run."""
    folder = tmp_path_factory.mktemp("stand_ins")
    tiny_run.write_model(folder / "x-square-robot/wall-oss-flow")
    tiny_run.write_model(folder / "Qwen/Qwen2.5-VL-3B-Instruct", qwen=True)
    for repo_id, cameras in CAMERAS.items():
        names = JOINTS if repo_id.startswith("me/") else [f"joint_{dim}" for dim in range(14)]
        record(folder / "lerobot" / repo_id, cameras, names, "Put the red cube into the bowl")
    return folder


@pytest.fixture
def place(stand_ins, tmp_path, monkeypatch):
    """A working directory with all of that, on one device; configurations are those of the repository and the guides,
    made small."""
    guides.furnish(tmp_path)
    (tmp_path / "configs").rename(tmp_path / "real")
    (tmp_path / "configs").mkdir()
    for file in (tmp_path / "real").iterdir():
        (tmp_path / "configs" / file.name).write_text(SMALL.format(real=str(file)))
    for owner in ("x-square-robot", "Qwen"):
        (tmp_path / owner).symlink_to(stand_ins / owner)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(stand_ins / "lerobot"))
    tiny_run.use_devices(monkeypatch, 1)
    return tmp_path


class Robot:
    """The arm of the guide: two chunks long, then the operator presses Ctrl-C."""

    action_features = dict.fromkeys(JOINTS, float)

    def __init__(self, config):
        self.sent, self.looks, self.connected = [], 0, False
        assert set(config.cameras) == {"front", "wrist"}

    def connect(self):
        self.connected = True

    def get_observation(self):
        self.looks += 1
        if self.looks == 4:
            raise KeyboardInterrupt
        picture = np.full((48, 64, 3), 40 * self.looks, np.uint8)
        return dict.fromkeys(JOINTS, 0.1) | {"front": picture, "wrist": picture}

    def send_action(self, action):
        assert list(action) == JOINTS and all(np.isfinite(value) for value in action.values())
        self.sent.append(action)

    def disconnect(self):
        self.connected = False


def is_done_here(command: str) -> bool:
    return not command.startswith(NOT_HERE) and "--config.distributed" not in command


def do(command: str) -> None:
    """A command of a guide."""
    _, *words = shlex.split(command)
    settings = [word for word in words if word.startswith("--config.") and word != "--config.resume.ckpt=latest"]
    if "wallx_jax.train" in words and settings and "--dry_run" not in words:
        words.append("--dry_run")
    if "--dry_run" in words and not any(word.startswith(("--workdir", "--config.resume")) for word in words):
        words.append("--workdir=runs/planned")
    code = 0
    try:
        guides.run_program([*words, *FEWER.get(Path(words[0]).stem, "").split()])
    except SystemExit as stop:
        code = stop.code
    if not ("wallx_jax.doctor" in words and "--checkpoint" not in words):  # it tells of this machine
        assert not code, f"{command}: {code}"


@pytest.mark.parametrize("page", guides.PAGES, ids=lambda page: page.stem)
def test_guide(page, place, stand_ins, monkeypatch, restored_state):
    if page.stem == "your_robot":
        pytest.importorskip("lerobot")
        monkeypatch.setattr("lerobot.robots.so_follower.SO101Follower", Robot)
    rng = np.random.default_rng(0)
    config = runpy.run_path("configs/aloha.py")["get_config"]()
    if page.stem in ("pytorch", "troubleshooting"):  # which begin with a run that is there
        if not (stand_ins / "run").exists():
            config.save_path = str(stand_ins / "run")
            wallx_jax.train.run(config)
        Path("runs").mkdir()
        Path("runs/aloha").symlink_to(stand_ins / "run")
    config.save_path = "runs/from_python"
    rgb = rng.integers(0, 256, (48, 64, 3), np.uint8)
    names = {"config": config, "rgb": rgb, "state": np.zeros(14), "c": default_config()}
    for language, text in guides.blocks(page):
        if language == "bash" and not text.startswith("#!"):
            for command in guides.commands(text):
                if is_done_here(command):
                    do(command)
        elif language == "python" and "modeling_wall_x" not in text:
            exec(compile(text, page.name, "exec"), names)
    if page.stem == "your_robot":
        assert len(names["robot"].sent) == 32 and not names["robot"].connected, "two halves of a chunk, then let go"
