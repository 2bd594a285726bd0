"""PyTorch directory -> checkpoint -> PyTorch directory: the same tensors, bit for bit, under the same names."""

import json
import tomllib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.tiny_models import SMALL, SMALL_QWEN, Directory, random_params
from jax.sharding import AxisType
from packaging.requirements import Requirement

from wallx_jax.checkpoints import from_pytorch, stream
from wallx_jax.checkpoints.checkpointer import restore_params
from wallx_jax.checkpoints.from_pytorch import convert_model
from wallx_jax.checkpoints.layout import CheckpointError, read_model_config
from wallx_jax.checkpoints.stream import ParamsReader
from wallx_jax.checkpoints.to_pytorch import export_model
from wallx_jax.models.params import KEEP_IN_FP32
from wallx_jax.training import sharding
from wallx_jax.utils import tree
from wallx_jax.weights import names
from wallx_jax.weights.load import load_params, read_normalizers
from wallx_jax.weights.safetensors_io import INDEX, SINGLE, WeightsError, open_tensors

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer in")
BF16 = ml_dtypes.bfloat16


def is_island(name):
    row, _ = names.parse(name)
    return row.path.startswith(KEEP_IN_FP32)


def normalizers():
    rng = np.random.default_rng(5)
    return {
        f"action_preprocessor.normalizer_{kind}.{stat}.{robot}": rng.standard_normal(20, np.float32).astype(BF16)
        for kind in ("action", "propri")
        for stat in ("min", "delta")
        for robot in ("x2_normal", "physical-intelligence/libero")
    }


def flow(d):
    d.tensors = {name: x.astype(BF16) for name, x in d.tensors.items()} | normalizers()


def lerobot_islands(d):
    d.tensors = {name: x if is_island(name) else x.astype(BF16) for name, x in d.tensors.items()}


def other_mixture(d):
    """Types that follow no rule: nothing may be rounded all the same."""
    d.tensors = {name: x.astype((np.float32, BF16, np.float16)[i % 3]) for i, (name, x) in enumerate(d.tensors.items())}


def stored_tied_head(d):
    d.tensors["lm_head.weight"] = d.tensors["model.embed_tokens.weight"]


def rows_that_config_denies(d):
    d.hf["vocab_size"] = 151936


CASES = {
    "float32": (SMALL, lambda d: None),
    "flow in bfloat16, with statistics": (SMALL, flow),
    "float32 islands": (SMALL, lerobot_islands),
    "mixed dtypes": (SMALL, other_mixture),
    "tied head, stored": (SMALL, stored_tied_head),
    "vocabulary other than config.json's": (SMALL, rows_that_config_denies),
    "fast: more vocabulary rows": (SMALL.replace(text={"vocab_size": 137}), flow),
    "untied head": (SMALL.replace(text={"tie_word_embeddings": False}), flow),
    "wider robot": (SMALL.replace(action={"action_dim": 26, "state_dim": 31}), flow),
    "qwen": (SMALL_QWEN, lambda d: d.tensors.update({name: x.astype(BF16) for name, x in d.tensors.items()})),
    "qwen, untied": (SMALL_QWEN.replace(text={"tie_word_embeddings": False}), lambda d: None),
}


@pytest.mark.medium
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", ["whole", "small"])
def test_comes_back_bit_for_bit(tmp_path, monkeypatch, case, pieces):
    if pieces == "small":  # every parameter in several chunks, with a rest
        monkeypatch.setattr(stream, "CHUNK_BYTES", 2 * 64 * 64 * 4 + 1)
    config, change = CASES[case]
    directory = Directory(tmp_path / "model", config, random_params(config))
    change(directory)
    acts = config.has_action_head
    checkpoint = convert_model(directory.write(), tmp_path / "checkpoint", has_action_head=acts)
    exported = export_model(checkpoint, tmp_path / "out", layout="wall_x" if acts else "qwen2_5_vl")
    assert (exported / SINGLE).read_bytes() == (directory.path / SINGLE).read_bytes()
    assert load_params(exported)[0].text == load_params(directory.path)[0].text
    found = json.loads((exported / "config.json").read_text())
    for key, value in directory.hf.items():
        if key not in ("vocab_size", "torch_dtype", "wallx_jax"):
            assert found[key] == value, key
    assert found["vocab_size"] == config.text.vocab_size


def test_checkpoint_holds_what_import_gives(wallx, tmp_path):
    checkpoint = convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    config, params = load_params(wallx.path)
    assert read_model_config(checkpoint) == config
    mesh = jax.make_mesh((1, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:4])
    wanted = tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.NamedSharding(mesh, sharding.param_spec(path, x.shape, mesh))
        ),
        params,
    )
    for restored in (restore_params(checkpoint), restore_params(checkpoint, wanted)):
        for path, x in tree.flatten(restored).items():
            np.testing.assert_array_equal(np.asarray(x), tree.flatten(params)[path], err_msg=path)
    assert len(restored["decoder"]["layers"]["attn"]["q"]["kernel"].sharding.device_set) == 4
    stored = ParamsReader(checkpoint)
    np.testing.assert_array_equal(stored.read("embed/embedding"), params["embed"]["embedding"])


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", BF16), ("float16", np.float16), ("float32", np.float32)])
def test_dtype_can_be_chosen(wallx, tmp_path, dtype, kind):
    checkpoint = convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    exported = export_model(checkpoint, tmp_path / "out", dtype=dtype)
    tensors = open_tensors(exported)
    assert set(tensors) == set(wallx.tensors)
    for name, x in wallx.tensors.items():
        assert tensors[name].dtype == kind
        np.testing.assert_array_equal(tensors[name], x.astype(kind), err_msg=name)
    config, _ = load_params(exported)
    assert config.numerics.param_dtype == ("bfloat16" if dtype == "bfloat16" else "float32")


def test_values_beyond_a_dtype_are_refused(wallx, tmp_path):
    wallx.tensors["model.norm.weight"] = np.full(64, 1e6, np.float32)
    checkpoint = convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight has values beyond the range of float16"):
        export_model(checkpoint, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.medium
def test_shards(wallx, tmp_path):
    checkpoint = convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    exported = export_model(checkpoint, tmp_path / "out", shard_bytes=250_000)
    index = json.loads((exported / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((exported / file).stat().st_size < 280_000 for file in files)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in wallx.tensors.values())
    tensors = open_tensors(exported)
    assert set(tensors) == set(wallx.tensors)
    for name, x in wallx.tensors.items():
        np.testing.assert_array_equal(tensors[name], x)
    again = convert_model(exported, tmp_path / "again", has_action_head=True)
    assert (export_model(again, tmp_path / "single") / SINGLE).read_bytes() == (wallx.path / SINGLE).read_bytes()


def test_vlm_part_of_a_wall_x(wallx, tmp_path):
    checkpoint = convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    exported = export_model(checkpoint, tmp_path / "vlm", layout="qwen2_5_vl")
    config, params = load_params(exported)
    assert not config.has_action_head
    whole = tree.flatten(wallx.params)
    for path, x in tree.flatten(params).items():
        np.testing.assert_array_equal(x, whole[path], err_msg=path)
    assert config.numerics == load_params(wallx.path)[0].numerics
    assert len(open_tensors(exported)) == len(names.expand(SMALL_QWEN))


def test_a_wall_x_is_not_made_of_a_qwen(qwen, tmp_path):
    checkpoint = convert_model(qwen.write(), tmp_path / "checkpoint", has_action_head=False)
    with pytest.raises(WeightsError, match="without an action side: export it with layout qwen2_5_vl"):
        export_model(checkpoint, tmp_path / "out")


def test_newer_spelling_comes_back_in_the_hubs(qwen, tmp_path):
    older = qwen.tensors
    qwen.tensors = {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else f"model.{name}": x
        for name, x in older.items()
    }
    checkpoint = convert_model(qwen.write(), tmp_path / "checkpoint", has_action_head=False)
    tensors = open_tensors(export_model(checkpoint, tmp_path / "out", layout="qwen2_5_vl"))
    assert set(tensors) == set(older)


def test_statistics_among_the_weights_stay_readable(wallx, tmp_path):
    flow(wallx)
    checkpoint = convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    expected, found = read_normalizers(wallx.path), read_normalizers(checkpoint / "assets")
    assert set(found) == set(expected) == {"x2_normal", "physical-intelligence/libero"}
    np.testing.assert_array_equal(found["x2_normal"]["action"]["min"], expected["x2_normal"]["action"]["min"])


def test_small_files_travel(wallx_dir, tmp_path):
    exported = export_model(convert_model(wallx_dir, tmp_path / "checkpoint", has_action_head=True), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (wallx_dir / name).read_bytes()
    assert json.loads((exported / "preprocessor_config.json").read_text())["image_processor_type"]
    assert not (exported / "commit_success.txt").exists()


def test_float64_is_refused(wallx, tmp_path):
    wallx.tensors["model.norm.weight"] = wallx.tensors["model.norm.weight"].astype(np.float64)
    with pytest.raises(WeightsError, match=r"no parameter can hold float64.*model\.norm\.weight"):
        convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)


@pytest.mark.parametrize(("kind", "acts", "script"), [("wallx", False, "wall_oss"), ("qwen", True, "qwen2_5_vl")])
def test_the_wrong_converter_names_the_right_one(request, tmp_path, kind, acts, script):
    directory = request.getfixturevalue(kind).write()
    with pytest.raises(WeightsError, match=f"use convert/{script}.py"):
        convert_model(directory, tmp_path / "checkpoint", has_action_head=acts)
    assert not (tmp_path / "checkpoint").exists()


def test_a_piece_that_reads_back_otherwise_is_noticed(wallx, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_same_bytes", lambda a, b: a.size < 1000)
    with pytest.raises(CheckpointError, match="reads back otherwise than it was written"):
        convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wallx"]


@pytest.mark.parametrize("version", ["0.12.2", "0.13.0", "1.0"])
def test_another_version_of_orbax_is_refused(wallx, tmp_path, monkeypatch, version):
    monkeypatch.setattr(stream.importlib.metadata, "version", lambda package: version)
    with pytest.raises(CheckpointError, match=f"orbax-checkpoint {version} is installed, .* install such a version"):
        convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wallx"]


@pytest.mark.parametrize("lost", ["commit_success.txt", "params/embed.embedding/.zarray"])
def test_another_layout_of_orbax_is_refused(wallx, tmp_path, monkeypatch, lost):
    save = stream.ocp.save_checkpointables

    def otherwise(step, items):
        save(step, items)
        (step / lost).unlink()

    monkeypatch.setattr(stream.ocp, "save_checkpointables", otherwise)
    with pytest.raises(CheckpointError, match=f"lays out .* otherwise than is known: there is no {lost}; install"):
        convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wallx"]


def test_the_known_versions_are_those_that_are_installed():
    project = tomllib.loads((Path(stream.__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (orbax,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "orbax-checkpoint"]
    assert orbax.specifier == stream.ORBAX


@pytest.mark.medium
def test_many_pieces_are_in_flight_but_not_all(wallx, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1)
    running, most = set(), 0
    read = from_pytorch.Weights.read

    def counted(self, path, rows):
        nonlocal most
        running.add((path, rows.start))
        most = max(most, len(running))
        out = read(self, path, rows)
        running.discard((path, rows.start))
        return out

    monkeypatch.setattr(from_pytorch.Weights, "read", counted)
    convert_model(wallx.write(), tmp_path / "checkpoint", has_action_head=True)
    assert most <= from_pytorch.THREADS
