"""Run the training loop: draw batches, run the compiled step, log, validate and save."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from wallx_jax.config.schema import LoopConfig
from wallx_jax.data.batch import Batch, EvalBatch, describe
from wallx_jax.data.pipeline import DataLoader
from wallx_jax.data.unreadable import SkippedFrames
from wallx_jax.models.wallx import LossTotals
from wallx_jax.training import flops
from wallx_jax.training.metrics import MetricWriter, Stopwatch
from wallx_jax.training.profile import ProfileWindow
from wallx_jax.training.progress import Progress
from wallx_jax.training.sharding import batch_sharding
from wallx_jax.training.state import TrainState
from wallx_jax.utils import tree
from wallx_jax.utils.errors import UserError
from wallx_jax.utils.files import atomic_file

T = TypeVar("T", Batch, EvalBatch)


class UnreadableData(UserError, RuntimeError):
    """Raised when a sample cannot be read or encoded during a run; see `run_loop` for what has been saved."""


class NonFiniteError(UserError, RuntimeError):
    """Raised when too many updates were skipped because their loss or gradients were not finite."""


@dataclass(frozen=True)
class StepCounts:
    """Length of a run.

    Attributes:
        global_batch: samples per update, over all devices and micro-batches.
        epoch: samples per epoch.
        total_steps: updates of the run.
        decay_steps: updates until the learning rate has decayed.
    """

    global_batch: int
    epoch: int
    total_steps: int
    decay_steps: int


@dataclass(frozen=True)
class Steps:
    """The compiled train and eval steps.

    They are compiled ahead of time, so that a change of shape is an error rather than a second compilation.

    Attributes:
        train: (state, batch [N, B]) -> (state, metrics), see `step.make_train_step`.
        evaluate: (params, batch [B]) -> (sums, counts), see `step.make_eval_step`; None for no validation.
        mesh: devices that they are compiled for.
        flops_per_sample: model FLOPs of an update per sample, see `training.flops`.
        datasets: names of the datasets whose losses are also reported individually; empty in a run with only one.
    """

    train: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Any, EvalBatch], tuple[LossTotals, LossTotals]] | None
    mesh: Mesh
    flops_per_sample: int
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        batches: training batches [N * B, ...] on the host; their position corresponds to the state after the last one.
        held_out: returns a new iterable over the validation batches.
        skipped_frames: frames that the data workers could not decode and skipped.
    """

    batches: DataLoader
    held_out: Callable[[], Iterable[EvalBatch]]
    skipped_frames: SkippedFrames


@dataclass(frozen=True)
class RunOutputs:
    """Where a run's results go.

    Attributes:
        progress: progress display.
        writer: receives the metrics.
        save: save(step, state, last logged loss) starts writing a checkpoint.
        wait: waits until all checkpoints are complete.
    """

    progress: Progress
    writer: MetricWriter
    save: Callable[[int, TrainState, float | None], None]
    wait: Callable[[], None]


def abstract_batch(sample: T, size: int, mesh: Mesh, micro_batches: int | None = None) -> T:
    """Return the shapes, dtypes and shardings of `put_batch` for `size` samples like this one (no batch axis)."""
    leading: tuple[int, ...] = (size,) if micro_batches is None else (micro_batches, size // micro_batches)
    sharding = batch_sharding(mesh, len(leading) - 1)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding), sample)


def put_batch(batch: T, mesh: Mesh, micro_batches: int | None = None) -> T:
    """Put a host batch [N * B, ...] on the devices, sharded over the mesh.

    Returns:
        Device arrays [N, B, ...] if `micro_batches` N is given, otherwise [N * B, ...].
    """
    leading = 0 if micro_batches is None else 1
    sharding = batch_sharding(mesh, leading)

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        if micro_batches is not None:
            x = x.reshape(micro_batches, len(x) // micro_batches, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, batch)


def run_loop(
    state: TrainState,
    steps: Steps,
    data: RunData,
    outputs: RunOutputs,
    config: LoopConfig,
    length: StepCounts,
    stop: Callable[[], bool],
) -> TrainState:
    """Train from state.step to the end of the run, or until `stop` returns True; the last step is always saved.

    Args:
        state: initial training state; donated to the first update.
        steps: compiled train and eval steps.
        data: batches for training and validation.
        outputs: receives metrics and checkpoints.
        config: intervals of logging, validation and saving.
        length: length of the run.
        stop: called after each update; returns whether it was the last one.

    Returns:
        The final state.

    Raises:
        NonFiniteError: `max_nonfinite_steps` updates were skipped; the last batch is kept in save_path.
        UnreadableData: the next batch or a validation batch cannot be read. The updates before it have been saved,
            except in a multi-process run, where all processes would have to save together.
    """
    progress, total_steps, first = outputs.progress, length.total_steps, int(state.step)
    skipped = SkippedUpdates(int(state.skipped), config, progress)
    watch, window, loss, logged = Stopwatch(), [], None, first

    def unreadable(step: int, where: str, error: Exception) -> UnreadableData:
        """Save the state after `step`, if possible, and return the exception to raise."""
        saved = "nothing was trained"
        if step > first and jax.process_count() == 1:
            skipped.check_last()
            outputs.save(step, state, loss)
            saved = f"the {step - first} updates before it are saved as step {step}"
        elif step > first:
            saved = "the run can be resumed from its last checkpoint"
        return UnreadableData(
            f"{where}: {error}; {saved}. Repair the data, or leave out what is wrong (settings `episodes`, "
            "`unreadable_frames`), and continue with resume.ckpt=latest"
        )

    with ProfileWindow(config, first, total_steps) as profiler:
        for step in range(first + 1, total_steps + 1):
            profiler.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with watch("data_wait"):
                    try:
                        batch = next(data.batches)
                    except Exception as error:
                        raise unreadable(step - 1, f"update {step}", error) from error
                state, metrics = steps.train(state, put_batch(batch, steps.mesh, config.gradient_accumulation_steps))
            window.append(metrics)
            progress.advance()
            skipped.add(step, batch, metrics)

            stopping = stop()
            if step % config.log_interval == 0 or step == total_steps or stopping:
                scalars = averages(jax.device_get(window))
                scalars["skipped"] = float(state.skipped)
                scalars |= watch.summary(step - logged, length.global_batch * (step - logged))
                scalars |= flops.rates(steps.flops_per_sample * scalars["samples_per_s"], steps.mesh)
                for message in data.skipped_frames.new():
                    progress.note(message)
                if data.skipped_frames.count:
                    scalars["skipped_frames"] = float(data.skipped_frames.count)
                loss, window, logged = scalars["loss"], [], step
                outputs.writer.write(step, scalars)
                eta_s = watch.eta_s(total_steps - step)
                progress.report(step, loss, scalars["samples_per_s"], eta_s, scalars.get("mfu"))
            if steps.evaluate and config.eval_interval and (step % config.eval_interval == 0 or step == total_steps):
                with watch.paused():
                    try:
                        scalars = validate(steps, state.eval_params, data.held_out(), config.flow_loss_weight)
                    except (ValueError, OSError) as error:
                        raise unreadable(step, f"validation after update {step}", error) from error
                    outputs.writer.write(step, scalars)
                    progress.note(f"step {step}/{total_steps} | validation loss {scalars['val_loss']:.4g}")
            if step % config.save_interval == 0 or step == total_steps or stopping:
                skipped.check_last()
                with watch.paused():
                    outputs.save(step, state, loss)
            profiler.after(step, state.step)
            if stopping:
                break
    outputs.wait()
    return state


class SkippedUpdates:
    """Counts the updates that were skipped because of non-finite values, and ends a run that has too many.

    Args:
        count: updates skipped before this run was resumed.
        config: max_nonfinite_steps, and save_path, where the last batch is kept.
        progress: reports each of them.
    """

    def __init__(self, count: int, config: LoopConfig, progress: Progress):
        self._count, self._config, self._progress = count, config, progress
        self._last: tuple[int, Batch, Mapping[str, jax.Array]] | None = None

    def add(self, step: int, batch: Batch, metrics: Mapping[str, jax.Array]) -> None:
        """Add an update and check the one before it, because fetching the result of this one would stall the device.

        Raises:
            NonFiniteError: see `run_loop`.
        """
        self.check_last()
        self._last = (step, batch, metrics)

    def check_last(self) -> None:
        """Check the last update added, too. Raises as `add` does."""
        if self._last is None:
            return
        (step, batch, metrics), self._last = self._last, None
        if bool(metrics["finite"]):
            return
        self._count += 1
        self._progress.note(f"step {step}: loss or gradients are not finite; update skipped ({self._count} so far)")
        if self._count < self._config.max_nonfinite_steps:
            return
        try:
            kept = f"the last batch is in {save_bad_batch(batch, Path(self._config.save_path).expanduser(), step)}"
        except OSError as error:
            kept = f"the last batch could not be kept ({error})"
        raise NonFiniteError(
            f"stopped at step {step}: {self._count} updates had a loss or gradients that are not finite "
            f"(max_nonfinite_steps = {self._config.max_nonfinite_steps}); {kept}. "
            f"Lower learning_rate, or look at the data with numpy.load"
        )


def averages(window: list[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Average the metrics over the updates of a log window that were not skipped.

    The learning rates are those of the last update. A metric given as a pair (sum, count) becomes total sum / total
    count, and is omitted if the count is 0.
    """
    good = [metrics for metrics in window if metrics["finite"]]
    means = {}
    for key, value in window[-1].items():
        if key == "finite":
            continue
        if key.startswith("learning_rate"):
            means[key] = float(value)
        elif isinstance(value, tuple):
            total, count = np.sum([metrics[key] for metrics in good], axis=0) if good else (0, 0)
            means |= {key: float(total / count)} if count else {}
        else:
            means[key] = float(np.mean([metrics[key] for metrics in good])) if good else float("nan")
    return means


def validate(
    steps: Steps, params: tree.Tree, batches: Iterable[EvalBatch], flow_loss_weight: float
) -> dict[str, float]:
    """Compute the validation losses, each the mean over all its labels or channels in all frames.

    They depend only on the frames, not on how these are divided into batches and over devices. With several datasets,
    the losses of each dataset are included, where it has any labels or channels.

    Args:
        steps: compiled steps.
        params: parameters for inference.
        batches: validation batches on the host.
        flow_loss_weight: weight of the flow loss in "val_loss".

    Returns:
        {metric name: value}.
    """
    evaluate = steps.evaluate
    if evaluate is None:
        raise ValueError("there is no evaluation step: the run was compiled without held-out data")
    totals = [jax.device_get(evaluate(params, put_batch(batch, steps.mesh))) for batch in batches]
    sums, counts = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *totals)
    scalars = {"val_loss": 0.0}
    for loss, weight in (("cross_entropy", 1.0), ("flow", flow_loss_weight)):
        total, count = getattr(sums, loss), getattr(counts, loss)
        if not count.any():
            continue
        mean = float(total.sum() / count.sum())
        scalars |= {"val_loss": scalars["val_loss"] + weight * mean, f"val_{loss}_loss": mean}
        for i, name in enumerate(steps.datasets):
            if count[i]:
                scalars[f"val_{loss}_loss/{name}"] = float(total[i] / count[i])
    if counts.action_correct is not None and counts.action_correct.any():
        scalars["val_action_accuracy"] = float(sums.action_correct.sum() / counts.action_correct.sum())
    return scalars


def save_bad_batch(batch: Batch, save_path: Path, step: int) -> Path:
    """Write a batch's arrays to save_path/nonfinite_step_N.npz and return the path."""
    arrays = {f"image_{i}": image for i, image in enumerate(batch.images)}
    arrays |= {name: getattr(batch, name) for name in describe(batch) if name != "images"}
    path = save_path / f"nonfinite_step_{step}.npz"
    with atomic_file(path) as file:
        np.savez(file, **arrays)
    return path
