import gzip
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from wallx_jax.training.profile import ProfileWindow


def traced(folder, steps: range, **changes) -> set[int]:
    """Which of these steps, each with a mark, are in the trace of a run that has them."""
    settings = {"profile_wait_iters": 1, "profile_warmup_iters": 1, "profile_active_iters": 2} | changes
    loop = SimpleNamespace(profile=True, profile_save_path=str(folder), **settings)
    with ProfileWindow(loop, steps[0] - 1, steps[-1]) as window:
        for step in steps:
            window.before(step)
            with jax.profiler.TraceAnnotation(f"mark{step}"):
                result = jnp.add(step, 1)
            window.after(step, result)
    names = set()
    for file in folder.rglob("*.trace.json.gz"):  # what Perfetto opens
        names |= {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
        assert file.with_name(file.name.replace(".trace.json.gz", ".xplane.pb")).is_file(), "what XProf opens"
    return {step for step in steps if f"mark{step}" in names}


@pytest.mark.parametrize(
    "steps, changes, kept",
    [
        (range(1, 7), {}, {3, 4}),
        (range(11, 17), {}, {13, 14}),  # counted from where the run starts
        (range(1, 7), {"profile_wait_iters": 0, "profile_warmup_iters": 0, "profile_active_iters": 1}, {1}),
        (range(1, 4), {"profile_active_iters": 9}, {3}),  # the run ends within the window
    ],
)
def test_the_trace_has_the_steps_of_the_window(tmp_path, caplog, steps, changes, kept):
    assert traced(tmp_path, steps, **changes) == kept
    assert not [record for record in caplog.records if record.name.startswith("wallx_jax")]


def test_a_run_that_ends_before_the_window_is_told(tmp_path, caplog):
    assert traced(tmp_path, range(1, 3)) == set()
    assert "begin at step 3, after the last, 2; lower profile_wait_iters" in caplog.text


def test_no_profile_unless_asked(tmp_path, caplog):
    loop = SimpleNamespace(
        profile=False, profile_save_path=None, profile_wait_iters=0, profile_warmup_iters=0, profile_active_iters=1
    )
    with ProfileWindow(loop, 0, 1) as window:
        window.before(1)
        window.after(1, jnp.zeros(()))
    assert not [record for record in caplog.records if record.name.startswith("wallx_jax")]
