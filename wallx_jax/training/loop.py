"""Run the training loop: draw batches, run the compiled step, log, validate and save."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from wallx_jax.config.schema import LoopConfig
from wallx_jax.data.batch import Batch, EvalBatch, describe
from wallx_jax.data.unreadable import SkippedFrames
from wallx_jax.models.wallx import LossTotals
from wallx_jax.training import flops
from wallx_jax.training.metrics import MetricWriter, Stopwatch
from wallx_jax.training.profile import ProfileWindow
from wallx_jax.training.progress import Progress
from wallx_jax.training.sharding import batch_sharding
from wallx_jax.training.state import TrainState
from wallx_jax.utils.errors import UserError
from wallx_jax.utils.files import atomic_file

T = TypeVar("T", Batch, EvalBatch)


class UnreadableData(UserError, RuntimeError):
    """Raised when a sample cannot be read or encoded during a run; see `run_loop` for what has been saved."""


class NonFiniteError(UserError, RuntimeError):
    """Raised when too many updates were skipped because their loss or gradients were not finite."""


@dataclass(frozen=True)
class Steps:
    """The compiled train and eval steps.

    They are compiled ahead of time, so that a change of shape is an error rather than a second compilation.

    Attributes:
        train: (state, batch [N, B]) -> (state, metrics), see `step.make_train_step`.
        evaluate: (params, batch [B]) -> (sums, counts), see `step.make_eval_step`; None for no validation.
        flops_per_sample: model FLOPs of an update per sample, see `training.flops`.
        datasets: names of the datasets whose losses are also reported individually; empty in a run with only one.
    """

    train: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Any, EvalBatch], tuple[LossTotals, LossTotals]] | None
    flops_per_sample: int
    datasets: tuple[str, ...] = ()


def abstract_batch(sample: T, size: int, mesh: Mesh, micro_batches: int | None = None) -> T:
    """Return the shapes, dtypes and shardings of `put_batch` for `size` samples like this one (no batch axis)."""
    leading = (size,) if micro_batches is None else (micro_batches, size // micro_batches)
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
    batches: Iterator[Batch],
    steps: Steps,
    total_steps: int,
    samples_per_step: int,
    loop: LoopConfig,
    mesh: Mesh,
    held_out: Callable[[], Iterable[EvalBatch]],
    writer: MetricWriter,
    progress: Progress,
    save: Callable[[int, TrainState, float | None], None],
    stop: Callable[[], bool] = lambda: False,
    skipped_frames: SkippedFrames | None = None,
) -> TrainState:
    """Train from state.step to `total_steps`, or until `stop` returns True; the last step is always saved.

    Args:
        state: initial training state; donated to the first update.
        batches: iterator over host batches [N * B, ...]; its position corresponds to the state after the last batch.
        steps: compiled train and eval steps.
        total_steps: number of updates at the end of the run.
        samples_per_step: samples per update over all processes.
        loop: loop config.
        mesh: device mesh.
        held_out: returns a new iterable over the validation batches.
        writer: receives the metrics.
        progress: progress display.
        save: writes a checkpoint of (step, state, last logged loss).
        stop: called after each update; returns whether it was the last one.
        skipped_frames: frames that the data workers could not decode and skipped.

    Returns:
        The final state.

    Raises:
        NonFiniteError: `max_nonfinite_steps` updates were skipped; the last batch is kept in save_path.
        UnreadableData: the next batch or a validation batch cannot be read. The updates before it have been saved,
            except in a multi-process run, where all processes would have to save together.
    """
    watch, window = Stopwatch(), []
    pending: deque[tuple[int, Batch, Mapping[str, jax.Array]]] = deque()
    skipped, loss, logged = int(state.skipped), None, int(state.step)

    def check(step: int, batch: Batch, metrics: Mapping[str, jax.Array]) -> None:
        nonlocal skipped
        if bool(metrics["finite"]):
            return
        skipped += 1
        progress.note(f"step {step}: loss or gradients are not finite; update skipped ({skipped} so far)")
        if skipped >= loop.max_nonfinite_steps:
            try:
                kept = f"the last batch is in {save_bad_batch(batch, Path(loop.save_path), step)}"
            except OSError as error:
                kept = f"the last batch could not be kept ({error})"
            raise NonFiniteError(
                f"stopped at step {step}: {skipped} updates had a loss or gradients that are not finite "
                f"(max_nonfinite_steps = {loop.max_nonfinite_steps}); {kept}. "
                f"Lower learning_rate, or look at the data with numpy.load"
            )

    first = int(state.step)

    def give_up(step: int, where: str, error: Exception) -> NoReturn:
        saved = "nothing was trained"
        if step > first and jax.process_count() == 1:
            while pending:
                check(*pending.popleft())
            save(step, state, loss)
            saved = f"the {step - first} updates before it are saved as step {step}"
        elif step > first:
            saved = "the run goes on from its last checkpoint"
        raise UnreadableData(
            f"{where}: {error}; {saved}. Mend the data, or leave out what is wrong (settings `episodes`, "
            "`unreadable_frames`), and go on with resume.ckpt=latest"
        ) from error

    with ProfileWindow(loop, int(state.step), total_steps) as profiler:
        for step in range(int(state.step) + 1, total_steps + 1):
            profiler.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with watch("data_wait"):
                    try:
                        batch = next(batches)
                    except Exception as error:
                        give_up(step - 1, f"update {step}", error)
                state, metrics = steps.train(state, put_batch(batch, mesh, loop.gradient_accumulation_steps))
            window.append(metrics)
            progress.advance()
            # The check lags one step behind, so that fetching its result does not stall the device.
            pending.append((step, batch, metrics))
            while len(pending) > 1:
                check(*pending.popleft())

            stopping = stop()
            if step % loop.log_interval == 0 or step == total_steps or stopping:
                scalars = averages(jax.device_get(window))
                scalars["skipped"] = float(state.skipped)
                scalars |= watch.summary(step - logged, samples_per_step * (step - logged))
                scalars |= flops.rates(steps.flops_per_sample * scalars["samples_per_s"], mesh)
                for message in skipped_frames.new() if skipped_frames else ():
                    progress.note(message)
                if skipped_frames and skipped_frames.count:
                    scalars["skipped_frames"] = float(skipped_frames.count)
                loss, window, logged = scalars["loss"], [], step
                writer.write(step, scalars)
                eta_s = watch.eta_s(total_steps - step)
                progress.report(step, loss, scalars["samples_per_s"], eta_s, scalars.get("mfu"))
            if steps.evaluate and loop.eval_interval and (step % loop.eval_interval == 0 or step == total_steps):
                with watch.paused():
                    try:
                        scalars = validate(steps, state.acting, held_out(), mesh, loop.flow_loss_weight)
                    except (ValueError, OSError) as error:
                        give_up(step, f"validation after update {step}", error)
                    writer.write(step, scalars)
                    progress.note(f"step {step}/{total_steps} | validation loss {scalars['val_loss']:.4g}")
            if step % loop.save_interval == 0 or step == total_steps or stopping:
                while pending:
                    check(*pending.popleft())
                with watch.paused():
                    save(step, state, loss)
            profiler.after(step, state.step)
            if stopping:
                break
    return state


def averages(window: list[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Average the metrics over the updates of a log window that were not skipped.

    The learning rate is that of the last update. A metric given as a pair (sum, count) becomes total sum / total count,
    and is omitted if the count is 0.
    """
    good = [metrics for metrics in window if metrics["finite"]]
    means = {}
    for key, value in window[0].items():
        if key in ("finite", "learning_rate"):
            continue
        if isinstance(value, tuple):
            total, count = np.sum([metrics[key] for metrics in good], axis=0) if good else (0, 0)
            means |= {key: float(total / count)} if count else {}
        else:
            means[key] = float(np.mean([metrics[key] for metrics in good])) if good else float("nan")
    return means | {"learning_rate": float(window[-1]["learning_rate"])}


def validate(
    steps: Steps, params, batches: Iterable[EvalBatch], mesh: Mesh, flow_loss_weight: float
) -> dict[str, float]:
    """Compute the validation losses, each the mean over all its labels or channels in all frames.

    They depend only on the frames, not on how these are divided into batches and over devices. With several datasets,
    the losses of each dataset are included, where it has any labels or channels.

    Args:
        steps: compiled steps.
        params: parameters for inference.
        batches: validation batches on the host.
        mesh: device mesh.
        flow_loss_weight: weight of the flow loss in "val_loss".

    Returns:
        {metric name: value}.
    """
    sums = counts = LossTotals(0.0, 0.0, 0.0)
    for batch in batches:
        part = jax.device_get(steps.evaluate(params, put_batch(batch, mesh)))
        sums, counts = (
            LossTotals(*(a + (0.0 if b is None else np.asarray(b, np.float64)) for a, b in zip(*pair, strict=True)))
            for pair in zip((sums, counts), part, strict=True)
        )
    totals = zip(*(map(np.sum, x) for x in (sums, counts)), strict=True)
    cross_entropy, flow, accuracy = (float(total / count) if count else None for total, count in totals)
    scalars = {"val_loss": (cross_entropy or 0.0) + flow_loss_weight * (flow or 0.0)}
    measured = {"cross_entropy_loss": cross_entropy, "flow_loss": flow, "action_accuracy": accuracy}
    scalars |= {f"val_{name}": value for name, value in measured.items() if value is not None}
    for i, name in enumerate(steps.datasets):
        for key in ("cross_entropy", "flow"):
            if np.ndim(counts_of := getattr(counts, key)) and counts_of[i]:
                scalars[f"val_{key}_loss/{name}"] = float(getattr(sums, key)[i] / counts_of[i])
    return scalars


def save_bad_batch(batch: Batch, save_path: Path, step: int) -> Path:
    """Write a batch's arrays to save_path/nonfinite_step_N.npz and return the path."""
    arrays = {f"image_{i}": image for i, image in enumerate(batch.images)}
    arrays |= {name: getattr(batch, name) for name in describe(batch) if name != "images"}
    path = save_path / f"nonfinite_step_{step}.npz"
    with atomic_file(path) as file:
        np.savez(file, **arrays)
    return path
