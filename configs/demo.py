"""Train a tiny, randomly initialized Wall-X on the tabletop dataset that scripts/demo.py writes.

`make demo` runs the whole demo. To run only the training, after its first two steps:

    python -m wallx_jax.train --config=configs/demo.py

It differs from a real run only in scale: a high learning rate for a narrow model without pretraining, a short action
chunk, and small images at their recorded size.
"""

from wallx_jax.config import default_config
from wallx_jax.config.robots import ALOHA_DOF


def get_config(arg: str = ""):
    c = default_config()
    c.pretrained_wallx_path = "runs/demo/model"
    c.repo_id = "runs/demo/dataset"
    c.save_path = "runs/demo/run"
    c.camera_views = {"face_view": "cam_high", "left_wrist_view": "cam_left_wrist"}
    c.resolution.face_view = c.resolution.left_wrist_view = -1  # keep the recorded size
    c.dof_config = ALOHA_DOF
    c.agent_pos_config = ALOHA_DOF
    c.action_horizon = 8
    c.max_length = 128
    c.learning_rate = 3e-3
    c.min_lr = 3e-4
    c.num_warmup_steps = 50
    c.batch_size_per_gpu = 64
    c.num_training_steps = 1500
    c.num_epoch = 0
    c.num_workers = 0
    c.frame_cache = "runs/demo/cache"
    c.save_interval = 750
    c.eval_interval = 250
    c.eval_frames = 128
    c.log_interval = 50
    return c
