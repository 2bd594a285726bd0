"""Train from an unmodified upstream Wall-X YAML configuration.

python -m wallx_jax.train --config=configs/upstream_yaml.py:workspace/lerobot_example/config_qact.yml

Prints which of its keys are ignored or changed. Settings can be overridden as usual, e.g. --config.num_epoch=1.
"""

from wallx_jax.config.upstream_yaml import read_upstream_yaml


def get_config(arg: str = ""):
    config, report = read_upstream_yaml(arg)
    print(report)
    return config
