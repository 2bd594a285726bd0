import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.tiny_models import SMALL, SMALL_QWEN, Directory, random_params

from wallx_jax.models.config import ActionConfig
from wallx_jax.models.params import KEEP_IN_FP32, abstract_params
from wallx_jax.utils import tree
from wallx_jax.weights.export import save_directory
from wallx_jax.weights.load import load_params, open_weights, read_config, read_normalizers
from wallx_jax.weights.safetensors_io import WeightsError, write_safetensors


def assert_same(params, expected):
    params, expected = tree.flatten(params), tree.flatten(expected)
    assert params.keys() == expected.keys()
    for path, array in params.items():
        assert array.dtype == expected[path].dtype, path
        assert array.flags.c_contiguous, path
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def shapes(params):
    return {path: x.shape for path, x in tree.flatten(params).items()}


# What loads


def test_wallx_directory(wallx):
    config, params = load_params(wallx.write())
    assert config.replace(tokens=vars(SMALL.tokens)) == SMALL
    assert_same(params, wallx.params)


def test_layers_are_stacked_in_numeric_order(tmp_path):
    config = SMALL.replace(text={"num_hidden_layers": 11})
    directory = Directory(tmp_path, config, random_params(config))
    for layer in range(11):
        directory.tensors[f"model.layers.{layer}.input_layernorm.weight"] = np.full(64, layer, np.float32)
    _, params = load_params(directory.write())
    assert params["decoder"]["layers"]["input_norm"]["scale"][:, 0].tolist() == list(range(11))


@pytest.mark.parametrize("newer", [False, True])
def test_qwen_directory_in_both_spellings(qwen, newer):
    def rename(name):
        prefix = r"model.language_model." if name.startswith("model.") else r"model.visual."
        return re.sub(r"^(model|visual)\.", prefix, name)

    if newer:
        qwen.tensors = {rename(name): x for name, x in qwen.tensors.items()}
        assert all(name.startswith(("model.language_model.", "model.visual.")) for name in qwen.tensors)
    config, params = load_params(qwen.write())
    assert config.action.intermediate_size is None
    assert_same(params, qwen.params)


def test_qwen_directory_gets_a_fresh_action_side(qwen):
    action = ActionConfig(intermediate_size=16, action_dim=20, state_dim=20)
    config, params = load_params(qwen.write(), action=action, action_dim=26, seed=1)
    assert config.action == ActionConfig(intermediate_size=16, action_dim=26, state_dim=20)
    assert shapes(params) == shapes(abstract_params(config))
    own, init_param = tree.split(params, lambda path: path in tree.flatten(qwen.params))
    assert_same(own, qwen.params)
    for path, x in tree.flatten(init_param).items():
        assert path.startswith(("action/", "decoder/layers/mlp/action/"))
        assert abs(x.std() - 0.02) < 0.002 and abs(x.mean()) < 0.002, path
    assert_same(load_params(qwen.path, action=action, action_dim=26, seed=1)[1], params)
    other = load_params(qwen.path, action=action, seed=2)[1]
    assert not np.array_equal(other["action"]["w2"]["kernel"], params["action"]["w2"]["kernel"])


def test_shards(wallx):
    wallx.write()
    (wallx.path / "model.safetensors").unlink()
    parts = [dict(list(wallx.tensors.items())[i::3]) for i in range(3)]
    for i, part in enumerate(parts):
        write_safetensors(wallx.path / f"model-{i}.safetensors", part)
    weight_map = {name: f"model-{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (wallx.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_params(wallx.path)[1], wallx.params)


def test_bfloat16_file_with_float32_islands(wallx):
    wallx.tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in wallx.tensors.items()}
    del wallx.hf["wallx_jax"]  # as published
    config, params = load_params(wallx.write())
    assert config.numerics.param_dtype == "bfloat16" and config.numerics.float32_islands
    for path, x in tree.flatten(params).items():
        assert x.dtype == (np.float32 if path.startswith(KEEP_IN_FP32) else ml_dtypes.bfloat16), path
    _, plain = load_params(wallx.path, numerics={"float32_islands": False})
    assert {x.dtype for x in tree.flatten(plain).values()} == {np.dtype(ml_dtypes.bfloat16)}
    _, wide = load_params(wallx.path, numerics={"param_dtype": "float32"})
    for path, x in tree.flatten(wide).items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, tree.flatten(wallx.params)[path].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_mixed_file_is_read_in_each_tensors_dtype(wallx):
    norm = "model.layers.1.post_attention_layernorm.weight"
    wallx.tensors = {n: x if n == norm else x.astype(ml_dtypes.bfloat16) for n, x in wallx.tensors.items()}
    _, params = load_params(wallx.write())
    loaded = params["decoder"]["layers"]["post_norm"]["scale"][1]
    np.testing.assert_array_equal(loaded, wallx.tensors[norm])


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_without_numerics_of_ours_the_file_decides_param_dtype(wallx, stored):
    wallx.tensors = {name: x.astype(stored) for name, x in wallx.tensors.items()}
    del wallx.hf["wallx_jax"]
    assert read_config(wallx.write()).numerics.param_dtype == "float32"  # float16 does not fit into bfloat16


def test_put_places_each_parameter_as_it_is_read(wallx):
    seen = []

    def put(path, array):
        assert isinstance(array, np.ndarray)
        seen.append((path, array.shape, array.dtype))
        return array.sum()

    config, params = load_params(wallx.write(), put=put)
    specs = tree.flatten(abstract_params(config))
    assert sorted(seen) == sorted((path, x.shape, x.dtype) for path, x in specs.items())
    assert np.shape(params["decoder"]["norm"]["scale"]) == ()


def test_normalizers_are_set_aside(wallx):
    for kind, stat, value in (
        ("action", "min", 1),
        ("action", "delta", 2),
        ("propri", "min", 3),
        ("propri", "delta", 4),
    ):
        name = f"action_preprocessor.normalizer_{kind}.{stat}.physical-intelligence/libero"
        wallx.tensors[name] = np.full(20, value, np.float32)
    assert_same(load_params(wallx.write())[1], wallx.params)
    robots = read_normalizers(wallx.path)
    assert robots.keys() == {"physical-intelligence/libero"}
    stats = robots["physical-intelligence/libero"]
    found = {(kind, stat): x[0] for kind, pair in stats.items() for stat, x in pair.items()}
    assert found == {("action", "min"): 1, ("action", "delta"): 2, ("propri", "min"): 3, ("propri", "delta"): 4}


# Shapes that config.json may have wrong


def test_shapes_come_from_the_tensors(wallx):
    wallx.hf["vocab_size"] = 151936
    wallx.hf["dof_config"] = {"arm": 7}
    wallx.hf["experts"][1]["intermediate_size"] = 2048
    del wallx.hf["agent_pos_config"]
    config, params = load_params(wallx.write())
    assert (config.text.vocab_size, config.action) == (90, SMALL.action)
    assert_same(params, wallx.params)
    assert read_config(wallx.path) == config


@pytest.mark.parametrize("rows", [151667, 151936, 153715, 155765])
def test_vocabularies_in_the_wild(qwen, rows):
    qwen.tensors["model.embed_tokens.weight"] = np.broadcast_to(np.zeros(64, np.float32), (rows, 64))
    assert read_config(qwen.write()).text.vocab_size == rows
    config, params = load_params(qwen.path)
    assert config.text.vocab_size == rows
    assert params["embed"]["embedding"].shape == (rows, 64)


def test_widths_are_changed_while_loading(wallx):
    with pytest.warns(UserWarning, match="freshly initialized"):
        config, params = load_params(wallx.write(), vocab_size=80, action_dim=26, state_dim=20)
    assert (config.text.vocab_size, config.action.action_dim, config.action.state_dim) == (80, 26, 20)
    assert shapes(params) == shapes(abstract_params(config))
    np.testing.assert_array_equal(params["embed"]["embedding"], wallx.params["embed"]["embedding"][:80])
    np.testing.assert_array_equal(params["action"]["w2"]["kernel"], wallx.params["action"]["w2"]["kernel"])


def test_a_narrower_robot_changes_nothing(wallx):
    config, params = load_params(wallx.write(), action_dim=7, state_dim=8)
    assert config.action == SMALL.action
    assert_same(params, wallx.params)


# Tying


def test_a_stored_copy_of_the_embedding_is_tied(wallx):
    wallx.tensors["lm_head.weight"] = wallx.tensors["model.embed_tokens.weight"].copy()
    config, params = load_params(wallx.write())
    assert config.text.tie_word_embeddings
    assert_same(params, wallx.params)


def test_a_head_that_differs_is_kept_with_a_warning(wallx):
    head = wallx.tensors["model.embed_tokens.weight"] + 1
    wallx.tensors["lm_head.weight"] = head
    with pytest.warns(UserWarning, match="lm_head.weight differs from the embedding"):
        config, params = load_params(wallx.write())
    assert not config.text.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T)


def test_an_untied_model_needs_its_head(wallx):
    wallx.hf["tie_word_embeddings"] = False
    with pytest.raises(WeightsError, match="1 missing:\n  lm_head.weight"):
        load_params(wallx.write())
    wallx.tensors["lm_head.weight"] = wallx.tensors["model.embed_tokens.weight"].copy()
    assert not load_params(wallx.write())[0].text.tie_word_embeddings


# What does not load


def test_one_error_lists_everything(wallx):
    del wallx.tensors["model.norm.weight"], wallx.tensors["visual.blocks.1.attn.qkv.bias"]
    wallx.tensors["model.layers.9.input_layernorm.weight"] = np.zeros(64, np.float32)
    wallx.tensors["surprise"] = np.zeros(1, np.float32)
    wallx.tensors["action_preprocessor.w2.weight"] = np.zeros((64, 100), np.float32)
    wallx.tensors["visual.merger.ln_q.weight"] = np.zeros(32, np.int8)
    with pytest.raises(WeightsError) as error:
        load_params(wallx.write(), put=lambda path, array: pytest.fail("something was read"))
    assert str(error.value).splitlines()[1:] == [
        "2 missing:",
        "  model.norm.weight",
        "  visual.blocks.1.attn.qkv.bias",
        "2 unexpected:",
        "  model.layers.9.input_layernorm.weight",
        "  surprise",
        "1 wrongly shaped:",
        "  action_preprocessor.w2.weight [64, 100], expected [64, 128]",
        "1 of a type that no weight has:",
        "  visual.merger.ln_q.weight I8",
    ]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model.layers.0.self_attn.q_proj_experts.0.weight", "MoT"),
        ("model.layers.0.moe.experts.0.gate_up_proj.weight", "fused projections"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
    ],
)
def test_later_layouts_are_named(wallx, name, label):
    wallx.tensors[name] = np.zeros((2, 2), np.float32)
    with pytest.raises(WeightsError, match=f"This version does not read .*{label}"):
        load_params(wallx.write())


def test_projections_without_masks_are_named(wallx):
    for head in ("w1", "propri_proj"):
        wallx.tensors[f"action_preprocessor.{head}.weight"] = np.zeros((64, 20), np.float32)
    with pytest.raises(WeightsError, match="proj_with_mask false"):
        load_params(wallx.write())


def test_long_lists_are_grouped_by_layer(tmp_path):
    config = SMALL_QWEN.replace(text={"num_hidden_layers": 60})
    directory = Directory(tmp_path, config, random_params(config))
    directory.tensors = {n: x for n, x in directory.tensors.items() if "input_layernorm" not in n}
    with pytest.raises(WeightsError, match=r"60 missing:\n  model.layers.\{0-59\}.input_layernorm.weight$"):
        load_params(directory.write())


def test_the_same_tensor_under_two_names(qwen):
    qwen.tensors["model.visual.merger.ln_q.weight"] = qwen.tensors["visual.merger.ln_q.weight"]
    with pytest.raises(WeightsError, match="under two names"):
        load_params(qwen.write())


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"model_type": "llama"}', '{"model_type": "qwen2_5_vl"}'])
def test_a_bad_config(wallx, text):
    config = wallx.write() / "config.json"
    config.unlink()
    if text is not None:
        config.write_text(text)
    with pytest.raises(WeightsError, match="config.json"):
        load_params(wallx.path)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        *[
            (name, value, f"config.json: {name} is .*; expected a whole number of at least 1")
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
                         "intermediate_size")
            for value in ("32", 0, -1, 2.5, [2], {}, True)
        ],
        *[
            (f"vision_config.{name}", value, f"vision_config.{name} is .*; expected a whole number of at least 1")
            for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size",
                         "spatial_merge_size", "temporal_patch_size", "window_size", "in_channels")
            for value in ("14", 0, -2, 1.5)
        ],
        ("hidden_size", 10**12, "hidden_size is"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, but there are [0-9]+ tensors"),
        ("vision_config.depth", 10**9, "depth is 1000000000, but there are [0-9]+ tensors"),
        *[(name, 3, f"config.json: {name} is 3; expected an object")
          for name in ("text_config", "vision_config", "rope_scaling", "dof_config", "agent_pos_config",
                       "noise_scheduler", "wallx_jax")],
        *[(name, [1], f"config.json: {name} is \\[1\\]; expected an object")
          for name in ("text_config", "vision_config", "rope_scaling", "dof_config")],
        ("wallx_jax.lora", 3, "wallx_jax.lora is 3; expected an object"),
        ("wallx_jax.lora", {"rank": -1}, "wallx_jax.lora.rank is -1; expected a whole number of at least 0"),
        ("wallx_jax.float32_islands", 1, "wallx_jax.float32_islands is 1; expected true or false"),
        ("wallx_jax.remat", "some", "numerics.remat is 'some'; choose one of"),
        ("tie_word_embeddings", "true", 'tie_word_embeddings is "true"; expected true or false'),
        ("rms_norm_eps", "1e-6", 'rms_norm_eps is "1e-6"; expected a number above 0'),
        ("rope_theta", 0, "rope_theta is 0; expected a number above 0"),
        ("rope_scaling.mrope_section", [2, "3", 3], "mrope_section is .*; expected a list of whole numbers"),
        ("rope_scaling.mrope_section", 8, "mrope_section is 8; expected a list of whole numbers"),
        ("rope_scaling.mrope_section", [2, 3, 4], "mrope_section .* must be three sizes that sum to half of the head"),
        ("rope_scaling.mrope_section", [4, 4], "mrope_section .* must be three sizes that sum to half of the head"),
        ("vision_config.fullatt_block_indexes", [-1], "fullatt_block_indexes is \\[-1\\]; expected a list"),
        ("vision_config.fullatt_block_indexes", 1, "fullatt_block_indexes is 1; expected a list"),
        ("dof_config", {"arm": "7"}, 'dof_config.arm is "7"; expected a whole number'),
        ("dof_config", {"arm": None}, "dof_config.arm is null; expected a whole number"),
        ("agent_pos_config", {"arm": -7}, "agent_pos_config.arm is -7; expected a whole number"),
        ("noise_scheduler", {"s": "0.9"}, 'noise_scheduler.s is "0.9"; expected a number above 0'),
        ("experts", 3, "experts: expected a list of two objects"),
        ("experts", [{"intermediate_size": 3}], "experts: expected a list of two objects"),
        ("experts", [{"intermediate_size": 3}, {}], "experts: expected a list of two objects"),
        ("image_token_id", "5", 'image_token_id is "5"; expected a whole number'),
        ("num_attention_heads", 3, "hidden_size 64 is no multiple of num_attention_heads 3"),
        ("num_key_value_heads", 3, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ("vision_config.num_heads", 3, "vision_config.hidden_size 32 is no multiple of 4 x vision_config.num_heads 3"),
        ("vision_config.out_hidden_size", 48, "vision_config.out_hidden_size 48 is not hidden_size 64"),
        ("vision_config.window_size", 14, "vision_config.window_size 14 is less than"),
    ],
)  # fmt: skip
def test_a_value_of_config_json_that_makes_no_sense_is_named(wallx, entry, value, message):
    *parents, last = entry.split(".")
    section = wallx.hf
    for parent in parents:
        section = section[parent]
    section[last] = value
    with pytest.raises(WeightsError, match=message) as error:
        read_config(wallx.write())
    assert "\n" not in str(error.value) and str(wallx.path) in str(error.value)


def test_values_of_config_json_that_make_no_sense_come_together(wallx):
    wallx.hf |= {"hidden_size": "64", "num_hidden_layers": 0, "vision_config": 3}
    with pytest.raises(WeightsError, match="vision_config .*; hidden_size .*; num_hidden_layers "):
        read_config(wallx.write())


def test_null_in_config_json_is_as_not_given(wallx):
    expected = read_config(wallx.write())
    wallx.hf |= {"text_config": None, "pad_token_id": None, "eos_token_id": [expected.tokens.eos, 1]}
    assert read_config(wallx.write()) == expected


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "action_preprocessor.w1.weight"])
def test_tensors_without_values_are_refused_before_anything_is_loaded(wallx, name):
    """As DeepSpeed leaves them whose parameters were not gathered; no random rows take their place."""
    rows = wallx.config.text.vocab_size
    wallx.tensors[name] = wallx.tensors[name][:0]
    wallx.write()
    for read in (read_config, open_weights, lambda path: load_params(path, vocab_size=rows)):
        with pytest.raises(WeightsError, match=rf"tensors without values \(1\).*save it again:\n  {name} \[0"):
            read(wallx.path)


def test_a_truncated_file(wallx):
    file = wallx.write() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="truncated"):
        load_params(wallx.path)


# Export


@pytest.mark.parametrize("config", [SMALL, SMALL_QWEN, SMALL.replace(text={"tie_word_embeddings": False})])
def test_export_is_the_inverse_of_import(tmp_path, config):
    params = random_params(config)
    save_directory(tmp_path / "a", config, params)
    loaded_config, loaded = load_params(tmp_path / "a")
    assert loaded_config.text == config.text and loaded_config.action == config.action
    assert_same(loaded, params)
    save_directory(tmp_path / "b", loaded_config, loaded)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_bfloat16_with_islands_survives_export(tmp_path):
    config = SMALL.replace(numerics={"param_dtype": "bfloat16"})
    params = random_params(config)
    save_directory(tmp_path, config, params)
    assert_same(load_params(tmp_path)[1], params)


def test_export_replaces_an_older_one(saved):
    params = random_params(SMALL, seed=5)
    save_directory(saved, SMALL, params)
    assert_same(load_params(saved)[1], params)
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_loaded_parameters_do_not_need_the_file(saved):
    _, params = load_params(saved)
    shutil.rmtree(saved)
    assert_same(params, random_params(SMALL))


@pytest.mark.parametrize("name", ["golden", "golden_qwen"])
def test_a_file_that_pytorch_wrote_comes_back_byte_for_byte(tmp_path, name):
    source = Path(__file__).parent.parent / "fixtures" / name
    save_directory(tmp_path, *load_params(source))
    assert (tmp_path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
