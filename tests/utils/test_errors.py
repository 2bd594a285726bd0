"""Which errors commands report in one line, and how."""

import pytest

from wallx_jax.checkpoints.layout import CheckpointError
from wallx_jax.config.command_line import CommandLineError
from wallx_jax.data.errors import FrameError
from wallx_jax.training.loop import NonFiniteError, UnreadableData
from wallx_jax.utils.devices import DeviceError
from wallx_jax.utils.errors import ConfigError, UserError, root_cause, run_main, user_message
from wallx_jax.utils.versions import package_version
from wallx_jax.weights.safetensors_io import WeightsError


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (CheckpointError, RuntimeError),
        (CommandLineError, ValueError),
        (ConfigError, ValueError),
        (DeviceError, RuntimeError),
        (FrameError, ValueError),
        (NonFiniteError, RuntimeError),
        (UnreadableData, RuntimeError),
        (WeightsError, ValueError),
    ],
)
def test_errors_that_users_can_fix_are_also_built_in_ones(kind, base):
    assert issubclass(kind, UserError) and issubclass(kind, base)


@pytest.mark.parametrize("error", [WeightsError("bad"), OSError("bad"), ImportError("bad"), RuntimeError("bad")])
def test_run_main_reports_in_one_line(error):
    def main():
        raise error

    with pytest.raises(SystemExit, match="^error: bad$"):
        run_main(main)


def test_run_main_leaves_bugs_alone():
    with pytest.raises(TypeError):
        run_main(lambda: len(1))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("first\nsecond"), "first\nsecond"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (MemoryError(), "no memory left; use less"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GiB\npages"), "RESOURCE_EXHAUSTED: 3 GiB; use less"),
    ],
)
def test_messages(error, message):
    assert user_message(error, "use less") == message


def test_the_root_cause_is_the_innermost_exception_shortened():
    try:
        try:
            raise OSError("a\n  b " + "x" * 400)
        except OSError as inner:
            raise RuntimeError("pages") from inner
    except RuntimeError as error:
        assert root_cause(error) == "a b " + "x" * 296 + "..."


def test_versions():
    assert package_version("numpy") and package_version("nowhere") is None
