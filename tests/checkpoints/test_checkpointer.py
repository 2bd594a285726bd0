"""Saving and restoring: exactness, other meshes, damage, interruption, a full disk."""

import dataclasses
import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from wallx_jax.checkpoints.checkpointer import Checkpointer, restore_params, restore_state
from wallx_jax.checkpoints.layout import (
    CheckpointError,
    assets_dir,
    find_checkpoints,
    latest_step,
    read_metadata,
    read_model_config,
    refuse_overwrite,
)
from wallx_jax.models.config import PRESETS

MODEL = PRESETS["tiny"]
CONFIG = {"learning_rate": 9e-5, "resolution": {"face_view": 224}, "dims": (1, 2)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array


def mesh_sharding(devices: int, *spec: str | None) -> NamedSharding:
    assert len(jax.devices()) >= 4, "these tests need 4 CPU devices: XLA_FLAGS=--xla_force_host_platform_device_count=4"
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec(*spec))


def make_state(step: int, devices: int = 4, width: int = 8) -> State:
    """Two parameters, one of them frozen (so that the optimizer's tree has empty nodes), moments that are not zero."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"train": optax.adamw(1e-3), "frozen": optax.set_to_zero()}, {"a": {"kernel": "train"}, "b": "frozen"}
        ),
    )
    values = np.random.default_rng(step).standard_normal((8, width)).astype(np.float32)
    params = {"a": {"kernel": jnp.asarray(values)}, "b": jnp.full((8,), step, jnp.bfloat16)}
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    state = State(jnp.int32(step), params, opt_state, jax.random.key(step))
    return jax.tree.map(lambda x, s: jax.device_put(x, s), state, shardings(state, devices))


def shardings(state: State, devices: int) -> State:
    cut, whole = mesh_sharding(devices, "fsdp"), mesh_sharding(devices)
    return jax.tree.map(lambda x: cut if x.ndim and x.shape[0] % devices == 0 else whole, state)


def abstract(state: State, devices: int) -> State:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(state, devices)
    )


def make_iterator(size: int = 100) -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(size).seed(1).shuffle().repeat().batch(2).to_iter_dataset())


@pytest.fixture
def assets(tmp_path):
    folder = tmp_path / "processor"
    (folder / "fast").mkdir(parents=True)
    (folder / "tokenizer.json").write_text('{"a": "ä"}')
    (folder / "fast" / "bpe.bin").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def save(tmp_path, assets):
    """save(3, 6) writes these steps of a run in tmp_path/run, one after the other, and returns the run's path."""

    def run(*steps: int, **options):
        with Checkpointer(tmp_path / "run", **options) as checkpointer:
            for step in steps:
                checkpointer.save(step, make_state(step), None, CONFIG, MODEL, assets, wait=True)
        return tmp_path / "run"

    return run


def assert_same(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("devices", [4, 2, 1])
def test_restores_bit_for_bit_on_other_meshes(save, devices):
    path = save(3)
    expected = make_state(3)
    state, _ = restore_state(path, abstract(expected, devices), None)
    assert_same(state, expected)
    assert len(state.params["a"]["kernel"].sharding.device_set) == devices
    assert len(state.opt_state[1].inner_states["train"].inner_state[0].mu["a"]["kernel"].sharding.device_set) == devices


def test_params_alone(save):
    path = save(3)
    expected = make_state(3).params
    assert_same(restore_params(path), expected)
    assert len(restore_params(path)["a"]["kernel"].sharding.device_set) == 1
    wanted = {
        "a": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=mesh_sharding(2, None, "fsdp"))},
        "b": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    cast = restore_params(path, wanted)
    assert_same(
        cast, {"a": {"kernel": expected["a"]["kernel"].astype(jnp.bfloat16)}, "b": expected["b"].astype("float32")}
    )
    assert cast["a"]["kernel"].sharding == wanted["a"]["kernel"].sharding


def test_a_checkpoint_can_be_moved_and_serves_without_its_training_part(save, tmp_path, assets):
    step = find_checkpoints(save(3))[0]
    moved = tmp_path / "elsewhere" / "policy"
    moved.parent.mkdir()
    step.rename(moved)
    shutil.rmtree(moved / "state")
    shutil.rmtree(assets)
    assert_same(restore_params(moved), make_state(3).params)
    assert (assets_dir(moved) / "tokenizer.json").read_text() == '{"a": "ä"}'
    assert (assets_dir(moved) / "fast" / "bpe.bin").read_bytes() == bytes(range(256))
    metadata = read_metadata(moved)
    assert metadata["config"] == {**CONFIG, "dims": [1, 2]}
    assert metadata["step"] == 3 and metadata["versions"]["jax"] == jax.__version__
    assert read_model_config(moved) == MODEL


def test_loss_is_recorded_and_metadata_is_strict_json(tmp_path, assets):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), None, {"path": tmp_path}, MODEL, assets, loss=0.5)
        checkpointer.save(2, make_state(2), None, CONFIG, MODEL, assets, loss=float("nan"))
    assert read_metadata(tmp_path / "checkpoints" / "1")["loss"] == 0.5
    assert read_metadata(tmp_path / "checkpoints" / "1")["config"] == {"path": str(tmp_path)}
    assert read_metadata(tmp_path)["loss"] is None


BROKEN_METADATA = {
    "no model": (lambda m: m.pop("model"), " lacks model; copy it again"),
    "several missing": (lambda m: [m.pop(name) for name in ("tokens", "numerics")], " lacks numerics, tokens; copy"),
    "no settings": (lambda m: m.pop("config"), " lacks config; copy it again"),
    "model a list": (lambda m: m.update(model=[1]), r": model is \[1\]; copy it again"),
    "no object": (lambda m: m.update(numerics=None), ": numerics is None; copy it again"),
    "step a text": (lambda m: m.update(step="3"), ": step is '3'; copy it again"),
    "a size missing": (lambda m: m["model"].pop("hidden_size"), ": model lacks hidden_size; .*copy it again"),
    "a size a text": (lambda m: m["model"].update(hidden_size="x"), ': model: hidden_size is "x"; expected a whole n'),
    "an id missing": (lambda m: m["tokens"].pop("eos"), ": tokens lacks eos; copy it again"),
    "an id a text": (lambda m: m["tokens"].update(eos="x"), ": tokens.eos is 'x'; expected a whole number"),
    "an id unknown": (lambda m: m["tokens"].update(end=1), ": tokens.end is unknown; copy it again"),
    "an option unknown": (lambda m: m["numerics"].update(speed=1), ": numerics.speed is unknown; copy it again"),
    "no such choice": (lambda m: m["numerics"].update(flow_loss="x"), ": numerics.flow_loss is 'x'; choose one of"),
}


@pytest.mark.parametrize("damage", BROKEN_METADATA)
def test_broken_metadata_name_the_file_and_the_field(save, damage):
    """In one line for a step, while a run gives way to the checkpoint before, for whoever reads it."""
    break_it, match = BROKEN_METADATA[damage]
    path = save(3, 6)
    file = path / "checkpoints" / "6" / "metadata" / "metadata.json"
    metadata = json.loads(file.read_text())
    break_it(metadata)
    file.write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match=f"{file}{match}") as error:
        read_model_config(path / "checkpoints" / "6")
    assert "\n" not in str(error.value)
    assert read_model_config(path) == MODEL
    state, _ = restore_state(path, abstract(make_state(3), 4), None)
    assert int(state.step) == 3


def test_iterator_resumes_at_the_batch_after_the_save(tmp_path, assets):
    iterator = make_iterator()
    state = make_state(1)
    next(iterator)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, iterator, CONFIG, MODEL, assets)
        expected = [next(iterator) for _ in range(60)]  # advances while the write is in progress, past an epoch
    restored, iterator = restore_state(tmp_path, abstract(state, 4), make_iterator())
    np.testing.assert_array_equal([next(iterator) for _ in range(60)], expected)


def test_iterator_that_does_not_fit(tmp_path, assets, save):
    class Other:
        def get_state(self):
            return {"position": 1}

        def set_state(self, state):
            raise KeyError("next_index")

    state = make_state(1)
    with pytest.raises(CheckpointError, match="no position in the data.*load_ckpt_only"):
        restore_state(save(1), abstract(state, 4), make_iterator())
    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.save(1, state, Other(), CONFIG, MODEL, assets)
    with pytest.raises(CheckpointError, match="no position that this version understands.*next_index.*load_ckpt_only"):
        restore_state(tmp_path / "other", abstract(state, 4), Other())


def test_donated_buffers_are_safe(tmp_path, assets):
    """The step that follows a save may overwrite the buffers at once."""
    overwrite = jax.jit(lambda x: x * 0 + 7, donate_argnums=0)
    values = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)
    x = jnp.asarray(values)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"x": x}, "step": jnp.int32(1)}, None, CONFIG, MODEL, assets)
        for _ in range(3):
            x = overwrite(x)
        x.block_until_ready()
    np.testing.assert_array_equal(restore_params(tmp_path)["x"], values)


def test_keeps_the_newest_and_saves_a_step_once(save, tmp_path, assets):
    path = save(1, 2, 3, max_to_keep=2)
    assert [p.name for p in find_checkpoints(path)] == ["3", "2"]
    before = (path / "checkpoints" / "3" / "metadata" / "metadata.json").stat().st_mtime_ns
    with Checkpointer(path, max_to_keep=2, resumed_step=3) as checkpointer:
        checkpointer.save(3, make_state(3), None, CONFIG, MODEL, assets)
    assert (path / "checkpoints" / "3" / "metadata" / "metadata.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="max_to_keep is 0"):
        Checkpointer(tmp_path / "x", max_to_keep=0)


def test_a_new_run_refuses_a_used_save_path(save, tmp_path):
    refuse_overwrite(tmp_path / "run")
    path = save(3)
    for refused in (lambda: refuse_overwrite(path), lambda: Checkpointer(path)):
        with pytest.raises(CheckpointError, match="newest is step 3.*resume.ckpt=latest, or choose another save_path"):
            refused()


def test_paths(save, tmp_path):
    path = save(3, 12)
    folder = path / "checkpoints"
    assert latest_step(path) == 12 and latest_step(tmp_path) is None
    for given in (path, folder, str(path)):
        assert find_checkpoints(given) == [folder / "12", folder / "3"]
    assert find_checkpoints(folder / "3") == [folder / "3"]
    assert find_checkpoints("latest", save_path=path) == [folder / "12", folder / "3"]
    with pytest.raises(CheckpointError, match="save_path is not set"):
        find_checkpoints("latest")
    with pytest.raises(CheckpointError, match="no such directory"):
        find_checkpoints(path / "nowhere")
    with pytest.raises(CheckpointError, match="looked for checkpoints/STEP/params"):
        find_checkpoints(tmp_path)
    (folder / "12" / "commit_success.txt").unlink()
    assert find_checkpoints(path) == [folder / "3"]
    with pytest.raises(CheckpointError, match="12 is incomplete"):
        find_checkpoints(folder / "12")


def test_another_shape_or_tree_is_one_line(save):
    path = save(3)
    with pytest.raises(CheckpointError) as error:
        restore_state(path, abstract(make_state(3, width=4), 4), None)
    assert "a/kernel is float32[8, 8] in the checkpoint, float32[8, 4] is wanted" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(
        CheckpointError, match=r"a/bias is missing in the checkpoint; a/kernel is not wanted; b is \[8\]"
    ):
        restore_params(path, {"a": {"bias": jnp.zeros(8)}, "b": jnp.zeros(9)})
    state = make_state(3)
    plain = dataclasses.replace(state, opt_state=optax.sgd(1e-3).init(state.params))
    with pytest.raises(CheckpointError, match=r"fit \(state\).*inner_state/0/count is not wanted.*load_ckpt_only"):
        restore_state(path, abstract(plain, 4), None)
    wider = dataclasses.replace(state, step=jnp.zeros((), jnp.float32))
    with pytest.raises(CheckpointError, match=r"step is int32\[\] in the checkpoint, float32\[\] is wanted"):
        restore_state(path, abstract(wider, 4), None)


def damage(step):
    for file in (step / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:7])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(save, caplog, assets):
    path = save(3, 6)
    damage(path / "checkpoints" / "6")
    with caplog.at_level(logging.WARNING, logger="wallx_jax"):
        state, _ = restore_state("latest", abstract(make_state(3), 4), None, save_path=path)
    assert_same(state, make_state(3))
    assert "6 is damaged and passed over" in caplog.text
    with pytest.raises(CheckpointError, match="no readable checkpoint: .*/6: "):
        restore_params(path / "checkpoints" / "6")
    # The run goes on from 3: the damaged one is set aside, so that it neither passes for the newest nor is in the way.
    with Checkpointer(path, max_to_keep=1, resumed_step=3) as checkpointer:
        checkpointer.save(4, make_state(4), None, CONFIG, MODEL, assets, wait=True)
        assert latest_step(path) == 4
        checkpointer.save(6, make_state(6), None, CONFIG, MODEL, assets)
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["6", "6.abandoned-1"]
    assert_same(restore_params(path), make_state(6).params)


@pytest.mark.parametrize("surfaces_at", ["save", "wait", "close"])
def test_a_full_disk_is_reported_and_the_previous_checkpoint_is_intact(tmp_path, assets, surfaces_at, caplog, capfd):
    big = {"params": {"x": jnp.asarray(np.random.default_rng(0).standard_normal(200_000))}, "step": jnp.int32(2)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = Checkpointer(tmp_path, max_to_keep=1)
    checkpointer.save(1, make_state(1), None, CONFIG, MODEL, assets, wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(CheckpointError, match="saving step 2 in .* failed: .*too large.*step 1 is intact"):
            checkpointer.save(2, big, None, CONFIG, MODEL, assets)
            if surfaces_at == "save":
                checkpointer.save(3, big, None, CONFIG, MODEL, assets)
            else:
                getattr(checkpointer, surfaces_at)()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_nothing_but_step_1(tmp_path, caplog, capfd)
    if surfaces_at != "close":
        checkpointer.close()


def assert_nothing_but_step_1(run, caplog, capfd):
    """Neither a partial checkpoint nor a traceback; no thread keeps the process from ending."""
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]
    assert_same(restore_params(run), make_state(1).params)
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    assert not [thread for thread in threading.enumerate() if type(thread).__module__.startswith("orbax.")]


DISK_ERRORS = {
    errno.ENOSPC: r"No space left on device \(the checkpoint takes .* MiB, .*is free\); .*make room there, then",
    errno.EDQUOT: r"Disk quota exceeded \(the checkpoint takes [\d.]* MiB\); .*make room in your quota there, then",
    errno.EROFS: r"Read-only file system; .*make it writable again, then",
    errno.EACCES: r"Permission denied; .*make it writable again, then",
    errno.EIO: r"\[Errno 5\] Input/output error: '.*'; .*find out what is wrong there, then",
}


@pytest.mark.parametrize("code", DISK_ERRORS)
def test_what_the_disk_refuses_is_one_line_with_the_remedy(tmp_path, assets, monkeypatch, caplog, capfd, code):
    def refuse(path, content):
        raise OSError(code, os.strerror(code), str(path))

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), None, CONFIG, MODEL, assets, wait=True)
        (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()  # not of this save: stays
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
            patch.setattr(Path, "write_bytes", refuse)
            checkpointer.save(2, make_state(2), None, CONFIG, MODEL, assets)
            checkpointer.wait()
    message = f"saving step 2 in {tmp_path / 'checkpoints'} failed: {DISK_ERRORS[code]} go on with resume.ckpt=latest"
    assert re.fullmatch(message, str(error.value)), error.value
    assert "step 1 is intact" in str(error.value)
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").rmdir()
    assert_nothing_but_step_1(tmp_path, caplog, capfd)


def test_a_folder_that_cannot_be_made_is_reported_and_the_process_can_end(tmp_path, assets, caplog, capfd):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), None, CONFIG, MODEL, assets, wait=True)
        (tmp_path / "checkpoints").rename(tmp_path / "moved")
        (tmp_path / "checkpoints").touch()
        with pytest.raises(CheckpointError, match="saving step 2 in .* failed: .*Not a directory.*start the run"):
            checkpointer.save(2, make_state(2), None, CONFIG, MODEL, assets, wait=True)
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "moved").rename(tmp_path / "checkpoints")
    assert_nothing_but_step_1(tmp_path, caplog, capfd)


def test_missing_assets_leave_nothing_behind(tmp_path):
    with Checkpointer(tmp_path / "run") as checkpointer, pytest.raises(CheckpointError, match="does not exist"):
        checkpointer.save(1, make_state(1), None, CONFIG, MODEL, tmp_path / "nowhere")
    assert latest_step(tmp_path / "run") is None


# Writes step 1, then a step 2 whose last file never ends: it can be killed at any moment before the commit.
CHILD = """
import asyncio, sys
import jax.numpy as jnp, numpy as np
from wallx_jax.models.config import PRESETS
from wallx_jax.checkpoints import checkpointer as checkpoints

run, assets = sys.argv[1:]
big = {"params": {"x": jnp.asarray(np.random.default_rng(0).standard_normal(3_000_000))}, "step": jnp.int32(1)}
checkpointer = checkpoints.Checkpointer(run)
checkpointer.save(1, big, None, {}, PRESETS["tiny"], assets, wait=True)
async def never(self, directory):
    return asyncio.sleep(600)
checkpoints.Files.save = never
print("saving", flush=True)
checkpointer.save(2, big, None, {}, PRESETS["tiny"], assets)
checkpointer.wait()
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("reached", ["params.*", "params.*/manifest.ocdbt"], ids=["arrays begun", "arrays written"])
def test_kill_in_mid_save(tmp_path, assets, reached):
    run = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", CHILD, run, assets], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "saving\n"
        deadline = time.monotonic() + 60
        while not list((run / "checkpoints").glob(f"2.orbax-checkpoint-tmp*/{reached}")):
            assert time.monotonic() < deadline and child.poll() is None, "the child did not reach the middle of a save"
            time.sleep(0.0005)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    leftovers = list((run / "checkpoints").glob("2.orbax-checkpoint-tmp*"))
    assert len(leftovers) == 1
    (run / "checkpoints" / "notes").mkdir()  # not ours: stays
    assert latest_step(run) == 1
    assert [p.name for p in find_checkpoints(run)] == ["1"]
    with pytest.raises(CheckpointError, match="incomplete"):
        find_checkpoints(leftovers[0])
    expected = np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32)
    np.testing.assert_array_equal(restore_params(run)["x"], expected)
    with Checkpointer(run, resumed_step=1) as checkpointer:
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "notes"]
        checkpointer.save(2, make_state(2), None, CONFIG, MODEL, assets)
    assert json.loads((run / "checkpoints" / "2" / "metadata" / "metadata.json").read_text())["step"] == 2
