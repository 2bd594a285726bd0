"""Train from Qwen2.5-VL-3B on lerobot/aloha_mobile_cabinet: the guide's reproduction recipe, global batch size 128.

python -m wallx_jax.train --config=configs/aloha_from_vlm.py:DEVICES --workdir=/data/aloha_from_vlm

DEVICES is the number of devices (default 1); batch size and gradient accumulation are derived from it. For FAST actions
instead of flow matching, add --config.use_fast_tokenizer=True.
"""

import math

from wallx_jax.config import default_config
from wallx_jax.config.robots import ALOHA_DOF

GLOBAL_BATCH = 128


def get_config(arg: str = "1"):
    if not arg.isdecimal() or int(arg) < 1 or GLOBAL_BATCH % int(arg):
        raise ValueError(f"aloha_from_vlm.py:{arg}: give a number of devices that divides {GLOBAL_BATCH}")
    per_device = GLOBAL_BATCH // int(arg)
    c = default_config()
    c.pretrained_wallx_path = "Qwen/Qwen2.5-VL-3B-Instruct"
    c.action_tokenizer_path = "physical-intelligence/fast"
    c.repo_id = "lerobot/aloha_mobile_cabinet"
    c.dof_config = ALOHA_DOF
    c.agent_pos_config = ALOHA_DOF
    c.predict_action_keys = tuple(ALOHA_DOF)
    c.obs_action_keys = tuple(ALOHA_DOF)
    c.batch_size_per_gpu = math.gcd(per_device, 8)
    c.gradient_accumulation_steps = per_device // c.batch_size_per_gpu
    c.save_path = "runs/aloha_from_vlm"
    return c
