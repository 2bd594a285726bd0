"""Runs of `wallx_jax.train` in processes of their own, which tests interrupt and kill.

Starting Python and importing torch takes longer than a tiny run, so one server process imports everything and forks
for each run. As a script: the server.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers import xla_flags


class Server:
    """Forks runs; `devices`: virtual CPU devices of each process; `folder`: for logs and compiled programs."""

    def __init__(self, folder: Path, devices: int = 1):
        self._folder, self._jobs = folder, 0
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{xla_flags.QUICK_COMPILE} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, model: Path, dataset: Path, save_path: Path, file_limit: int | None = None, **changes) -> "Job":
        """`file_limit`: bytes that a file may have; `changes` as for tiny_run.run_config."""
        self._jobs += 1
        log = self._folder / f"job{self._jobs}.log"
        pid = self._ask(
            start=[str(model), str(dataset), str(save_path)], changes=changes, log=str(log), limit=file_limit
        )
        return Job(self, pid, log)

    def _ask(self, **request) -> int:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the server has ended"
        return int(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


class Job:
    """One training process."""

    def __init__(self, server: Server, pid: int, log: Path):
        self._server, self.pid, self._log = server, pid, log
        self._status: int | None = None

    @property
    def running(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self._status is None and "Z" not in Path(f"/proc/{self.pid}/stat").read_text().split(") ")[1][0]
        return False

    def until(self, condition: Callable[[], bool], timeout_s: float = 200) -> None:
        """Returns when the condition holds or the process has ended."""
        deadline = time.monotonic() + timeout_s
        while self.running and not condition():
            assert time.monotonic() < deadline, f"waited too long for {condition}\n{self.log}"
            time.sleep(0.0005)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        if self._status is None:
            self.until(lambda: False)
            self._status = self._server._ask(wait=self.pid)
        return self._status

    def children(self) -> list[int]:
        """Process ids of its data workers and helpers."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


def serve() -> None:
    import lerobot.datasets.lerobot_dataset  # noqa: F401
    from absl import flags

    import wallx_jax.train
    from helpers import tiny_run

    flags.FLAGS.mark_as_parsed()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        if pid := os.fork():
            print(pid, flush=True)
            continue
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
        if request["limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        wallx_jax.train.main(tiny_run.run_config(*map(Path, request["start"]), **request["changes"]))
        sys.exit(0)


if __name__ == "__main__":
    serve()
