"""Fine-tune WALL-OSS-FAST on lerobot/aloha_mobile_cabinet (all 14 dimensions), with actions as FAST tokens.

python -m wallx_jax.train --config=configs/aloha_fast.py --workdir=/data/aloha_fast
"""

from wallx_jax.config import default_config
from wallx_jax.config.robots import ALOHA_DOF


def get_config(arg: str = ""):
    c = default_config()
    c.pretrained_wallx_path = "x-square-robot/wall-oss-fast"
    c.use_fast_tokenizer = True
    c.action_tokenizer_path = "physical-intelligence/fast"
    c.repo_id = "lerobot/aloha_mobile_cabinet"
    c.dof_config = ALOHA_DOF
    c.agent_pos_config = ALOHA_DOF
    c.predict_action_keys = tuple(ALOHA_DOF)
    c.obs_action_keys = tuple(ALOHA_DOF)
    c.gradient_accumulation_steps = 32  # as in upstream's config_qact.yml
    c.save_path = "runs/aloha_fast"
    return c
