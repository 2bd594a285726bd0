"""Writes a tiny LeRobot v3.0 video dataset, the same bytes of state and action every time."""

from pathlib import Path

import numpy as np

from wallx_jax.data.writer import DatasetWriter

STATE, ACTION = "observation.state", "action"
CAMERAS = {"observation.images.cam_high": (64, 96), "observation.images.cam_left_wrist": (48, 48)}  # height, width
TASKS = ("pick up the red block", "open the cabinet")
LENGTHS = (7, 5, 8, 6)
DIMS, FPS = 14, 10
CONSTANT_DIM = 6  # of state and action


def episode_table(episode: int, dims: int = DIMS) -> tuple[np.ndarray, np.ndarray]:
    """float32 states and actions [frames, dims] of an episode."""
    rng = np.random.default_rng(episode)
    states = np.cumsum(rng.normal(size=(LENGTHS[episode] + 1, dims)), axis=0).astype(np.float32)
    states[:, CONSTANT_DIM] = 0.25
    return states[:-1], states[1:]


def frame_image(episode: int, frame: int, camera: str) -> np.ndarray:
    """uint8 [H, W, 3]: brightness says the frame, the tint says the episode, so that frames can be told apart after
    lossy video."""
    height, width = CAMERAS[camera]
    image = np.full((height, width, 3), 20 + 25 * frame, np.uint8)
    image[: height // 2, :, episode % 3] = 250
    return image


def camera_features(kind: str = "video") -> dict:
    """`kind`: "video", or "image" for images in the tables."""
    names = ["height", "width", "channels"]
    return {camera: {"dtype": kind, "shape": (*size, 3), "names": names} for camera, size in CAMERAS.items()}


def write_dataset(root: Path, camera_type: str = "video", dims: int = DIMS, **options) -> Path:
    """Writes the dataset to `root`. `camera_type`: as in `camera_features`; `options`: of DatasetWriter."""
    vector = {"dtype": "float32", "shape": (dims,), "names": [f"joint_{d}" for d in range(dims)]}
    features = {STATE: vector, ACTION: vector} | camera_features(camera_type)
    with DatasetWriter(root, FPS, features, robot_type="aloha", **options) as writer:
        for episode, length in enumerate(LENGTHS):
            images = {c: [frame_image(episode, frame, c) for frame in range(length)] for c in CAMERAS}
            states, actions = episode_table(episode, dims)
            writer.add_episode({STATE: states, ACTION: actions, **images}, task=TASKS[episode % 2])
    return root
