"""Fine-tune Wall-X on a LeRobot dataset.

    python -m wallx_jax.train --config=configs/aloha.py [--config.key=value ...] [--workdir=DIR] [--dry_run]

From Python: `wallx_jax.train.run(config)` with a ConfigDict from `wallx_jax.config.default_config`.

Exit codes:
    0: training finished.
    1, 2: error, reported in one line.
    65 (EX_DATAERR): a sample could not be read during training; a checkpoint was saved.
    75 (EX_TEMPFAIL): interrupted by SIGTERM or SIGINT; a checkpoint was saved, continue with
        --config.resume.ckpt=latest.
    128 + signal number: ended immediately by a second signal, without saving.
"""

# ruff: noqa: E402
from wallx_jax.utils import signals
from wallx_jax.utils.errors import ConfigError

if __name__ == "__main__":  # the imports below take seconds; Ctrl-C must not print a traceback during them
    signals.Watch(signals.end_at_once).__enter__()

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from wallx_jax.utils import compile_cache, devices, extras

extras.require("train", __name__, __doc__)

from wallx_jax.checkpoints.checkpointer import Checkpointer, restore_state
from wallx_jax.checkpoints.layout import FOLDER, CheckpointError, find_checkpoints, latest_step, refuse_overwrite
from wallx_jax.config import flatten, resolve
from wallx_jax.config.command_line import launch, render
from wallx_jax.config.schema import RunConfig
from wallx_jax.data.batch import Batch, EvalBatch, describe
from wallx_jax.data.build import (
    DatasetRun,
    blank_sample,
    cache_frames,
    split_datasets,
    training_stream,
    validation_batches,
)
from wallx_jax.data.datasets import DatasetSpec, open_datasets
from wallx_jax.data.pipeline import DataLoader
from wallx_jax.data.processor import Processor
from wallx_jax.data.unreadable import SkippedFrames
from wallx_jax.data.workers import check_shared_memory
from wallx_jax.dataset_check import preflight
from wallx_jax.training import distributed, init, resume, run_lock, sharding, shutdown
from wallx_jax.training.flops import update_flops
from wallx_jax.training.interruption import EXIT_CODE, Interrupted, StopRequest
from wallx_jax.training.loop import (
    RunData,
    RunOutputs,
    StepCounts,
    Steps,
    UnreadableData,
    abstract_batch,
    run_loop,
)
from wallx_jax.training.metrics import MetricWriter
from wallx_jax.training.optimizer import Optimizer, check_patterns, make_optimizer
from wallx_jax.training.plan import Plan, make_plan
from wallx_jax.training.progress import Progress
from wallx_jax.training.state import TrainState, with_gradient_buffer
from wallx_jax.training.step import EVAL_SEED, Objective, compile_train_step, make_eval_step, make_train_step
from wallx_jax.utils.errors import REPORTED, user_message
from wallx_jax.utils.files import write_text

logger = logging.getLogger(__name__)

# Files of a model directory that consumers of a checkpoint expect next to the tokenizer.
EXTRA_ASSETS = ("preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json",
                "chat_template.json", "chat_template.jinja")  # fmt: skip
OUT_OF_MEMORY = "lower batch_size_per_gpu, or set numerics.remat=full, or use more devices (mesh.fsdp)"


def run(config: ConfigDict, dry_run: bool = False) -> Path | None:
    """Train as configured.

    Configuration, devices, dataset, prompt, model directory and resume settings are all checked before any weights are
    loaded.

    Args:
        config: settings, see `wallx_jax.config.default_config`.
        dry_run: stop after the checks and print the plan; nothing is written.

    Returns:
        Directory of the last checkpoint; None for a dry run.

    Raises:
        ConfigError, DeviceError, CheckpointError, WeightsError, FileNotFoundError, ValueError: a check failed; the
            message gives the remedy.
        NonFiniteError: training diverged.
        UnreadableData: a sample could not be read during training; a checkpoint has been saved.
        Interrupted: SIGTERM or SIGINT arrived during training; a checkpoint has been saved.
    """
    settings = init.resumable(resolve(config))
    preflight.check_folders(settings)
    mesh = connect_devices(settings)
    specs = open_datasets(settings, videos="first" if dry_run else "all")
    newest = latest_step(settings.loop.save_path)
    source, processors = init.plan_datasets(specs)
    setup = plan_run(config, specs, processors, source, mesh, newest)
    if dry_run:
        init.check_weights(source, setup.stored)
        print("\n".join([str(setup.plan), *setup.findings]))
        return None
    log_plan(setup)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_folder(setup))
        data = stack.enter_context(open_data(setup))
        distributed.meet()
        state = initial_state(setup, data.batches)
        outputs = stack.enter_context(open_outputs(setup, int(state.step), data.batches))
        steps = compile_steps(setup, state, outputs.progress)
        distributed.meet()  # compile times differ between processes
        stop = stack.enter_context(StopRequest(mesh, functools.partial(abandon, setup.save_path)))
        state = run_loop(state, steps, data, outputs, settings.loop, setup.length, stop.reached)
    return finish(setup, state, stop)


@dataclass(frozen=True)
class Setup:
    """A run that has been checked, before anything is written or weights are read.

    Attributes:
        config: the configuration, as given.
        settings: the validated settings, completed from the first dataset.
        mesh: devices of the run.
        datasets: the datasets, their frames not cached yet.
        source: where the initial weights come from.
        optimizer: the run's optimizer.
        stored: shapes, dtypes and shardings of the training state in checkpoints.
        sample: one training sample without batch axis, all zeros.
        length: length of the run.
        data_order: settings that determine the order of samples, see `init.data_order`.
        save_path: run directory, absolute.
        newest: newest step in save_path, read before the model was found; None if there is no checkpoint.
        continues: whether the run continues in the directory of the run that it resumes.
        plan: summary of the run.
        findings: descriptions of what deserves attention but does not stop the run.
    """

    config: ConfigDict
    settings: RunConfig
    mesh: Mesh
    datasets: tuple[DatasetRun, ...]
    source: init.InitSource
    optimizer: Optimizer
    stored: TrainState
    sample: Batch
    length: StepCounts
    data_order: dict[str, Any]
    save_path: Path
    newest: int | None
    continues: bool
    plan: Plan
    findings: tuple[str, ...]

    @property
    def assets(self) -> Path:
        """Directory with the files that go into every checkpoint."""
        return self.save_path / "assets"

    @property
    def eval_batch(self) -> int:
        """Samples per validation batch, over all processes."""
        return self.settings.data.eval_batch_size * sharding.batch_copies(self.mesh)


def connect_devices(settings: RunConfig) -> Mesh:
    """Connect the processes of the run, check that the requested devices exist, and arrange them in a mesh."""
    distributed.initialize(settings.distributed)
    devices.require(settings.platform)
    return sharding.make_mesh(settings.mesh)


def plan_run(
    config: ConfigDict,
    specs: Sequence[DatasetSpec],
    processors: Sequence[Processor],
    source: init.InitSource,
    mesh: Mesh,
    newest: int | None,
) -> Setup:
    """Check everything that can be checked before weights are read, and plan the run.

    Args:
        config: the configuration, as given.
        specs: the datasets.
        processors: the preprocessing of each dataset.
        source: where the initial weights come from.
        mesh: devices of the run.
        newest: newest step in save_path before the model was found.

    Raises:
        ConfigError, CheckpointError, DatasetError, ValueError, OSError: a check failed; the message gives the remedy.
    """
    settings = specs[0].settings
    loop, save_path = settings.loop, Path(settings.loop.save_path).expanduser().absolute()
    continues = False
    if source.checkpoint is not None and source.resumes:
        continues = source.checkpoint.parent == save_path / FOLDER
        resume.log_changes(config, source.checkpoint)
    if not continues:
        refuse_overwrite(save_path)
    findings = preflight.check(specs)
    datasets = split_datasets(specs, processors)
    length = count_steps(settings, datasets, mesh)
    order = init.data_order(datasets, length.global_batch, loop.seed)
    init.check_same_order(source, order)
    findings += preflight.check_length(settings, length.epoch, length.global_batch, length.total_steps)
    sample = blank_sample(processors[0].config, mixed=len(datasets) > 1)
    _, shard_count = sharding.data_shard(mesh)
    batch_bytes = length.global_batch // shard_count * sum(x.nbytes for x in jax.tree.leaves(sample))
    check_shared_memory(settings.data.num_workers, batch_bytes)
    optimizer = make_optimizer(settings.optim, length.decay_steps)
    stored = init.abstract_state(source.config, optimizer, mesh)
    check_patterns(optimizer, stored.params)
    return Setup(
        config=config,
        settings=settings,
        mesh=mesh,
        datasets=datasets,
        source=source,
        optimizer=optimizer,
        stored=stored,
        sample=sample,
        length=length,
        data_order=order,
        save_path=save_path,
        newest=newest,
        continues=continues,
        plan=make_plan(datasets, source, optimizer, stored, mesh, length),
        findings=tuple(f"{name}: {finding}" for name, finding in findings),
    )


def count_steps(settings: RunConfig, datasets: Sequence[DatasetRun], mesh: Mesh) -> StepCounts:
    """Return the length of a run."""
    loop, epoch = settings.loop, sum(len(dataset.train) for dataset in datasets)
    global_batch = settings.data.batch_size * sharding.batch_copies(mesh) * loop.gradient_accumulation_steps
    return StepCounts(global_batch, epoch, loop.total_steps(epoch, global_batch), loop.decay_steps(epoch, global_batch))


def log_plan(setup: Setup) -> None:
    """Log the plan of a run, what deserves attention, and what the model is fed."""
    logger.info("%s", setup.plan)
    for finding in setup.findings:
        logger.warning("%s", finding)
    logger.info("%s", setup.source.config.numerics)
    logger.info("one sample: %s", describe(setup.sample))


@contextlib.contextmanager
def run_folder(setup: Setup) -> Iterator[None]:
    """Lock the run directory and write the files that describe the run.

    Raises:
        CheckpointError: another run is training in the directory, or has saved a checkpoint since the run was planned.
    """
    compile_cache.enable(setup.settings.compile_cache)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            setup.save_path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_lock.hold(setup.save_path))
            if latest_step(setup.save_path) != setup.newest:
                raise CheckpointError(
                    f"another run has just saved a checkpoint in {setup.save_path}: start this one again"
                )
            write_text(setup.save_path / "config.yaml", render(setup.config))
            write_assets(setup.datasets, setup.source.files, setup.assets)
        yield


def write_assets(datasets: Sequence[DatasetRun], model_files: Path, folder: Path) -> None:
    """Write the files that go into every checkpoint: processors, and EXTRA_ASSETS of the model directory."""
    datasets[0].processor.save(folder)
    if len(datasets) > 1:
        for dataset in datasets:
            dataset.processor.save_as(folder, dataset.name)
    for name in EXTRA_ASSETS:
        if (model_files / name).is_file():
            shutil.copyfile(model_files / name, folder / name)


@contextlib.contextmanager
def open_data(setup: Setup) -> Iterator[RunData]:
    """Fill the frame caches, if configured, and open the streams of batches of this process."""
    datasets = [cache_frames(dataset) for dataset in setup.datasets]
    loop, shard = setup.settings.loop, sharding.data_shard(setup.mesh)
    eval_frames = min(loop.eval_frames, (loop.eval_batches or loop.eval_frames) * setup.eval_batch)
    stream = training_stream(datasets, loop.seed)
    own_batch = setup.length.global_batch // shard[1]
    with contextlib.closing(DataLoader(stream, own_batch, setup.settings.data.num_workers, *shard)) as batches:
        yield RunData(
            batches,
            lambda: validation_batches(datasets, setup.eval_batch, eval_frames, *shard),
            SkippedFrames([dataset.source for dataset in datasets]),
        )


def initial_state(setup: Setup, batches: DataLoader) -> TrainState:
    """Restore the state and the position of `batches` from a checkpoint, or create a new state from a model."""
    settings, source, optimizer, mesh = setup.settings, setup.source, setup.optimizer, setup.mesh
    if source.resumes and settings.loop.resume_ckpt is not None:
        state, _ = restore_state(settings.loop.resume_ckpt, setup.stored, batches, setup.save_path)
    else:
        state = init.load_state(source, optimizer, mesh, settings.loop.seed)
    if not settings.loop.scan_layers:
        state = init.restack_like(state, init.abstract_state(source.config, optimizer, mesh, scan_layers=False))
    if mesh.local_devices[0].platform == "cpu":
        state = with_gradient_buffer(state, optimizer, settings.loop.gradient_accumulation_steps)
    if int(state.step) >= setup.length.total_steps:
        logger.warning(
            "nothing is left to train: the checkpoint has done %d updates, and num_training_steps or num_epoch ask for "
            "%d",
            int(state.step),
            setup.length.total_steps,
        )
    return state


@contextlib.contextmanager
def open_outputs(setup: Setup, first_step: int, batches: DataLoader) -> Iterator[RunOutputs]:
    """Open the progress display, the metrics and the checkpoints of a run that starts after `first_step` updates."""
    loop, save_path = setup.settings.loop, setup.save_path
    config, resumed_step = flatten(setup.config), first_step if setup.continues else None
    with (
        contextlib.closing(Progress(setup.length.total_steps, first_step)) as progress,
        contextlib.closing(
            MetricWriter(
                save_path,
                resumed_step=resumed_step,
                use_wandb=loop.use_wandb,
                project=loop.log_project,
                name=loop.log_name,
                config=config,
            )
        ) as writer,
        Checkpointer(save_path, loop.max_to_keep, resumed_step) as checkpointer,
    ):

        def save(step: int, state: TrainState, loss: float | None) -> None:
            stored = init.restack_like(dataclasses.replace(state, gradients=None), setup.stored)
            model, order = setup.source.config, setup.data_order
            checkpointer.save(step, stored, batches, config, model, setup.assets, loss=loss, data_order=order)

        yield RunOutputs(progress, writer, save, checkpointer.wait)


def make_objective(setup: Setup) -> Objective:
    """Return what to train and measure: flow matching, or FAST tokens as text with their accuracy."""
    loop, tokenizer = setup.settings.loop, setup.datasets[0].processor.tokenizer
    use_flow = not setup.settings.model.use_fast_tokenizer
    ids = None
    if not use_flow:
        if tokenizer.fast_start is None:
            raise ConfigError(
                "use_fast_tokenizer=True, but the vocabulary has no FAST tokens; set action_tokenizer_path"
            )
        ids = (tokenizer.fast_start, tokenizer.fast_start + tokenizer.fast_size)
    names = tuple(dataset.name for dataset in setup.datasets) if len(setup.datasets) > 1 else ()
    return Objective(use_flow, loop.flow_loss_weight, loop.mask_padded_actions, ids, names)


def compile_steps(setup: Setup, state: TrainState, progress: Progress) -> Steps:
    """Compile the train step and, if there is held-out data, the evaluation step for this run's shapes.

    Args:
        setup: the run.
        state: initial training state.
        progress: displays what is being compiled.
    """
    loop, model, mesh, objective = setup.settings.loop, setup.source.config, setup.mesh, make_objective(setup)
    train_step = make_train_step(model, setup.optimizer, objective, loop.seed)
    batch = abstract_batch(setup.sample, setup.length.global_batch, mesh, loop.gradient_accumulation_steps)
    with progress.compiling("the train step"):
        train = compile_train_step(train_step, state, batch)
    evaluate = None
    if loop.eval_interval and any(len(dataset.held_out) for dataset in setup.datasets):
        with progress.compiling("the evaluation step"):
            eval_step = jax.jit(make_eval_step(model, objective, EVAL_SEED))
            held_out = EvalBatch(setup.sample, frame=np.uint32(0), counted=np.bool_(True))
            evaluate = eval_step.lower(state.params, abstract_batch(held_out, setup.eval_batch, mesh)).compile()
    flops = update_flops(model, setup.sample, setup.optimizer.is_trainable, objective.use_flow)
    return Steps(train, evaluate, mesh, flops, objective.datasets)


def abandon(save_path: Path, number: Signals) -> NoReturn:
    """End all processes of a run at once, on a second signal."""
    saved = latest_step(save_path)
    lost = "all that was trained is lost" if saved is None else f"what was trained after step {saved} is lost"
    shutdown.leave(f"ended by a second signal ({number.name}): {lost}", 128 + number)


def finish(setup: Setup, state: TrainState, stop: StopRequest) -> Path:
    """Return the run's last checkpoint.

    Raises:
        Interrupted: a signal has stopped the run before its end.
    """
    last, step, total_steps = find_checkpoints(setup.save_path)[0], int(state.step), setup.length.total_steps
    if stop.stopped and step < total_steps:
        raise Interrupted(
            f"interrupted after step {step} of {total_steps}; saved {last}; continue with resume.ckpt=latest"
        )
    return last


def main(config: ConfigDict, dry_run: bool = False) -> None:
    """Run training as a command: print the configuration, report errors in one line, set the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)  # not absl's
    for library in ("absl", "jax"):
        logging.getLogger(library).setLevel(logging.WARNING)
    with signals.Watch(lambda number: shutdown.leave(f"interrupted by {number.name}", EXIT_CODE)):
        try:
            settings = resolve(config)
            distributed.initialize(settings.distributed)
            with shutdown.together():
                devices.require(settings.platform)  # before anything else initializes JAX's devices
                if jax.process_index() == 0:
                    print(render(config))
                else:
                    logging.getLogger().setLevel(logging.WARNING)
                last = run(config, dry_run)
        except Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            sys.exit(EXIT_CODE)
        except UnreadableData as error:
            shutdown.fail(f"error: {user_message(error, OUT_OF_MEMORY)}", os.EX_DATAERR)
        except REPORTED as error:
            shutdown.fail(f"error: {user_message(error, OUT_OF_MEMORY)}", 1)
    print("dry run: nothing was loaded or written" if dry_run else f"trained; last checkpoint: {last}")


if __name__ == "__main__":
    flags.DEFINE_bool("dry_run", False, "Check everything and print the plan, without loading weights or training.")
    launch(lambda config: main(config, flags.FLAGS.dry_run))
