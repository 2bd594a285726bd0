"""How data workers start, and what they need of the machine."""

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wallx_jax.data import workers

Usage = collections.namedtuple("Usage", "total used free")


def test_shared_memory_that_is_too_small_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 100))
    batch = 100 // (workers.BUFFERED + 2)
    workers.check_shared_memory(1, batch, tmp_path)
    for count, size in ((1, batch + 1), (2, batch)):
        with pytest.raises(
            OSError, match=f"^{tmp_path} has 0 MiB free, .*{count} data workers.*--shm-size.*num_workers"
        ):
            workers.check_shared_memory(count, size, tmp_path)
    workers.check_shared_memory(0, 1000, tmp_path)
    workers.check_shared_memory(1, 1000, tmp_path / "absent")  # not every system has it


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_script_without_a_main_guard_runs_once(tmp_path):
    """Its functions reach the workers all the same, and what the main module says of itself is as before."""
    script = tmp_path / "script.py"
    script.write_text(
        "import grain, json\n"
        "from absl import flags\n"
        "flags.FLAGS.mark_as_parsed()\n"
        "from wallx_jax.data.workers import starting\n"
        "print('run once')\n"
        "def double(x): return 2 * x\n"
        "data = grain.MapDataset.source([1, 2, 3, 4]).map(double).to_iter_dataset()\n"
        "iterator = iter(data.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=2)))\n"
        "with starting(2): values = [next(iterator)]\n"
        "print(json.dumps(values + list(iterator)), __file__)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    once, values = result.stdout.splitlines()
    assert once == "run once" and sorted(json.loads(values.split("]")[0] + "]")) == [2, 4, 6, 8]
    assert values.endswith(str(Path(script)))
