"""Import PyTorch model directories strictly: Wall-X, and Qwen2.5-VL in its old and new naming.

Every tensor is used and every parameter is found, or nothing is loaded and one error lists all mismatches. The tensors
take precedence where a config.json is known to disagree with them: vocabulary rows, expert and channel widths, tying.
`open_weights` checks this from the headers only and then reads single parameters; `load_params` reads everything.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wallx_jax.models.config import ActionConfig, LoraConfig, WallXConfig
from wallx_jax.models.params import KEEP_IN_FP32, abstract_params
from wallx_jax.utils import hub, tree
from wallx_jax.utils.files import read_json_object
from wallx_jax.weights import init, names, ops
from wallx_jax.weights.names import TensorSpec
from wallx_jax.weights.safetensors_io import (
    DTYPE_NAMES,
    INDEX,
    NORMALIZERS,
    SINGLE,
    Tensors,
    WeightsError,
    is_finite,
    open_tensors,
    read_header,
)

FLOATS = ("F32", "BF16", "F16", "F64")
MOST_MISSING = 1000  # limit on num_hidden_layers and depth beyond the tensor count; listing more would take too long
LISTED = 50  # names that an error lists individually per kind of problem; more are grouped by layer

Put = Callable[[str, np.ndarray], Any]


def load_params(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    numerics: Mapping[str, Any] | None = None,
    action: ActionConfig | None = None,
    vocab_size: int | None = None,
    action_dim: int = 0,
    state_dim: int = 0,
    lora: LoraConfig | None = None,
    seed: int = 0,
    put: Put | None = None,
) -> tuple[WallXConfig, tree.Tree]:
    """Load a model directory (or hub repository) as parameters of `wallx_jax.models.wallx`.

    Args:
        path_or_repo: directory with config.json and safetensors, or a hub repo id.
        revision: git revision on the hub.
        numerics: fields of `Numerics` that override the directory's.
        action: action expert and heads to initialize from normal(0, 0.02), as upstream does, if the directory has none
            (Qwen2.5-VL). None: such a directory gives a model without them.
        vocab_size: number of rows to resize the vocabulary to, see `resize_vocabulary`; None keeps the file's.
        action_dim: action channels of the robot; a checkpoint with fewer is widened, see `widen_channels`.
        state_dim: state channels of the robot, likewise.
        lora: adapters to add.
        seed: seed for all initialized parameters.
        put: called with each parameter's path and host array, stacked and in its final dtype; its result replaces the
            array. With a `put` that places arrays on devices, host memory holds one parameter at a time.

    Returns:
        The config with sizes corrected by the tensors, and the parameters: a nested dict of contiguous arrays in the
        dtypes of `models.params.param_dtype`.

    Raises:
        WeightsError: if a tensor or file is missing, unexpected or malformed, or a tensor has the wrong shape.
        FileNotFoundError: if the directory or repository does not exist.
    """
    weights = open_weights(hub.resolve(path_or_repo, kind="model", revision=revision), numerics)
    return assemble(
        weights.config,
        weights.read,
        action=action,
        vocab_size=vocab_size,
        action_dim=action_dim,
        state_dim=state_dim,
        lora=lora,
        seed=seed,
        put=put,
    )


class Weights:
    """Weights of a model directory, checked against the model that its config.json describes; read lazily.

    Attributes:
        directory: the model directory.
        config: config with sizes corrected by the tensors.
        specs: {parameter path: shape and dtype}.
        stored: {canonical tensor name: TensorInfo}, including a tied head if the directory stores one.
    """

    def __init__(self, directory: Path, tensors: Tensors, found: Mapping[str, str], config: WallXConfig):
        self.directory, self.config = directory, config
        self.stored = {name: tensors.info[found[name]] for name in found}
        needed = {name: found[name] for name in found if not (name == names.HEAD and config.text.tie_word_embeddings)}
        slots = names.expand(config)
        _check(directory, tensors, needed, slots)
        self.specs = tree.flatten(abstract_params(config))
        self._tensors = tensors
        self._sources: dict[str, list[tuple[str, TensorSpec]]] = {}
        for name, slot in slots.items():
            self._sources.setdefault(slot.row.path, []).append((needed[name], slot))

    def read(self, path: str, rows: slice = slice(None)) -> np.ndarray:
        """Read a parameter in its final dtype.

        Args:
            path: parameter path.
            rows: slice of the first axis to read (the layers of a stacked parameter).

        Raises:
            WeightsError: if it contains NaN or infinity.
        """
        sources = self._sources[path]
        stacked = sources[0][1].layer is not None
        out = np.empty(
            (len(range(self.specs[path].shape[0])[rows]), *self.specs[path].shape[1:]), self.specs[path].dtype
        )
        targets = zip(out, sources[rows], strict=True) if stacked else [(out, sources[0])]
        for target, (name, slot) in targets:
            view = slot.row.op.to_jax(self._tensors[name])
            ops.copy(target, view if stacked else view[rows])
            self._tensors.release(name)
            if not is_finite(target):
                raise WeightsError(f"{self.directory}: {name} contains NaN or infinity; fetch or train it again")
        return out

    def dtypes(self) -> dict[str, tuple[np.dtype, np.dtype]]:
        """Return {tensor name: (dtype in the file, dtype of the parameter)}."""
        return {
            name: (self._tensors.info[name].dtype, np.dtype(self.specs[path].dtype))
            for path, sources in self._sources.items()
            for name, _ in sources
        }

    def normalizers(self) -> dict[str, np.ndarray]:
        """Read the statistics stored among the weights as {tensor name: array}, see `read_normalizers`."""
        return {name: np.array(self._tensors[name]) for name in self._tensors if names.NORMALIZER.fullmatch(name)}


def open_weights(directory: str | Path, numerics: Mapping[str, Any] | None = None) -> Weights:
    """Open a model directory and check it against its config.json.

    Only the headers are read, and tensor data only to compare a stored head with the embedding.

    Args:
        directory: directory with config.json and safetensors.
        numerics: fields of `Numerics` that override the directory's.

    Raises:
        WeightsError: if a tensor or file is missing, unexpected or malformed, or a tensor has the wrong shape.
    """
    directory = Path(directory)
    tensors = open_tensors(directory)
    found = _canonical(directory, tensors)
    return Weights(directory, tensors, found, _config(directory, tensors, found, numerics))


def assemble(
    config: WallXConfig,
    read: Callable[[str], np.ndarray],
    *,
    action: ActionConfig | None = None,
    vocab_size: int | None = None,
    action_dim: int = 0,
    state_dim: int = 0,
    lora: LoraConfig | None = None,
    seed: int = 0,
    put: Put | None = None,
) -> tuple[WallXConfig, tree.Tree]:
    """Read the parameters of `config` one by one with `read(path)`, resize them and initialize missing ones.

    The other arguments and the result are those of `load_params`.
    """
    own = tree.flatten(abstract_params(config))
    resized, config = _resized(config, read, action, vocab_size, action_dim, state_dim, seed)
    config = dataclasses.replace(config, lora=lora or LoraConfig())
    put = put or (lambda path, array: array)
    params = {}
    for path, spec in tree.flatten(abstract_params(config)).items():
        if path in resized:
            array = resized.pop(path)
        elif path in own:
            array = read(path)
        else:
            array = init.init_param(path, spec.shape, spec.dtype, config, seed)
        params[path] = put(path, array)
        del array
    return config, tree.unflatten(params)


def _resized(
    config: WallXConfig,
    read: Callable[[str], np.ndarray],
    action: ActionConfig | None,
    vocab_size: int | None,
    action_dim: int,
    state_dim: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], WallXConfig]:
    """Return the parameters to be resized, {path: array}, and the config after all changes."""
    specs = tree.flatten(abstract_params(config))
    changing: tuple[str, ...] = init.VOCABULARY if vocab_size is not None else ()
    widen = config.has_action_head and (action_dim > config.action.action_dim or state_dim > config.action.state_dim)
    changing += init.CHANNELS if widen else ()
    params = tree.unflatten({path: read(path) for path in changing if path in specs})
    if vocab_size is not None:
        config, params = init.resize_vocabulary(config, params, vocab_size, seed)
    if widen:
        config, params = init.widen_channels(config, params, action_dim, state_dim, seed)
    if not config.has_action_head and action is not None:
        widths = {"action_dim": max(action.action_dim, action_dim), "state_dim": max(action.state_dim, state_dim)}
        config = dataclasses.replace(config, action=dataclasses.replace(action, **widths))
    return tree.flatten(params), config


def read_config(directory: str | Path, numerics: Mapping[str, Any] | None = None) -> WallXConfig:
    """Read config.json of a model directory and correct it by the shapes of its tensors.

    The tensors determine the vocabulary rows, whether the model has an action expert, its width, and the numbers of
    channels. If config.json has no `param_dtype` under "wallx_jax", the narrowest lossless dtype is used. A model that
    is untied according to config.json needs a head. If it is tied but a head is stored that differs from the embedding,
    both are kept and the model becomes untied, with a warning if config.json declares the tying explicitly: dropping
    the head would silently discard trained weights.

    Args:
        directory: directory with config.json and safetensors.
        numerics: fields of `Numerics` that override the directory's.

    Raises:
        WeightsError: if config.json or the weight files are missing or malformed.
    """
    directory = Path(directory)
    tensors = open_tensors(directory)
    return _config(directory, tensors, _canonical(directory, tensors), numerics)


def read_normalizers(directory: str | Path) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Read the normalization statistics that upstream stores among the weights.

    They are not parameters: `load_params` leaves them out, as upstream's later loaders do. A checkpoint converted from
    such weights keeps them among its assets, in NORMALIZERS.

    Returns:
        {robot: {"action" or "propri": {"min" or "delta": array [C]}}}.
    """
    directory = Path(directory)
    kept = directory / NORMALIZERS
    if kept.is_file():
        tensors = Tensors(read_header(kept))
    else:
        has_weights = any((directory / name).is_file() for name in (SINGLE, INDEX))
        tensors = open_tensors(directory) if has_weights else Tensors({})
    robots: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name in tensors:
        if match := names.NORMALIZER.fullmatch(name):
            stats = robots.setdefault(match["robot"], {}).setdefault(match["kind"], {})
            stats[match["stat"]] = np.array(tensors[name])
    return robots


def _canonical(directory: Path, tensors: Tensors) -> dict[str, str]:
    """Return {canonical name: name in the file} for all tensors except normalizers.

    Raises:
        WeightsError: if two names have the same canonical name, or tensors are empty.
    """
    found: dict[str, str] = {}
    for name in tensors:
        if names.NORMALIZER.fullmatch(name):
            continue
        if (short := names.canonical(name)) in found:
            raise WeightsError(f"{directory} has the same tensor under two names: {found[short]} and {name}")
        found[short] = name
    if empty := [
        f"{name} {list(tensors.info[name].shape)}" for name in found.values() if 0 in tensors.info[name].shape
    ]:
        shown = empty if len(empty) <= LISTED else names.group(empty)
        raise WeightsError(
            f"{directory}: tensors without values ({len(empty)}), as a save leaves them that did not gather the "
            "parameters of a sharded model; save it again:\n" + "\n".join(f"  {entry}" for entry in shown)
        )
    return found


def _config(
    directory: Path, tensors: Tensors, found: Mapping[str, str], numerics: Mapping[str, Any] | None
) -> WallXConfig:
    try:
        hf = read_json_object(directory / "config.json")
    except FileNotFoundError:
        raise WeightsError(f"{directory} has no config.json; copy it from where the weights came from") from None
    except ValueError as error:
        raise WeightsError(str(error)) from None
    try:
        config = WallXConfig.from_hf(hf)
    except ValueError as error:
        raise WeightsError(f"{directory}: {error}") from None
    for field, layers in (("num_hidden_layers", config.text.num_hidden_layers), ("depth", config.vision.depth)):
        if layers > len(found) + MOST_MISSING:
            raise WeightsError(f"{directory}: config.json: {field} is {layers}, but there are {len(found)} tensors")

    def size(path: str, axis: int, otherwise: int) -> int:
        name = names.BY_PATH[path].name(layer=0, qwen=False)
        shape = tensors.info[found[name]].shape if name in found else ()
        return shape[axis] if len(shape) == 2 else otherwise

    config = config.replace(text={"vocab_size": size("embed/embedding", 0, config.text.vocab_size)})
    if any(".moe.experts." in name or name.startswith("action_preprocessor.") for name in found):
        a = config.action
        config = config.replace(
            action={
                "intermediate_size": size("decoder/layers/mlp/action/gate/kernel", 0, a.intermediate_size or 2048),
                "action_dim": size("action/proj_back/kernel", 0, a.action_dim),
                "state_dim": size("action/propri_proj/kernel", 1, 2 * a.state_dim) // 2,
            }
        )
    else:
        config = config.replace(action={"intermediate_size": None})

    if "param_dtype" not in (hf.get("wallx_jax") or {}):
        config = config.replace(numerics={"param_dtype": _lossless(tensors, found)})
    config = config.replace(numerics=numerics or {})

    stored_both = names.EMBEDDING in found and names.HEAD in found
    tied = config.text.tie_word_embeddings
    if tied and stored_both and not _equal(tensors, found[names.EMBEDDING], found[names.HEAD]):
        if "tie_word_embeddings" in {
            **(hf.get("text_config") or {}),
            **hf,
        }:  # transformers omits it if it is false
            warnings.warn(
                f"{directory}: config.json sets tie_word_embeddings, but {names.HEAD} differs from the embedding; "
                "both are kept and the model is untied",
                stacklevel=3,
            )
        config = config.replace(text={"tie_word_embeddings": False})
    return config


def _lossless(tensors: Tensors, found: Mapping[str, str]) -> str:
    """Return "bfloat16" if all tensors outside the float32 islands are stored in it, else "float32"."""
    for name, stored in found.items():
        row = names.parse(name)
        if row and not row[0].path.startswith(KEEP_IN_FP32) and DTYPE_NAMES[tensors.info[stored].dtype] != "BF16":
            return "float32"
    return "bfloat16"


def _equal(tensors: Tensors, a: str, b: str) -> bool:
    """Return whether two tensors have equal dtype, shape and bytes."""
    first, second = tensors.info[a], tensors.info[b]
    return (
        (first.dtype, first.shape) == (second.dtype, second.shape)
        and np.array_equal(np.ravel(tensors[a]).view(np.uint8), np.ravel(tensors[b]).view(np.uint8))
    )  # fmt: skip


def _check(directory: Path, tensors: Tensors, found: Mapping[str, str], slots: Mapping[str, TensorSpec]) -> None:
    """Compare the stored tensors with those the model needs, from the headers only.

    Raises:
        WeightsError: listing all tensors that are missing, unexpected, of the wrong shape or not floating point.
    """
    info = {name: tensors.info[found[name]] for name in found}
    common = [name for name in slots if name in found]
    wrong = [name for name in common if info[name].shape != slots[name].shape]
    kinds = {
        "missing": [name for name in slots if name not in found],
        "unexpected": [found[name] for name in found if name not in slots],
        "wrongly shaped": [
            f"{found[name]} {list(info[name].shape)}, expected {list(slots[name].shape)}" for name in wrong
        ],
        "of a type that no weight has": [
            f"{found[name]} {DTYPE_NAMES[info[name].dtype]}"
            for name in common
            if DTYPE_NAMES[info[name].dtype] not in FLOATS
        ],
    }
    if not any(kinds.values()):
        return
    lines = [f"{directory} does not fit the model that its config.json describes; nothing was loaded."]
    layouts = {label for name in kinds["unexpected"] if (label := names.later_layout(name))}
    lines += [f"This version does not read {label}." for label in sorted(layouts)]
    if any("action_preprocessor" in name and info[name].shape[-1] * 2 == slots[name].shape[-1] for name in wrong):
        lines += ["This version does not read projections without a mask (proj_with_mask false)."]
    for kind, entries in kinds.items():
        if entries:
            shown = entries if len(entries) <= LISTED else names.group(entries)
            lines += [f"{len(entries)} {kind}:", *(f"  {entry}" for entry in shown)]
    raise WeightsError("\n".join(lines))
