import jax
import pytest
from helpers import tiny_run

import wallx_jax.train
from wallx_jax.training import sharding


@pytest.fixture(scope="session")
def wallx_dir(tmp_path_factory):
    """A Wall-X model directory with random weights."""
    return tiny_run.write_model(tmp_path_factory.mktemp("evaluation") / "model")


@pytest.fixture(scope="session")
def run_dir(wallx_dir, dataset_dir, tmp_path_factory):
    """A run of two updates on the synthetic dataset; one of its four episodes is held out."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    config = tiny_run.run_config(wallx_dir, dataset_dir, folder, num_training_steps=2, eval_interval=0)
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        wallx_jax.train.run(config)
    return folder
