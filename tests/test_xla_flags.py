import pytest
from helpers import xla_flags


def test_unknown_flags_are_left_out():
    known = "--xla_backend_optimization_level=0"
    assert xla_flags.accepted(("--xla_no_such_flag=1", known, "--xla_nor_this=2")) == known


def test_bad_flag_of_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    with pytest.raises(RuntimeError, match="Unknown flag in XLA_FLAGS: --xla_no_such_flag"):
        xla_flags.accepted(xla_flags.WANTED)
