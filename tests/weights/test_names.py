import json
from pathlib import Path

import numpy as np
import pytest

from wallx_jax.models.config import PRESETS
from wallx_jax.models.params import abstract_params
from wallx_jax.utils import tree
from wallx_jax.weights import names

MANIFESTS = Path(__file__).parent.parent / "fixtures" / "manifests"
WALL_OSS = PRESETS["wall_oss_3b"]
QWEN = WALL_OSS.replace(action={"intermediate_size": None})


def manifest(name):
    """{tensor: shape}; the tied head and the normalizers are no parameters."""
    templates = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {
        template.replace("{l}", str(layer)): tuple(shape)
        for template, (layers, shape) in templates.items()
        if template != "lm_head.weight" and not names.NORMALIZER.fullmatch(template)
        for layer in (range(layers) if layers else [None])
    }


@pytest.mark.parametrize(("config", "file"), [(WALL_OSS, "wall_oss_3b"), (QWEN, "qwen2_5_vl_3b")])
def test_full_size_model_has_exactly_the_published_tensors(config, file):
    assert {name: slot.shape for name, slot in names.expand(config).items()} == manifest(file)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [PRESETS["tiny"], QWEN])
def test_every_parameter_has_exactly_one_row(config, tied):
    config = config.replace(text={"tie_word_embeddings": tied})
    params = tree.flatten(abstract_params(config))
    slots = names.expand(config)
    elements = dict.fromkeys(params, 0)
    for slot in slots.values():
        elements[slot.row.path] += int(np.prod(slot.shape))
    assert elements == {path: int(np.prod(spec.shape)) for path, spec in params.items()}
    assert ("lm_head.weight" in slots) is not tied


def test_rows_are_unique():
    assert len(names.BY_PATH) == len(names.ROWS) == len({row.torch for row in names.ROWS})


@pytest.mark.parametrize("config", [WALL_OSS, QWEN])
def test_names_format_and_parse(config):
    for name, slot in names.expand(config).items():
        assert names.parse(name) == (slot.row, slot.layer)


@pytest.mark.parametrize(
    ("newer", "hub"),
    [
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.visual.blocks.1.norm1.weight", "visual.blocks.1.norm1.weight"),
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_newer_prefixes_come_off(newer, hub):
    assert names.canonical(newer) == hub
    assert names.parse(newer) == names.parse(hub) is not None


@pytest.mark.parametrize(
    "name",
    ["model.layers.03.input_layernorm.weight", "model.layers.x.input_layernorm.weight", "model.norm.weights", ""],
)
def test_foreign_names_do_not_parse(name):
    assert names.parse(name) is None


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model.layers.0.self_attn.q_proj_experts.1.weight", "MoT"),
        ("model.layers.0.input_layernorms.1.weight", "MoT"),
        ("model.norms.0.weight", "MoT"),
        ("model.layers.0.self_attn.qkv_proj.weight", "fused"),
        ("model.layers.0.self_attn.qkv_proj_experts.1.bias", "fused"),
        ("model.layers.0.moe.experts.1.gate_up_proj.weight", "fused"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA"),
        ("action_preprocessor.time_mlp_in.weight", "use_adarms"),
    ],
)
def test_later_layouts_are_recognised(name, label):
    assert label in names.later_layout(name)


def test_the_present_layout_is_not_taken_for_a_later_one():
    assert not any(names.later_layout(name) for config in (WALL_OSS, QWEN) for name in names.expand(config))


def test_group_puts_layers_together():
    entries = [f"model.layers.{l}.a.weight" for l in (0, 1, 2, 5)] + ["visual.blocks.7.b.weight", "lm_head.weight"]  # noqa: E741
    assert names.group(entries) == ["model.layers.{0-2,5}.a.weight", "visual.blocks.7.b.weight", "lm_head.weight"]
