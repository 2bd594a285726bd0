"""Damaged and malicious directories, interruptions, full disks: one clear error, the source untouched, no output."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wallx_jax.checkpoints import from_pytorch
from wallx_jax.checkpoints.compare import compare
from wallx_jax.checkpoints.from_pytorch import convert_model
from wallx_jax.checkpoints.layout import CheckpointError, find_checkpoints
from wallx_jax.checkpoints.to_pytorch import export_model
from wallx_jax.weights.safetensors_io import SINGLE, WeightsError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer in")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def left_behind(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name not in ("wallx", "qwen", "elsewhere"))


def truncate(folder):
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 100)


def wrong_header_length(folder):
    content = bytearray((folder / SINGLE).read_bytes())
    content[0] ^= 0xFF
    (folder / SINGLE).write_bytes(content)


def duplicate_key(folder):
    content = (folder / SINGLE).read_bytes()
    a, b = b'"model.layers.0.self_attn.q_proj.bias"', b'"model.layers.1.self_attn.q_proj.bias"'
    (folder / SINGLE).write_bytes(content.replace(b, a))


def pickles_only(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def link_outside(folder):
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.move(folder / SINGLE, elsewhere / SINGLE)
    (folder / SINGLE).symlink_to(elsewhere / SINGLE)


def tokenizer_outside(folder):
    (folder / "tokenizer.json").symlink_to("/etc/hostname")


def no_config(folder):
    (folder / "config.json").unlink()


DAMAGE = {
    truncate: "truncated",
    wrong_header_length: "header",
    duplicate_key: "occurs twice",
    pickles_only: "pickle can run any code",
    link_outside: "link out of its folder",
    tokenizer_outside: "link out of its folder, to /etc/hostname",
    no_config: "has no config.json",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_directory(wallx, tmp_path, damage):
    folder = wallx.write()
    damage(folder)
    before = digest(folder)
    with pytest.raises(WeightsError, match=DAMAGE[damage]):
        convert_model(folder, tmp_path / "checkpoint", has_action_head=True)
    assert digest(folder) == before
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "visual.merger.ln_q.weight"])
def test_nan_and_infinity(wallx, tmp_path, name, dtype, value):
    bad = wallx.tensors[name].astype(dtype, order="C")
    bad.reshape(-1)[-1] = value
    wallx.tensors[name] = bad
    with pytest.raises(WeightsError, match=f"{name} contains NaN or infinity"):
        convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    assert left_behind(tmp_path) == []


def test_links_inside_a_folder_and_in_the_hubs_cache_are_fine(wallx, tmp_path):
    folder = wallx.write()
    (folder / SINGLE).rename(folder / "weights")
    (folder / SINGLE).symlink_to("weights")
    convert_model(folder, tmp_path / "inside", has_action_head=True)

    repository = tmp_path / "models--acme--wall"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "weights")):
        shutil.move(folder / name, repository / "blobs" / str(number))
        (snapshot / name.replace("weights", SINGLE)).symlink_to(f"../../blobs/{number}")
    convert_model(snapshot, tmp_path / "cached", has_action_head=True)
    assert compare(tmp_path / "inside", tmp_path / "cached").identical


def test_existing_output_is_kept(wallx, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine").write_text("precious")
    for attempt in (
        lambda: convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True),
        lambda: export_model(convert_model(wallx.path, tmp_path / "c", has_action_head=True), tmp_path / "checkpoint"),
    ):
        with pytest.raises(FileExistsError, match="exists already; choose another output"):
            attempt()
        assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["mine"]


def test_an_empty_output_folder_may_be_there(wallx, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    assert compare(wallx.path, tmp_path / "checkpoint").identical


def test_a_disk_that_is_too_small_is_refused_before_writing(wallx, tmp_path, monkeypatch):
    monkeypatch.setattr(from_pytorch.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 19))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GiB, but .* has 0\.0 GiB free; make room"):
        convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    assert left_behind(tmp_path) == []


# A limit on the size of files stands for a disk that fills up: the system refuses the write half way.
LIMITED = """
import resource, signal, sys
sys.argv = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(script: str, *arguments, prefix: tuple = ()) -> subprocess.CompletedProcess:
    line = [sys.executable, *map(str, prefix), str(ROOT / "convert" / script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.medium
@pytest.mark.parametrize("limit", [40_000, 100], ids=["tensors", "small files"])
def test_a_disk_that_fills_up(wallx, tmp_path, limit):
    folder, limited = wallx.write(), ("-c", LIMITED, limit)
    convert_model(folder, tmp_path / "checkpoint", has_action_head=True)
    for script, option, source in (
        ("wall_oss.py", "--model", folder),
        ("export.py", "--checkpoint", tmp_path / "checkpoint"),
    ):
        done = command(script, option, source, "--output", tmp_path / "out", prefix=limited)
        *progress, line = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith("error: ") and str(tmp_path) in line, done.stderr
        assert "File too large" in line, done.stderr
        assert all(line.startswith(("warning: no tokenizer", "to out:")) for line in progress if line), done.stderr
        assert left_behind(tmp_path) == ["checkpoint"]


# Dies as a process does that is killed, at the Nth piece.
KILLED = """
import os, runpy, signal, sys
count, sys.argv = int(sys.argv[1]), sys.argv[2:]
from wallx_jax.checkpoints.stream import ParamWriter
from wallx_jax.weights import export
def dying(function):
    def call(*args, **kwargs):
        global count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
ParamWriter.write, export._cast = dying(ParamWriter.write), dying(export._cast)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.medium
@pytest.mark.parametrize("count", [1, 17, 40])
def test_kill_leaves_nothing_that_loads(wallx, tmp_path, count):
    folder = wallx.write()
    arguments = ("--model", folder, "--output", tmp_path / "out")
    line = [sys.executable, "-c", KILLED, str(count), str(ROOT / "convert" / "wall_oss.py"), *map(str, arguments)]
    assert subprocess.run(line, capture_output=True, cwd=ROOT).returncode == -signal.SIGKILL
    assert left_behind(tmp_path) == [".out.partial"]
    with pytest.raises(CheckpointError, match="incomplete|no complete checkpoint"):
        find_checkpoints(tmp_path / ".out.partial")
    done = command("wall_oss.py", *arguments)
    assert done.returncode == 0 and "left by an interrupted run" in done.stderr, done.stderr
    assert left_behind(tmp_path) == ["out"]
    assert compare(folder, tmp_path / "out").identical

    arguments = ("--checkpoint", tmp_path / "out", "--output", tmp_path / "pytorch")
    line = [sys.executable, "-c", KILLED, str(count), str(ROOT / "convert" / "export.py"), *map(str, arguments)]
    assert subprocess.run(line, capture_output=True, cwd=ROOT).returncode == -signal.SIGKILL
    assert left_behind(tmp_path) == [".pytorch.partial", "out"]
    assert not (tmp_path / ".pytorch.partial" / SINGLE).exists()
    assert command("export.py", *arguments).returncode == 0
    assert compare(folder, tmp_path / "pytorch").identical


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_in_the_header_end_in_an_error_or_in_a_whole_checkpoint(wallx, tmp_path, data):
    folder = wallx.write()
    content = bytearray((folder / SINGLE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (folder / SINGLE).write_bytes(content[: data.draw(st.sampled_from([len(content), header, header // 2]))])
    shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
    try:
        convert_model(folder, tmp_path / "checkpoint", has_action_head=True)
    except WeightsError:
        assert left_behind(tmp_path) == []
    else:
        assert compare(folder, tmp_path / "checkpoint").identical
