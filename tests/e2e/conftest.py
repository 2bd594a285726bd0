import pytest
from helpers import tiny_run


@pytest.fixture(scope="module")
def one_device():
    """Runs of this module use one of the virtual devices."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_devices(patch, 1)
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model") / "tiny")
