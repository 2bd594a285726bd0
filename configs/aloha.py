"""Fine-tune WALL-OSS-FLOW on lerobot/aloha_mobile_cabinet (all 14 dimensions) with flow matching.

python -m wallx_jax.train --config=configs/aloha.py --workdir=/data/aloha
"""

from wallx_jax.config import default_config
from wallx_jax.config.robots import ALOHA_DOF


def get_config(arg: str = ""):
    c = default_config()
    c.pretrained_wallx_path = "x-square-robot/wall-oss-flow"
    c.repo_id = "lerobot/aloha_mobile_cabinet"
    c.dof_config = ALOHA_DOF
    c.agent_pos_config = ALOHA_DOF
    c.predict_action_keys = tuple(ALOHA_DOF)
    c.obs_action_keys = tuple(ALOHA_DOF)
    c.gradient_accumulation_steps = 32  # as in upstream's config_qact.yml
    c.save_path = "runs/aloha"
    return c
