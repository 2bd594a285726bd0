"""What the comparison of two models reports."""

import numpy as np
import pytest
from helpers.tiny_models import SMALL, Directory, random_params

from wallx_jax.checkpoints.compare import compare
from wallx_jax.checkpoints.from_pytorch import convert_model

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer in")


@pytest.fixture
def other(wallx, tmp_path):
    """A copy of `wallx` to change."""
    directory = Directory(tmp_path / "other", SMALL, wallx.params)
    directory.tensors = {name: x.copy() for name, x in directory.tensors.items()}
    return directory


def test_identical(wallx, other):
    found = compare(wallx.write(), other.write())
    assert found.identical and found.compared == len(wallx.tensors)
    assert str(found) == f"{len(wallx.tensors)} tensors compared, {len(wallx.tensors)} with equal values"


def test_each_kind_of_difference(wallx, other):
    for layer in range(3):
        del other.tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
    other.tensors["new"] = np.zeros(3, np.float32)
    other.tensors["model.embed_tokens.weight"] = other.tensors["model.embed_tokens.weight"][:-1]
    other.tensors["model.norm.weight"] = other.tensors["model.norm.weight"].astype(np.float64)
    other.tensors["action_preprocessor.w3.weight"][5, 7] += 0.25
    other.tensors["action_preprocessor.w3.weight"][6, 7] -= 0.5
    other.tensors["visual.merger.ln_q.weight"][0] = np.nan
    found = compare(wallx.write(), other.write())
    assert not found.same_values
    assert found.only_a == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)]
    assert found.only_b == ["new"]
    assert found.shapes == {"model.embed_tokens.weight": ([90, 64], [89, 64])}
    assert found.dtypes == {"model.norm.weight": ("F32", "F64")}
    assert found.values == {
        "action_preprocessor.w3.weight": (0.5, 2),
        "visual.merger.ln_q.weight": (np.inf, 1),
    }
    text = str(found)
    assert "model.layers.{0-2}.self_attn.o_proj.weight" in text
    assert "model.embed_tokens.weight [90, 64] | [89, 64]" in text
    assert "action_preprocessor.w3.weight 0.5, 2" in text


def test_only_dtypes_differ(wallx, other):
    name = "model.norm.weight"
    other.tensors[name] = other.tensors[name].astype(np.float64)
    found = compare(wallx.write(), other.write())
    assert found.same_values and not found.identical


def test_nan_equals_itself(wallx, other):
    for directory in (wallx, other):
        directory.tensors["visual.merger.ln_q.weight"][3] = np.nan
    assert compare(wallx.write(), other.write()).identical


def test_spellings_and_checkpoints_are_compared_as_one(qwen, tmp_path):
    checkpoint = convert_model(qwen.write(), tmp_path / "checkpoint", has_action_head=False)
    newer = Directory(tmp_path / "newer", qwen.config, random_params(qwen.config))
    newer.tensors = {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else f"model.{name}": x
        for name, x in qwen.tensors.items()
    }
    for a, b in ((qwen.path, checkpoint), (checkpoint, newer.write()), (newer.path, qwen.path)):
        assert compare(a, b).identical
        assert compare(b, a).identical


def test_checkpoints_differ_where_their_models_do(wallx, other, tmp_path):
    a = convert_model(wallx.write(), tmp_path / "a", has_action_head=True)
    other.tensors["model.layers.2.self_attn.k_proj.weight"][1, 2] += 1
    b = convert_model(other.write(), tmp_path / "b", has_action_head=True)
    assert list(compare(a, b).values) == ["model.layers.2.self_attn.k_proj.weight"]
