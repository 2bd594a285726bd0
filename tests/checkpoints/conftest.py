import pytest
from helpers import tiny_run
from helpers.tiny_models import SMALL, SMALL_QWEN, Directory, random_params


@pytest.fixture
def wallx(tmp_path):
    return Directory(tmp_path / "wallx", SMALL, random_params(SMALL))


@pytest.fixture
def qwen(tmp_path):
    return Directory(tmp_path / "qwen", SMALL_QWEN, random_params(SMALL_QWEN))


@pytest.fixture(scope="session")
def wallx_dir(tmp_path_factory):
    """A Wall-X model directory with a tokenizer."""
    return tiny_run.write_model(tmp_path_factory.mktemp("conversion") / "wallx")
