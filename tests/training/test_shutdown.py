"""How a process ends that is alone; for many see tests/e2e/test_two_processes.py."""

import pytest

from wallx_jax.training import distributed, shutdown


def test_a_process_that_is_alone_ends_in_the_usual_way(capsys):
    distributed.meet()
    with pytest.raises(SystemExit) as exit, shutdown.together():
        shutdown.fail("error: what is wrong", 3)
    assert exit.value.code == 3
    assert capsys.readouterr().err == "error: what is wrong\n"


def test_together_hides_no_error():
    with pytest.raises(ZeroDivisionError), shutdown.together():
        1 / 0  # noqa: B018
