"""Save and restore training runs with Orbax, which only this module and `checkpoints.stream` use.

See `checkpoints.layout` for the directory layout. The five items of a checkpoint are written to a temporary directory
that Orbax commits once all of them are complete, so a step directory either contains everything or is ignored. It is
self-contained: inference and export read params, metadata and assets from it, wherever it has been moved.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import json
import math
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from wallx_jax.checkpoints import failed_save
from wallx_jax.checkpoints.layout import (
    FOLDER,
    METADATA_FILE,
    POSITION_FILE,
    CheckpointError,
    complete_steps,
    first_readable,
    model_config_of,
    prepare,
    refuse_overwrite,
)
from wallx_jax.models.config import WallXConfig
from wallx_jax.utils.errors import root_cause
from wallx_jax.utils.files import read_json_object
from wallx_jax.utils.tree import Tree, leaves_by_path, unflatten
from wallx_jax.utils.versions import PACKAGES, package_version

T = TypeVar("T")

_SAVE_TIMEOUT_S = 4 * 3600  # Orbax gives up after 20 minutes, too early for 50 GB on a slow network disk
_SHOWN = 5  # differences listed in an error


class DataIterator(Protocol):
    """Interface of `data.pipeline.DataLoader` that checkpoints use.

    The state is a JSON value that is the same in every process.
    """

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


# ---- saving ----------------------------------------------------------------------------------------------------------


class Checkpointer:
    """Write the checkpoints of one run in the background.

    Leftovers of killed saves are removed. Not thread-safe; in a multi-process run every process must make the same
    calls.

    Args:
        save_path: run directory.
        max_to_keep: number of newest checkpoints to keep; None keeps all.
        resumed_step: step in save_path that the run was restored from; later checkpoints are set aside, see
            `layout.prepare`. If None, save_path must not contain any checkpoints.
    """

    def __init__(self, save_path: str | Path, max_to_keep: int | None = None, resumed_step: int | None = None):
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep is {max_to_keep}; give 1 or more, or None to keep every checkpoint")
        self._folder = Path(save_path).expanduser().absolute() / FOLDER
        if resumed_step is None:
            refuse_overwrite(save_path)
        if jax.process_index() == 0:
            prepare(self._folder, resumed_step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("wallx_jax checkpoints cleaned")
        context = ocp.Context()
        context.asynchronous.timeout_secs = _SAVE_TIMEOUT_S
        # If directories cannot be created, threads waiting for them would block process exit until the timeout.
        context.asynchronous.create_directories_asynchronously = False
        # zstd shrinks bfloat16 weights by a fifth, but on two cores makes saving 5x and loading 2x slower.
        context.array.saving.use_compression = False
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            context=context,
            preservation_policy=policies.LatestN(max_to_keep) if max_to_keep else policies.PreserveAll(),
        )
        self._pending: tuple[int, int, Any] | None = None
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(failed_save.quiet())

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: DataIterator | None,
        config: Mapping[str, Any],
        model_config: WallXConfig,
        assets: str | Path,
        *,
        loss: float | None = None,
        data_order: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        """Start writing a checkpoint; do nothing if this step is already on disk.

        Wait for a previous save that is still running. On return, device arrays, iterator state and asset files have
        been copied: the caller may donate the arrays, draw more batches and modify the files.

        Args:
            step: number of optimizer updates so far.
            state: pytree of jax arrays with a top-level entry `params`.
            data_iterator: iterator whose current position is saved. If None, no position is saved and the checkpoint
                cannot be resumed.
            config: run config; values that are not JSON-serializable are written as strings.
            model_config: shapes and numerics of `params`.
            assets: directory to copy.
            loss: training loss to record in the metadata.
            data_order: settings that determine the order of samples, see `init.data_order`.
            wait: return only after the checkpoint is complete.

        Raises:
            CheckpointError: this save failed, or the previous one failed in the background. Its partial files have
                been removed.
        """
        self.wait()
        if step in complete_steps(self._folder):
            return
        primary = jax.process_index() == 0
        items = {
            **_items(leaves_by_path(state)),
            "metadata": Files(
                {METADATA_FILE: metadata_json(step, config, model_config, loss, data_order=data_order)}
                if primary
                else {}
            ),
            "assets": Files(_read_tree(Path(assets)) if primary else {}),
        }
        if data_iterator is not None:
            position = json.dumps(data_iterator.get_state()).encode()
            items["data"] = Files({POSITION_FILE: position} if primary else {})
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            # `force`: the caller decides when to save. `overwrite`: discard a failed attempt at this step.
            response = self._orbax.save_checkpointables_async(step, items, force=True, overwrite=True)
        except Exception as error:
            raise self._failure(step, size, error) from error
        self._pending = (step, size, response)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Block until the save in progress is complete.

        Raises:
            CheckpointError: the save failed.
        """
        if self._pending is None:
            return
        (step, size, response), self._pending = self._pending, None
        try:
            self._orbax.wait()  # first: Orbax raises a failure once per calling thread, and this thread saves again
            response.result()
        except Exception as error:
            with contextlib.suppress(Exception):  # the same failure, from the thread that waits for the response
                response.result()
            raise self._failure(step, size, error) from error

    def close(self) -> None:
        """Wait for the save in progress and release Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()
            self._quiet.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _failure(self, step: int, size: int, error: Exception) -> CheckpointError:
        failed_save.clean_up(self._folder, step)
        return failed_save.failure(self._folder, step, size, error)


class Files:
    """Orbax checkpoint item made of plain files, written in the background.

    Args:
        files: {path inside the item: content}.
    """

    def __init__(self, files: Mapping[str, bytes]):
        self._files = dict(files)

    async def save(self, directory: Any) -> Awaitable[None]:
        def write(folder: Path) -> None:
            for name, content in self._files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)

        async def background() -> None:
            folder = await directory.await_creation()
            await asyncio.to_thread(write, Path(folder))

        return background()

    async def load(self, directory: Any) -> Awaitable[None]:
        raise NotImplementedError("read the files of the step directory")


def metadata_json(
    step: int, config: Mapping[str, Any], model_config: WallXConfig, loss: float | None = None, **more: Any
) -> bytes:
    """Return the content of metadata.json; `more` holds additional entries."""
    metadata = {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "loss": loss if loss is not None and math.isfinite(loss) else None,
        "config": config,
        "model": model_config.to_hf(),
        "tokens": dataclasses.asdict(model_config.tokens),
        "numerics": dataclasses.asdict(model_config.numerics),
        "processes": jax.process_count(),
        "versions": {package: package_version(package) for package in PACKAGES},
        **more,
    }
    return json.dumps(metadata, indent=2, default=str).encode()


def _read_tree(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise CheckpointError(f"the processor directory {folder} to be kept in the checkpoint does not exist")
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---- restoring -------------------------------------------------------------------------------------------------------


def restore_state(
    path: str | Path, abstract_state: T, data_iterator: DataIterator | None, save_path: str | Path | None = None
) -> tuple[T, DataIterator | None]:
    """Restore the full training state and the position of the data iterator to resume a run.

    If `path` is a run whose newest checkpoint is damaged, warn and fall back to the previous one.

    Args:
        path: checkpoint or run, see `checkpoints.layout`.
        abstract_state: tree of the saved state with jax.ShapeDtypeStruct (with sharding) or arrays as leaves; arrays
            are placed on its devices.
        data_iterator: iterator built as for the saved run (same datasets, batch size and seed); its position is set
            in place. None skips the data position.
        save_path: run directory that `path="latest"` refers to.

    Returns:
        The state and `data_iterator`.

    Raises:
        CheckpointError: no readable checkpoint, or names, shapes or dtypes differ (the message lists the differences).
    """
    wanted = leaves_by_path(abstract_state)

    def load(step: Path) -> Any:
        model_config_of(step)  # if the metadata are damaged, the checkpoint could not be used for inference
        compare_state(step, abstract_state)
        with _each_for_itself():
            stored_items = ocp.load_checkpointables(step, jax.tree.map(_placed, _items(wanted)))
        leaves = _from_items(stored_items, wanted)
        if data_iterator is not None:
            _restore_iterator(step, data_iterator)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), list(leaves.values()))

    return first_readable(path, save_path, load, _all_processes), data_iterator


def _each_for_itself() -> ocp.Context:
    """Return an Orbax context in which each process reads independently: others may have failed on damaged files."""
    context = ocp.Context()
    if jax.process_count() > 1:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


def _all_processes(success: bool) -> bool:
    """Return whether all processes of the run have succeeded."""
    if jax.process_count() == 1:
        return success
    return bool(multihost_utils.process_allgather(np.array([success])).all())


def restore_params(path: str | Path, abstract_params: Tree | None = None, save_path: str | Path | None = None) -> Tree:
    """Restore only the parameters, to start another run or for inference.

    Args:
        path: checkpoint or run, see `checkpoints.layout`.
        abstract_params: nested dict of jax.ShapeDtypeStruct; arrays are cast to its dtypes and placed by its
            shardings (on the first local device if a leaf has none). None: as stored, on the first local device.
        save_path: run directory that `path="latest"` refers to.

    Raises:
        CheckpointError: no readable checkpoint, or names or shapes differ.
    """

    def load(step: Path) -> Tree:
        wanted = abstract_params if abstract_params is not None else unflatten(stored(step))
        compare_params(step, wanted)
        with _each_for_itself():
            return ocp.load_checkpointables(step, {"params": jax.tree.map(_placed, wanted)})["params"]

    return first_readable(path, save_path, load, _all_processes)


def _restore_iterator(step: Path, data_iterator: DataIterator) -> None:
    file = step / "data" / POSITION_FILE
    remedy = "set resume.load_ckpt_only=True to go on from its weights with fresh data"
    if not (step / "data").is_dir():
        raise CheckpointError(f"the checkpoint {step} has no position in the data; {remedy}")
    state = read_json_object(file)
    try:
        data_iterator.set_state(state)
    except Exception as error:
        raise CheckpointError(
            f"{file} contains no position that this version understands ({root_cause(error)}); {remedy}"
        ) from error


# ---- trees -----------------------------------------------------------------------------------------------------------


def _items(flat: Mapping[str, Any]) -> dict[str, Tree]:
    """Convert a flattened state to the nested dicts that are stored: "params", and "state" for everything else.

    If a moving average (EMA) is kept, "params" contains it in place of the parameters it averages, so that inference
    and export use it; the trained values are then stored in "state" under "params/...".

    The items are plain dicts so that a checkpoint can be read without the optimizer's classes.
    """
    averages = {path.removeprefix("ema/"): leaf for path, leaf in flat.items() if path.startswith("ema/")}
    trained = {path.removeprefix("params/"): leaf for path, leaf in flat.items() if path.startswith("params/")}
    rest = {path: leaf for path, leaf in flat.items() if not path.startswith(("params/", "ema/"))}
    rest |= {f"params/{path}": trained[path] for path in averages}
    return {"params": unflatten(trained | averages), "state": unflatten(rest)}


def _from_items(items: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves `wanted` of a flattened state; the inverse of `_items`."""
    inference, rest = leaves_by_path(items["params"]), leaves_by_path(items["state"])

    def leaf(path: str) -> Any:
        kind, _, name = path.partition("/")
        if kind == "ema" or (kind == "params" and path not in rest):
            return inference[name]
        return rest[path]

    return {path: leaf(path) for path in wanted}


def stored(step: Path, item: str = "params") -> dict[str, Any]:
    """Return {path: shape and dtype} of a stored tree without reading its arrays."""
    tree = ocp.metadata(step, item).metadata
    if tree is None:  # Orbax logs the cause and continues
        raise OSError(f"the index of {item}/ cannot be read")
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves_by_path(tree).items()}


def compare_state(step: Path, abstract_state: Any) -> None:
    """Check that a step directory contains a state with these names, shapes and dtypes.

    Raises:
        CheckpointError: it does not; the message lists the differences.
    """
    for item, tree in _items(leaves_by_path(abstract_state)).items():
        _compare(step, item, leaves_by_path(tree), dtypes=True)


def compare_params(step: Path, abstract_params: Tree) -> None:
    """Check that a step directory contains parameters with these names and shapes.

    Raises:
        CheckpointError: it does not; the message lists the differences.
    """
    _compare(step, "params", leaves_by_path(abstract_params), dtypes=False)


def _compare(step: Path, item: str, wanted: Mapping[str, Any], dtypes: bool) -> None:
    """Raise a CheckpointError that lists the differences between a stored tree and the wanted one, if any."""
    have = stored(step, item)
    differences = [f"{path} is missing in the checkpoint" for path in wanted.keys() - have.keys()]
    differences += [f"{path} is not wanted" for path in have.keys() - wanted.keys()]
    for path in wanted.keys() & have.keys():
        is_, want = _described(have[path], dtypes), _described(wanted[path], dtypes)
        if is_ != want:
            differences.append(f"{path} is {is_} in the checkpoint, {want} is wanted")
    if differences:
        shown = "; ".join(sorted(differences)[:_SHOWN])
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        remedy = (
            "use that run's model settings, which metadata/metadata.json tells"
            if item == "params"
            else "use that run's optimizer settings, or resume.load_ckpt_only=True for its weights alone"
        )
        raise CheckpointError(f"the checkpoint {step} does not fit ({item}): {shown}{more}. Remedy: {remedy}")


def _described(leaf: Any, dtype: bool) -> str:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # keys are stored as their raw uint32 data
    return f"{leaf.dtype if dtype else ''}[{', '.join(map(str, leaf.shape))}]"


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of a leaf.

    There is always a sharding: without one, Orbax would look for the devices of the run that saved the checkpoint.
    """
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
