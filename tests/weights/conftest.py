import pytest
from helpers.tiny_models import SMALL, SMALL_QWEN, Directory, random_params

from wallx_jax.weights.export import save_directory


@pytest.fixture
def wallx(tmp_path):
    return Directory(tmp_path / "wallx", SMALL, random_params(SMALL))


@pytest.fixture
def qwen(tmp_path):
    return Directory(tmp_path / "qwen", SMALL_QWEN, random_params(SMALL_QWEN))


@pytest.fixture
def saved(tmp_path):
    """A Wall-X directory as `save_directory` makes it."""
    save_directory(tmp_path / "saved", SMALL, random_params(SMALL))
    return tmp_path / "saved"
