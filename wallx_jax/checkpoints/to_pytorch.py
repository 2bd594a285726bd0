"""Export a checkpoint as a PyTorch model directory, with one parameter in memory at a time."""

import dataclasses
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from wallx_jax.checkpoints.compare import compare
from wallx_jax.checkpoints.layout import COMMITTED, CheckpointError, assets_dir, find_checkpoints, read_metadata
from wallx_jax.checkpoints.source import has_processor
from wallx_jax.checkpoints.stream import ModelReader
from wallx_jax.config.prompt_template import PromptTemplate
from wallx_jax.data import processor as processors
from wallx_jax.data.images import IMAGE_LIMITS
from wallx_jax.models.config import FRAMES_PER_TOKEN, IMAGE_MEAN, IMAGE_STD, MERGE, PATCH, WallXConfig
from wallx_jax.models.params import abstract_params
from wallx_jax.utils import tree
from wallx_jax.utils.files import new_directory, read_json_object
from wallx_jax.weights import names
from wallx_jax.weights.export import tensor_specs, write_json, write_weights
from wallx_jax.weights.safetensors_io import DTYPES, NORMALIZERS, Tensors, WeightsError, read_header

Layout = Literal["wall_x", "qwen2_5_vl"]
ROBOT = ("processor.json", "norm_stats.json", "fast", "robots")  # not used by a VLM
# preprocessor_config.json of Qwen2.5-VL: PyTorch loaders require it, and a checkpoint trained from a directory without
# one lacks it.
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": IMAGE_LIMITS.smallest,
    "max_pixels": IMAGE_LIMITS.largest,
    "patch_size": PATCH,
    "temporal_patch_size": FRAMES_PER_TOKEN,
    "merge_size": MERGE,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}
RELATIVE_ACTIONS = (
    "{}: some actions of this model are differences from the state at the chunk's start (relative_to in "
    "processor.json). wallx_jax.load_policy adds the state; upstream's loader and lerobot's do not: add it yourself"
)


def export_model(
    checkpoint: str | Path,
    output: str | Path,
    *,
    layout: Layout = "wall_x",
    dtype: Literal["keep", "bfloat16", "float16", "float32"] = "keep",
    shard_bytes: int | None = None,
) -> Path:
    """Write a model directory for PyTorch loaders, and compare it with the checkpoint.

    Warn if some actions are relative to the state, which PyTorch loaders do not support, and record it in config.json.

    Args:
        checkpoint: wallx_jax checkpoint, or run (its newest checkpoint). Adapters are merged.
        output: folder to create; it appears once it is complete.
        layout: "wall_x": as read by upstream and lerobot; "qwen2_5_vl": only the VLM, as read by transformers.
        dtype: dtype of all tensors. "keep": as in the checkpoint; a converted model gets its original dtypes back.
        shard_bytes: file size in bytes above which a new file begins. None: a single file, which Wall-X's loaders
            require.

    Returns:
        `output`.

    Raises:
        CheckpointError: there is no complete checkpoint, or the written files differ from it.
        WeightsError: a parameter contains NaN or does not fit the dtype, or layout "wall_x" was requested for a model
            without an action side.
        FileExistsError: `output` exists.
        OSError: `output` cannot be written.
    """
    output = Path(output).expanduser().absolute()
    step = find_checkpoints(checkpoint)[0]
    model = ModelReader(step)
    config = model.config
    assets = assets_dir(step)
    source = read_metadata(step).get("source")
    whole = (layout == "wall_x") == config.has_action_head
    if layout == "wall_x" and not config.has_action_head:
        raise WeightsError(f"{step} is a Qwen2.5-VL without an action side: export it with layout qwen2_5_vl")
    config = config if whole else config.replace(action={"intermediate_size": None})

    wanted = tree.flatten(abstract_params(config))
    specs = tensor_specs(config, {path: model.specs[path] for path in wanted})
    extra = {}
    if source and whole and dtype == "keep":
        specs = _as_in_source(config, specs, source["tensors"])
    elif dtype != "keep":
        specs = {name: jax.ShapeDtypeStruct(spec.shape, np.dtype(dtype)) for name, spec in specs.items()}
    if whole and (assets / NORMALIZERS).is_file():
        normalizers = Tensors(read_header(assets / NORMALIZERS))
        extra = {name: np.array(normalizers[name]) for name in normalizers}

    size = sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in specs.values())
    with new_directory(output) as folder:
        left_out = (NORMALIZERS, "config.json", COMMITTED, *(() if whole else ROBOT))
        shutil.copytree(assets, folder, ignore=shutil.ignore_patterns(*left_out))
        with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc=f"to {output.name}") as progress:
            write_weights(folder, config, model.read, specs, extra, shard_bytes, progress.update)
        config_json = _config_json(config, assets, specs)
        if whole and processors.has_relative_actions(assets):
            config_json.setdefault("wallx_jax", {})["relative_actions"] = True
            warnings.warn(RELATIVE_ACTIONS.format(output), stacklevel=2)
        write_json(folder / "config.json", config_json)
        if not (folder / "preprocessor_config.json").is_file():
            write_json(folder / "preprocessor_config.json", PREPROCESSOR)
        found = compare(step, folder, specs.keys() - extra.keys() - _tied_head(config), round_a=dtype != "keep")
        if not found.same_values:
            raise CheckpointError(f"{output} would differ from {step}, so it was removed; check the disk:\n{found}")
    return output


def _as_in_source(config: WallXConfig, specs: Mapping[str, Any], stored: Mapping[str, str]) -> dict[str, Any]:
    """Return specs with each tensor's original dtype, plus the tied LM head if the source had stored one."""
    shapes = {name: spec.shape for name, spec in specs.items()}
    if names.HEAD in stored and config.text.tie_word_embeddings:
        shapes[names.HEAD] = shapes[names.EMBEDDING]
    return {name: jax.ShapeDtypeStruct(shape, np.dtype(DTYPES[stored[name]])) for name, shape in shapes.items()}


def _tied_head(config: WallXConfig) -> set[str]:
    return {names.HEAD} if config.text.tie_word_embeddings else set()


def _config_json(config: WallXConfig, assets: Path, specs: Mapping[str, Any]) -> dict[str, Any]:
    """Return upstream's config.json for these tensors.

    If the assets contain the config.json of a converted model and it describes the same model, its fields are kept,
    including those unknown to wallx_jax.
    """
    widest = "bfloat16" if specs[names.EMBEDDING].dtype == DTYPES["BF16"] else "float32"
    ours = config.replace(numerics={"param_dtype": widest}).to_hf()
    ours["torch_dtype"] = specs[names.EMBEDDING].dtype.name
    if config.has_action_head and has_processor(assets):
        prompt = processors.read_config(assets).prompt
        if prompt != PromptTemplate():
            ours["wallx_jax"]["prompt"] = dataclasses.asdict(prompt)
            warnings.warn(
                "trained with a prompt of its own, which PyTorch's loaders do not build: config.json has it under "
                "wallx_jax.prompt",
                stacklevel=3,
            )
    if not (assets / "config.json").is_file():
        return ours
    theirs = read_json_object(assets / "config.json")
    update: dict[str, Any] = {name: ours[name] for name in ("vocab_size", "torch_dtype", "wallx_jax") if name in ours}
    same = WallXConfig.from_hf({**theirs, **update}) == WallXConfig.from_hf(ours)
    return {**theirs, **update} if same else ours
