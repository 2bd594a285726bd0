import pytest
import synthetic


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory):
    """A LeRobot v3.0 dataset on disk: see synthetic.py. Read-only; copy it to break it."""
    return synthetic.write_dataset(tmp_path_factory.mktemp("lerobot") / "synthetic")


@pytest.fixture(scope="session")
def dataset_info(dataset_dir):
    from wallx_jax.data.lerobot import read_info

    return read_info(dataset_dir)
