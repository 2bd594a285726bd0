"""Writes a tiny LeRobot v3.0 video dataset, the same bytes of state and action every time."""

from pathlib import Path

import numpy as np

STATE, ACTION = "observation.state", "action"
CAMERAS = {"observation.images.cam_high": (64, 96), "observation.images.cam_left_wrist": (48, 48)}  # height, width
TASKS = ("pick up the red block", "open the cabinet")
LENGTHS = (7, 5, 8, 6)
DIMS, FPS = 14, 10
CONSTANT_DIM = 6  # of state and action


def episode_table(episode: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 states and actions [frames, DIMS] of an episode."""
    rng = np.random.default_rng(episode)
    states = np.cumsum(rng.normal(size=(LENGTHS[episode] + 1, DIMS)), axis=0).astype(np.float32)
    states[:, CONSTANT_DIM] = 0.25
    return states[:-1], states[1:]


def frame_image(episode: int, frame: int, camera: str) -> np.ndarray:
    """uint8 [H, W, 3]: brightness says the frame, the tint says the episode, so that frames can be told apart after
    lossy video."""
    height, width = CAMERAS[camera]
    image = np.full((height, width, 3), 20 + 25 * frame, np.uint8)
    image[: height // 2, :, episode % 3] = 250
    return image


def write_dataset(root: Path, camera_type: str = "video") -> Path:
    """Creates the dataset at `root` with lerobot's own writer, whichever release is installed. `camera_type`: "video",
    or "image" for pictures in the tables."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        key: {"dtype": "float32", "shape": (DIMS,), "names": [f"joint_{d}" for d in range(DIMS)]}
        for key in (STATE, ACTION)
    } | {
        camera: {"dtype": camera_type, "shape": (*size, 3), "names": ["height", "width", "channels"]}
        for camera, size in CAMERAS.items()
    }
    dataset = LeRobotDataset.create(
        "tests/synthetic", FPS, features, root=root, robot_type="aloha", video_backend="pyav",
        use_videos=camera_type == "video",
    )  # fmt: skip
    for episode, length in enumerate(LENGTHS):
        states, actions = episode_table(episode)
        for frame in range(length):
            images = {camera: frame_image(episode, frame, camera) for camera in CAMERAS}
            dataset.add_frame({STATE: states[frame], ACTION: actions[frame], "task": TASKS[episode % 2], **images})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    return root
