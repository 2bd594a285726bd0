"""The settings of a training run, declared once, as frozen dataclasses that `wallx_jax.config.resolve` returns.

Each field carries its default, documentation and constraints (`wallx_jax.utils.settings`); checks between settings of
a section stand in its `errors`.
"""

from wallx_jax.config.schema.data import AugmentConfig, Camera, DataConfig, SplitMode, UnreadableFrames
from wallx_jax.config.schema.devices import DistributedConfig, MeshConfig, Platform
from wallx_jax.config.schema.loop import LoopConfig
from wallx_jax.config.schema.model import ModelSource
from wallx_jax.config.schema.optim import OptimConfig, Optimizer
from wallx_jax.config.schema.robot import RobotConfig
from wallx_jax.config.schema.run import MixedDataset, RunConfig, dataset_name

__all__ = [
    "AugmentConfig",
    "Camera",
    "DataConfig",
    "DistributedConfig",
    "LoopConfig",
    "MeshConfig",
    "MixedDataset",
    "ModelSource",
    "OptimConfig",
    "Optimizer",
    "Platform",
    "RobotConfig",
    "RunConfig",
    "SplitMode",
    "UnreadableFrames",
    "dataset_name",
]
