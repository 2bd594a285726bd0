"""Initialize a run's model from a PyTorch directory, from the weights of a checkpoint, or by resuming a checkpoint.

`find` reads only headers and small files, so that everything else about a run can be checked before loading weights.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from wallx_jax.checkpoints.checkpointer import compare_params, compare_state, restore_params
from wallx_jax.checkpoints.layout import (
    CheckpointError,
    first_readable,
    latest_step,
    metadata_of,
    model_config_of,
    read_model_config,
)
from wallx_jax.checkpoints.source import ModelSource, SourceKind, open_source
from wallx_jax.checkpoints.stream import ModelReader, ParamsReader
from wallx_jax.config.schema import RunConfig
from wallx_jax.data import processor as processors
from wallx_jax.data.build import DatasetRun, build_processor, load_fast_tokenizer, load_stats
from wallx_jax.data.datasets import DatasetSpec, unify_prompt_length
from wallx_jax.data.fast import FastTokenizer
from wallx_jax.data.processor import Processor
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.models import lora, scan
from wallx_jax.models.config import ActionConfig, LoraConfig, WallXConfig
from wallx_jax.models.params import abstract_params
from wallx_jax.training import resume
from wallx_jax.training.optimizer import ACTION_EXPERT, Optimizer
from wallx_jax.training.sharding import param_spec, shardings
from wallx_jax.training.state import TrainState, create_state
from wallx_jax.utils import tree
from wallx_jax.utils.errors import ConfigError
from wallx_jax.weights.load import Put, assemble, open_weights

logger = logging.getLogger(__name__)

UPSTREAM_CHANNELS = 20  # action and state width of a new action side, as upstream; larger robots widen it


@dataclass(frozen=True)
class InitSource:
    """A model whose weights have not been read yet.

    Attributes:
        config: model config after the run's changes (vocabulary, channels, adapters, numerics).
        tokenizer: tokenizer of the model, including Wall-X's tokens.
        files: model directory or assets of a checkpoint: tokenizer and image-processor files.
        checkpoint: step directory of the checkpoint; None for a PyTorch model.
        processor: processor of a checkpoint that is fully resumed; None to build one for the dataset.
    """

    config: WallXConfig
    tokenizer: Tokenizer
    files: Path
    checkpoint: Path | None = None
    processor: Processor | None = None

    @property
    def resumes(self) -> bool:
        return self.processor is not None


def resumable(run: RunConfig) -> RunConfig:
    """Return the run config without resume.ckpt=latest if nothing has been saved yet.

    A job that restarts itself always passes latest; the first time, that means a new run.
    """
    loop = run.loop
    if loop.resume_ckpt != "latest" or loop.load_ckpt_only or latest_step(loop.save_path) is not None:
        return run
    logger.warning("resume.ckpt=latest: no checkpoint in %s yet; a new run starts", loop.save_path)
    return dataclasses.replace(run, loop=dataclasses.replace(loop, resume_ckpt=None))


def find(run: RunConfig, robot_state_dim: int, robot_action_dim: int, fast: FastTokenizer | None) -> InitSource:
    """Find the model and determine its final shapes without reading weights.

    Args:
        run: run config.
        robot_state_dim: state dims of the robot; the model's state width is at least this.
        robot_action_dim: action dims of the robot; the model's action width is at least this.
        fast: FAST action tokenizer whose tokens are added to the vocabulary; None if it is not used.

    Raises:
        FileNotFoundError, WeightsError, CheckpointError: the model was not found or is invalid; the message names it.
    """
    if run.loop.resume_ckpt is None:
        source = open_source(run.model.path, run.model.revision)
        if not source.is_checkpoint:
            config = source.read_config(dict(run.model.numerics))
            tokenizer = _with_tokens(Tokenizer.from_dir(source.assets), fast)
            config = _final_config(run, config, tokenizer, robot_state_dim, robot_action_dim)
            return InitSource(config, tokenizer, source.assets)
    else:
        step = first_readable(run.loop.resume_ckpt, run.loop.save_path, _with_small_files)
        source = ModelSource(SourceKind.CHECKPOINT, step)

    checkpoint, assets = source.folder, source.assets
    config = source.read_config()
    if run.loop.resume_ckpt is None or run.loop.load_ckpt_only:
        config = dataclasses.replace(config, numerics=run.model.apply_numerics(config.numerics))
        tokenizer = _with_tokens(Tokenizer.from_dir(assets), fast)
        config = _final_config(run, config, tokenizer, robot_state_dim, robot_action_dim)
        return InitSource(config, tokenizer, assets, checkpoint)
    if not source.has_processor:
        raise CheckpointError(
            f"{checkpoint} is a converted model, no run that could be resumed: start from it with "
            f"pretrained_wallx_path={checkpoint}"
        )
    processor = Processor.from_dir(assets)
    free = {name: value for name, value in run.model.numerics if name in resume.FREE_NUMERICS}
    config = config.replace(numerics=free)
    return InitSource(config, processor.tokenizer, assets, checkpoint, processor)


def _with_small_files(checkpoint: Path) -> Path:
    """Return `checkpoint` after reading its metadata and assets, which raises an exception if they are damaged."""
    model_config_of(checkpoint)
    source = ModelSource(SourceKind.CHECKPOINT, checkpoint)
    Tokenizer.from_dir(source.assets)
    if source.has_processor:
        Processor.from_dir(source.assets)
    return checkpoint


def _with_tokens(tokenizer: Tokenizer, fast: FastTokenizer | None) -> Tokenizer:
    return tokenizer.with_wallx_tokens(fast.vocab_size if fast is not None else None)


def _final_config(
    run: RunConfig,
    config: WallXConfig,
    tokenizer: Tokenizer,
    state_dim: int,
    action_dim: int,
) -> WallXConfig:
    """Return the config updated for the tokenizer, the robot and adapters.

    As upstream does, a Qwen2.5-VL vocabulary is truncated or extended to the tokenizer's length, while a Wall-X model
    keeps rows beyond it.
    """
    rows = config.text.vocab_size
    fresh = not config.has_action_head
    rows = len(tokenizer) if fresh else max(rows, len(tokenizer))
    config = dataclasses.replace(config, lora=run.optim.lora)
    if fresh:
        config = dataclasses.replace(
            config,
            action=ActionConfig(
                intermediate_size=run.model.action_expert_intermediate_size,
                state_dim=UPSTREAM_CHANNELS,
                action_dim=UPSTREAM_CHANNELS,
            ),
        )
    _check_adapters(config, fresh)
    return config.replace(
        text={"vocab_size": rows},
        action={
            "state_dim": max(config.action.state_dim, state_dim),
            "action_dim": max(config.action.action_dim, action_dim),
        },
        tokens=dataclasses.asdict(tokenizer.token_ids()),
    )


def _check_adapters(config: WallXConfig, fresh: bool) -> None:
    adapters, flat = config.lora, tree.flatten(abstract_params(dataclasses.replace(config, lora=LoraConfig())))
    layers = [path.removesuffix("/kernel") for path in flat if path.endswith("/kernel")]
    if adapters.rank and not any(map(adapters.adapts, layers)):
        raise ConfigError(f"lora.targets = {adapters.targets} match no linear layer; there are {', '.join(layers)}")
    if fresh and adapters.adapts(f"{ACTION_EXPERT}gate"):
        raise ConfigError(
            f"lora.targets = {adapters.targets} adapt the action expert, which is new in a model that starts from "
            "Qwen2.5-VL and has to be trained itself: use ('decoder/layers/attn/', 'decoder/layers/mlp/vlm/')"
        )


def plan_datasets(specs: Sequence[DatasetSpec]) -> tuple[InitSource, tuple[Processor, ...]]:
    """Determine the model's final shapes and each dataset's preprocessing.

    A resumed run takes both from its checkpoint.

    Args:
        specs: the datasets of the run.

    Returns:
        The model source, and one processor per dataset.

    Raises:
        ConfigError: the configuration does not match the checkpoint that is resumed.
        FileNotFoundError, WeightsError, CheckpointError: see `find`.
    """
    settings = specs[0].settings
    fast = load_fast_tokenizer(settings)
    state_dim = max(spec.info.dims(spec.settings.data.state_key) for spec in specs)
    action_dim = max(spec.info.dims(spec.settings.data.action_key) for spec in specs)
    origin = find(settings, state_dim, action_dim, fast)
    if origin.checkpoint is not None and origin.resumes:
        names, stored = [spec.name for spec in specs], processors.robots(origin.files)
        if sorted(names if len(specs) > 1 else []) != stored:
            raise ConfigError(
                f"the datasets are {names}, but the run of resume.ckpt has {stored or 'a single one'}: use those, or "
                "start a new run from its weights with resume.load_ckpt_only=True"
            )
        kept = tuple(Processor.from_dir(origin.files, name if stored else None) for name in names)
        resume.check(specs, kept, origin.config, origin.checkpoint, fast)
        return origin, kept
    action, built = origin.config.action, []
    for spec in specs:
        stats = load_stats(spec.settings, spec.source)
        channels = (action.state_dim, action.action_dim)
        built.append(build_processor(spec.settings, spec.source, origin.tokenizer, fast, stats, *channels))
    return origin, unify_prompt_length(specs, built)


def check_weights(origin: InitSource, state: TrainState) -> None:
    """Check from headers only that the source's files contain what loading will need.

    Args:
        origin: model source.
        state: shapes and dtypes of this run's training state.

    Raises:
        CheckpointError, WeightsError: a tensor is missing, unexpected or has the wrong shape.
    """
    if origin.checkpoint is None:
        open_weights(origin.files)
    elif origin.resumes:
        compare_state(origin.checkpoint, state)
    else:
        compare_params(origin.checkpoint, abstract_params(read_model_config(origin.checkpoint)))


def data_order(datasets: Sequence[DatasetRun], global_batch: int, seed: int) -> dict[str, Any]:
    """Return the settings that determine the order of samples, as recorded in checkpoints.

    Args:
        datasets: the datasets of the run.
        global_batch: samples per update.
        seed: seed of the data order.
    """
    return {
        "global_batch": global_batch,
        "seed": seed,
        "frames": [len(dataset.train) for dataset in datasets],
        "episodes": [dataset.settings.data.episodes for dataset in datasets],
        "weights": [dataset.weight for dataset in datasets],
    }


def check_same_order(origin: InitSource, order: Mapping[str, Any]) -> None:
    """Compare the data order of a resumed run with that of its checkpoint.

    Warn if the seed, frames, episodes or dataset weights have changed.

    Args:
        origin: model source; nothing is compared unless it is a resumed checkpoint that records a data order.
        order: data order of this run, see `data_order`.

    Raises:
        ConfigError: the global batch size differs: the position in the data is counted in batches of that size.
    """
    stored = metadata_of(origin.checkpoint).get("data_order") if origin.checkpoint and origin.resumes else None
    if stored is None:
        return
    then = {name: stored.get(name) for name in order}
    if then["global_batch"] != order["global_batch"]:
        raise ConfigError(
            f"an update has {order['global_batch']} samples (batch_size_per_gpu x data and fsdp devices x "
            f"gradient_accumulation_steps), but the run of resume.ckpt has {then['global_batch']}: change one of "
            f"them so that it is the same, {resume.NEW_RUN}"
        )
    if changed := [f"{name} was {then[name]}, is {order[name]}" for name in order if then[name] != order[name]]:
        logger.warning("the run continues with other samples than without the interruption: %s", "; ".join(changed))


def load_state(origin: InitSource, optimizer: Optimizer, mesh: Mesh, seed: int) -> TrainState:
    """Create a new training state from the source's weights, placing each parameter on the mesh as it is read.

    The model computes the same function as the source: stored adapters are rescaled to keep their output or, if this
    run has different ones or none, merged into the layers that they adapt.

    Args:
        origin: model source.
        optimizer: the run's optimizer.
        mesh: mesh of the run.
        seed: seed for newly initialized parameters.
    """
    wanted = abstract_state(origin.config, optimizer, mesh).params
    before = origin.config.lora  # config of the loaded adapters
    if origin.checkpoint is not None and _same_shapes(ParamsReader(origin.checkpoint).specs, tree.flatten(wanted)):
        params = restore_params(origin.checkpoint, wanted)
        before = read_model_config(origin.checkpoint).lora
    else:
        params = load_origin(
            origin, seed, put=lambda path, x: _put(x, NamedSharding(mesh, param_spec(path, x.shape, mesh)))
        )

    def create(params: tree.Tree) -> TrainState:
        return create_state(lora.rescale(params, before, origin.config.lora), optimizer)

    out = shardings(jax.eval_shape(create, params), mesh)
    return jax.jit(create, out_shardings=out, donate_argnums=0)(params)


def _put(x: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    # Every process has read the same file; device_put would make them compare it over the network.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def load_origin(origin: InitSource, seed: int, put: Put | None = None) -> tree.Tree:
    """Load the source's parameters in their final shapes.

    Args:
        origin: model source.
        seed: seed for newly initialized parameters.
        put: places each parameter, see `load_params`.
    """
    numerics = dataclasses.asdict(origin.config.numerics)
    read: Callable[[str], np.ndarray]
    if origin.checkpoint is None:
        weights = open_weights(origin.files, numerics)
        config, read = weights.config, weights.read
    else:
        stored = ModelReader(origin.checkpoint)
        config = stored.config.replace(numerics=numerics)
        specs = tree.flatten(abstract_params(config))
        read = lambda path: stored.read(path, specs[path].dtype)  # noqa: E731
    return assemble(
        config,
        read,
        action=origin.config.action,
        vocab_size=origin.config.text.vocab_size,
        action_dim=origin.config.action.action_dim,
        state_dim=origin.config.action.state_dim,
        lora=origin.config.lora,
        seed=seed,
        put=put,
    )[1]


def _same_shapes(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return {path: tuple(spec.shape) for path, spec in a.items()} == {path: tuple(x.shape) for path, x in b.items()}


def restack_like(state: TrainState, like: TrainState) -> TrainState:
    """Return the state with its layers stacked or unrolled, and sharded, like those of `like`.

    A state whose layers are already arranged like that is returned as is. Otherwise both copies are briefly in memory.
    """
    if jax.tree.structure(state) == jax.tree.structure(like):  # type: ignore[operator]  # jaxlib types no __eq__
        return state
    out = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(lambda state: scan.restack_like(state, like), out_shardings=out)(state)


def abstract_state(config: WallXConfig, optimizer: Optimizer, mesh: Mesh, scan_layers: bool = True) -> TrainState:
    """Return the shapes, dtypes and shardings of the training state, with stacked layers (as stored) or unrolled ones.

    Args:
        config: model config.
        optimizer: the run's optimizer.
        mesh: mesh of the run.
        scan_layers: stacked layers if True, unrolled layers if False.

    Returns:
        A TrainState with jax.ShapeDtypeStruct leaves.
    """
    params = abstract_params(config)
    if not scan_layers:
        params = jax.eval_shape(scan.unstack_layers, params)
    abstract = jax.eval_shape(lambda p: create_state(p, optimizer), params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings(abstract, mesh)
    )
