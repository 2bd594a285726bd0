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

if __name__ == "__main__":  # the imports below take seconds; Ctrl-C must not print a traceback during them
    signals.Watch(signals.end_at_once).__enter__()

import contextlib
import dataclasses
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from signal import Signals

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
from wallx_jax.data.build import blank_sample, build_augment, split_sources
from wallx_jax.data.datasets import Part, open_parts
from wallx_jax.data.pipeline import DataLoader, eval_batches, mixed, samples
from wallx_jax.data.processor import Processor
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.data.unreadable import SkippedFrames
from wallx_jax.data.workers import check_shared_memory
from wallx_jax.dataset_check import preflight
from wallx_jax.models.config import WallXConfig
from wallx_jax.training import distributed, init, resume, run_lock, sharding, shutdown
from wallx_jax.training.flops import update_flops
from wallx_jax.training.interruption import EXIT_CODE, Interrupted, StopRequest
from wallx_jax.training.loop import Steps, UnreadableData, abstract_batch, run_loop
from wallx_jax.training.metrics import MetricWriter
from wallx_jax.training.optimizer import check_patterns, is_trainable
from wallx_jax.training.plan import StepCounts, make_plan
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
    with contextlib.ExitStack() as stack:
        return _run(config, dry_run, stack)


def _run(config: ConfigDict, dry_run: bool, stack: contextlib.ExitStack) -> Path | None:
    """Run `run`; resources to close at the end are registered on `stack`."""
    settings = init.resumable(resolve(config))
    preflight.check_folders(settings)
    distributed.initialize(settings.distributed)
    devices.require(settings.platform)
    if dry_run:
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, frame_cache=None))
    parts = open_parts(settings, videos="first" if dry_run else "all")
    settings = parts[0].settings
    mesh = sharding.make_mesh(settings.mesh)
    loop, save_path = settings.loop, Path(settings.loop.save_path).expanduser().absolute()

    newest = latest_step(save_path)
    origin, processors = init.plan_parts(parts)
    if origin.resumes:
        resume.tell_changes(config, origin.checkpoint)
    continues = origin.resumes and origin.checkpoint.parent == save_path / FOLDER
    if not continues:
        refuse_overwrite(save_path)
    noted = preflight.check(parts)
    sources = [split_sources(part.settings, part.source, p.config) for part, p in zip(parts, processors, strict=True)]
    micro_batch = settings.data.batch_size * mesh.shape["data"] * mesh.shape["fsdp"]
    global_batch = micro_batch * loop.gradient_accumulation_steps
    order = init.data_order(parts, [len(train) for train, _ in sources], global_batch, loop.seed)
    init.check_same_order(origin, order)
    share, shares = sharding.data_shard(mesh)
    epoch = sum(len(train) for train, _ in sources)
    total_steps, decay_steps = loop.total_steps(epoch, global_batch), loop.decay_steps(epoch, global_batch)
    noted += preflight.check_length(settings, epoch, global_batch, total_steps)
    numbers = range(len(parts)) if len(parts) > 1 else [None]
    streams = [
        samples(train, processor, loop.seed, build_augment(part.settings), number)
        for (train, _), processor, part, number in zip(sources, processors, parts, numbers, strict=True)
    ]
    stream = mixed(streams, [part.weight for part in parts])
    batches = DataLoader(stream, global_batch // shares, settings.data.num_workers, share, shares)
    stack.callback(batches.close)

    sample = blank_sample(processors[0].config, mixed=len(parts) > 1)
    batch_bytes = global_batch // shares * sum(x.nbytes for x in jax.tree.leaves(sample))
    check_shared_memory(settings.data.num_workers, batch_bytes)

    abstract = init.abstract_state(origin.config, settings.optim, decay_steps, mesh)
    check_patterns(settings.optim, abstract.params)
    frames = [(len(train), len(held)) for train, held in sources]
    length = StepCounts(global_batch, epoch, total_steps, decay_steps)
    plan = make_plan(parts, origin, processors[0].config, abstract, mesh, frames, length)
    if dry_run:
        init.check_weights(origin, abstract)
        print("\n".join(map(str, [plan, *(f"{name}: {finding}" for name, finding in noted)])))
        return None
    logger.info("%s", plan)
    for name, finding in noted:
        logger.warning("%s: %s", name, finding)

    compile_cache.enable(settings.compile_cache)
    assets = save_path / "assets"
    if jax.process_index() == 0:
        save_path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(run_lock.hold(save_path))
        if latest_step(save_path) != newest:
            raise CheckpointError(f"another run has just saved a checkpoint in {save_path}: start this one again")
        write_text(save_path / "config.yaml", render(config))
        write_assets(parts, processors, origin.files, assets)
    logger.info("%s", origin.config.numerics)
    logger.info("one sample: %s", describe(sample))

    distributed.meet()
    if origin.resumes:
        state, _ = restore_state(loop.resume_ckpt, abstract, batches, save_path)
        resumed_step = int(state.step) if continues else None
    else:
        state, resumed_step = init.load_state(origin, settings, decay_steps, mesh), None
    if not loop.scan_layers:
        apart = init.abstract_state(origin.config, settings.optim, decay_steps, mesh, scan_layers=False)
        state = init.restack_like(state, apart)
    if mesh.local_devices[0].platform == "cpu":
        state = with_gradient_buffer(state, settings.optim, loop.gradient_accumulation_steps)

    if int(state.step) >= total_steps:
        logger.warning(
            "nothing is left to train: the checkpoint has done %d updates, and num_training_steps or num_epoch ask for "
            "%d",
            int(state.step),
            total_steps,
        )
    progress = Progress(total_steps, int(state.step))
    stack.callback(progress.close)
    writer = MetricWriter(
        save_path,
        resumed_step=resumed_step,
        use_wandb=loop.use_wandb,
        project=loop.log_project,
        name=loop.log_name,
        config=flatten(config),
    )
    stack.callback(writer.close)
    eval_batch = settings.data.eval_batch_size * mesh.shape["data"] * mesh.shape["fsdp"]

    eval_frames = min(loop.eval_frames, (loop.eval_batches or loop.eval_frames) * eval_batch)

    def held_out() -> Iterator[EvalBatch]:
        for (_, val), processor, number in zip(sources, processors, numbers, strict=True):
            yield from eval_batches(val, processor, eval_batch, eval_frames, share, shares, number)

    checkpointer = Checkpointer(save_path, loop.max_to_keep, resumed_step)
    stack.callback(checkpointer.close)

    def save(step: int, state: TrainState, loss: float | None) -> None:
        stored = init.restack_like(dataclasses.replace(state, gradients=None), abstract)
        checkpointer.save(step, stored, batches, flatten(config), origin.config, assets, loss=loss, data_order=order)

    def give_up(number: Signals) -> None:
        saved = latest_step(save_path)
        lost = "all that was trained is lost" if saved is None else f"what was trained after step {saved} is lost"
        shutdown.leave(f"ended by a second signal ({number.name}): {lost}", 128 + number)

    evaluates = loop.eval_interval and any(len(val) for _, val in sources)
    sizes = (global_batch, eval_batch if evaluates else None)
    objective = make_objective(settings, processors[0].tokenizer, [part.name for part in parts])
    steps = compile_steps(settings, origin.config, decay_steps, state, sample, sizes, objective, mesh, progress)
    distributed.meet()  # compile times differ between processes
    stop = stack.enter_context(StopRequest(mesh, give_up))
    state = run_loop(
        state, batches, steps, total_steps, global_batch, loop, mesh, held_out, writer, progress, save,
        stop.reached, SkippedFrames([part.source for part in parts]),
    )  # fmt: skip
    checkpointer.wait()
    last = find_checkpoints(save_path)[0]
    if stop.stopped and int(state.step) < total_steps:
        raise Interrupted(
            f"interrupted after step {int(state.step)} of {total_steps}; saved {last}; go on with resume.ckpt=latest"
        )
    return last


def write_assets(parts: Sequence[Part], processors: Sequence[Processor], model_files: Path, folder: Path) -> None:
    """Write the files that go into every checkpoint: processors, and EXTRA_ASSETS of the model directory."""
    processors[0].save(folder)
    if len(parts) > 1:
        for part, processor in zip(parts, processors, strict=True):
            processor.save_as(folder, part.name)
    for name in EXTRA_ASSETS:
        if (model_files / name).is_file():
            shutil.copyfile(model_files / name, folder / name)


def make_objective(settings: RunConfig, tokenizer: Tokenizer, datasets: Sequence[str]) -> Objective:
    """Return what to train and measure: flow matching, or FAST tokens as text with their accuracy."""
    loop = settings.loop
    speaks = settings.model.use_fast_tokenizer
    ids = (tokenizer.fast_start, tokenizer.fast_start + tokenizer.fast_size) if speaks else None
    names = tuple(datasets) if len(datasets) > 1 else ()
    return Objective(not speaks, loop.flow_loss_weight, loop.mask_padded_actions, ids, names)


def compile_steps(
    settings: RunConfig,
    model: WallXConfig,
    decay_steps: int,
    state: TrainState,
    sample: Batch,
    batch_sizes: tuple[int, int | None],
    objective: Objective,
    mesh: Mesh,
    progress: Progress,
) -> Steps:
    """Compile the train step and, if there is held-out data, the evaluation step for this run's shapes.

    Args:
        settings: the run's configuration.
        model: architecture and numerics.
        decay_steps: updates over which the learning rate decays.
        state: initial train state.
        sample: one training sample without batch axis, for shapes and dtypes.
        batch_sizes: (samples per update, samples per evaluation batch); None as the latter: no evaluation.
        objective: what to train and measure.
        mesh: devices of the run.
        progress: displays what is being compiled.
    """
    loop, (train_size, eval_size) = settings.loop, batch_sizes
    train_step = make_train_step(model, settings.optim, decay_steps, objective, loop.seed)
    batch = abstract_batch(sample, train_size, mesh, loop.gradient_accumulation_steps)
    with progress.compiling("the train step"):
        train = compile_train_step(train_step, state, batch)
    flops = update_flops(model, sample, is_trainable(settings.optim), objective.use_flow)
    if eval_size is None:
        return Steps(train, None, flops)
    with progress.compiling("the evaluation step"):
        eval_step = jax.jit(make_eval_step(model, objective, EVAL_SEED))
        held_out = EvalBatch(sample, frame=np.uint32(0), counted=np.bool_(True))
        evaluate = eval_step.lower(state.params, abstract_batch(held_out, eval_size, mesh)).compile()
    return Steps(train, evaluate, flops, objective.datasets)


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
