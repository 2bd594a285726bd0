"""Log a run's metrics to JSON lines, TensorBoard and wandb, and measure its speed."""

import importlib
import json
import logging
import math
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import jax

from wallx_jax.utils import extras
from wallx_jax.utils.files import atomic_file, write_text

logger = logging.getLogger(__name__)

_NOT_IN_TAGS = re.compile(r"[^-/\w.]")  # tensorboardX would replace and log these at every step


class MetricWriter:
    """Write scalars to {save_path}/metrics.jsonl, {save_path}/tensorboard/ and optionally wandb.

    metrics.jsonl has one flushed line per `write`: {"step": 10, "time": 1732382400.0, "loss": 0.5, ...}; time is in
    seconds since 1970, and a non-finite value is null.

    A full disk loses metrics, with a single warning, but does not stop the run. Lines in metrics.jsonl stay complete;
    TensorBoard's curves end there.

    A resumed run appends to the existing file, after removing entries beyond `resumed_step`, since those steps will be
    repeated. A new run in a directory that has a metrics.jsonl renames it to metrics.previous.jsonl.

    Only the first process writes; in the others every call is a no-op.

    Args:
        save_path: run directory.
        resumed_step: step that the run was restored from; None for a new run.
        use_wandb: also log to wandb.
        project: wandb project.
        name: name of the wandb run.
        config: config passed to wandb. A resumed run continues the wandb run of its save_path.

    Raises:
        ImportError: tensorboardX, or wandb if requested, is not installed; the message says how to install it.
    """

    def __init__(
        self,
        save_path: str | Path,
        *,
        resumed_step: int | None = None,
        use_wandb: bool = False,
        project: str = "wallx_jax",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._lines: TextIO | None = None
        self._told: set[str] = set()
        if jax.process_index() != 0:
            return
        # Import packages first: a missing one must not leave files behind.
        _import("tensorboardX", extras.install("train"))
        wandb = _import("wandb", f"{extras.install('wandb')}, or set use_wandb=False") if use_wandb else None
        folder = Path(save_path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lines = _open_lines(folder / "metrics.jsonl", resumed_step)
        self._curves = _EventFile(folder / "tensorboard", resumed_step)
        self._wandb = _start_wandb(wandb, folder, resumed_step, project, name, config) if wandb else None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log scalars (Python or NumPy numbers, or arrays of one element) at a step."""
        if self._lines is None:
            return
        values = {key: float(value) for key, value in scalars.items()}
        line: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        line |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self._unless_full("metrics.jsonl"):
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()  # what cannot be written stays in the buffer for the next flush
        if "tensorboard" not in self._told:  # TensorBoard stops reading the file at a truncated record
            with self._unless_full("tensorboard"):
                self._curves.write(step, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close every file; further writes are no-ops."""
        if self._lines is None:
            return
        with self._unless_full("metrics.jsonl"):
            self._lines.close()
        self._lines = None
        with self._unless_full("tensorboard"):
            self._curves.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextmanager
    def _unless_full(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if name not in self._told:
                self._told.add(name)
                logger.warning(
                    "%s cannot be written (%s): numbers will be missing", self._folder / name, error.strerror
                )


class _EventFile:
    """Write scalars to a TensorBoard event file.

    tensorboardX's own SummaryWriter writes in a thread that dies at the first error; its queue then fills up, and the
    next call would block forever.
    """

    def __init__(self, folder: Path, resumed_step: int | None):
        from tensorboardX import RecordWriter

        folder.mkdir(exist_ok=True)
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"))
        self._write(file_version="brain.Event:2")
        if resumed_step is not None:  # hides events logged after resumed_step
            self._write(step=resumed_step + 1, session_log={"status": "START"})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for key, value in values.items():
            self._write(step=step, summary=scalar(_NOT_IN_TAGS.sub("_", key), value))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())


def _import(module: str, remedy: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed to log metrics and is not installed: {remedy}") from error


def _open_lines(file: Path, resumed_step: int | None) -> TextIO:
    """Open metrics.jsonl for appending: truncated to `resumed_step`, or newly created if it is None."""
    if file.exists():
        if resumed_step is None:
            file.replace(file.with_name("metrics.previous.jsonl"))
        else:
            kept = [line for line in file.read_text("utf-8").splitlines() if _logged_step(line) <= resumed_step]
            with atomic_file(file) as lines:  # a crash leaves either the old file or the new one
                lines.write("".join(f"{line}\n" for line in kept).encode())
    return file.open("a", encoding="utf-8")


def _logged_step(line: str) -> float:
    """Return the step of a line; infinity if a crash truncated it."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _start_wandb(
    wandb: ModuleType,
    folder: Path,
    resumed_step: int | None,
    project: str,
    name: str | None,
    config: Mapping[str, Any] | None,
) -> Any:
    id_file = folder / "wandb_id.txt"
    known = id_file.read_text("utf-8").strip() if resumed_step is not None and id_file.exists() else None
    run = wandb.init(project=project, name=name, config=dict(config or {}), dir=str(folder), id=known, resume="allow")
    write_text(id_file, run.id)
    return run


class Stopwatch:
    """Measure the speed between two log lines, and the share of time spent in named waits.

        with watch("data_wait"):
            batch = next(batches)
        ...
        watch.summary(steps, samples)  ->  {"step_time_s": ..., "samples_per_s": ..., "data_wait_share": ...}

    JAX dispatches asynchronously, so the figures are only valid for a window that ends with fetching a result of its
    last step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._step_time_s: float | None = None
        self.restart()

    def restart(self) -> None:
        """Start a new window now, e.g. after compilation."""
        self._start = self._clock()
        self._paused_s = 0.0
        self._waits_s: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside the block as `name`."""
        start = self._clock()
        try:
            yield
        finally:
            self._waits_s[name] = self._waits_s.get(name, 0.0) + self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the block from the window, e.g. validation or a blocking save."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - start

    def summary(self, steps: int, samples: int) -> dict[str, float]:
        """Return the figures of a window with `steps` steps over `samples` samples, and start the next window.

        Returns:
            "step_time_s" (seconds per step), "samples_per_s", and "NAME_share" for each named wait.
        """
        elapsed_s = max(self._clock() - self._start - self._paused_s, 1e-9)
        shares = {f"{name}_share": wait_s / elapsed_s for name, wait_s in self._waits_s.items()}
        self._step_time_s = elapsed_s / max(steps, 1)
        self.restart()
        return {"step_time_s": self._step_time_s, "samples_per_s": samples / elapsed_s, **shares}

    def eta_s(self, remaining_steps: int) -> float | None:
        """Return the seconds for the remaining steps at the speed of the last window; None before the first one."""
        return None if self._step_time_s is None else remaining_steps * self._step_time_s
