"""PyTorch's own loaders read what is exported, strictly, and compute what we compute."""

from pathlib import Path

import benchmark
import jax
import numpy as np
import pytest
from helpers import tiny_run, torch_qwen
from helpers.torch_qwen import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from wallx_jax.checkpoints.from_pytorch import convert_model
from wallx_jax.checkpoints.to_pytorch import export_model
from wallx_jax.data.batch import stack_samples
from wallx_jax.inference.load import load_model, load_policy
from wallx_jax.models.scan import unstack_layers
from wallx_jax.weights.safetensors_io import open_tensors

ROOT = Path(__file__).parents[2]
LEROBOT = ROOT / ".venv-torch" / "bin" / "python"
FLOAT32 = {"param_dtype": "float32", "compute_dtype": "float32"}


def load(folder: Path):
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.filterwarnings("ignore:no tokenizer in")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [None, 60_000])
def test_transformers_loads_an_exported_qwen(tmp_path, tied, shard_bytes):
    config = torch_qwen.qwen_config(heads=4, kv_heads=2, depth=2, full=[1], layers=2)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    theirs = torch_qwen.random_model(config, tmp_path / "theirs", seed=3)
    checkpoint = convert_model(tmp_path / "theirs", tmp_path / "checkpoint", has_action_head=False)
    exported = export_model(checkpoint, tmp_path / "out", layout="qwen2_5_vl", shard_bytes=shard_bytes)
    ours = load(exported)
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name
    ids = torch.tensor([[1, torch_qwen.VISION_START, *[torch_qwen.IMAGE] * 4, torch_qwen.VISION_END, 5, 6]])
    pixels = torch.randn(16, 1176, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs |= torch_qwen.token_types(theirs, ids)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.medium
def test_transformers_loads_the_vlm_part_of_a_wall_x(wallx_dir, tmp_path):
    checkpoint = convert_model(wallx_dir, tmp_path / "checkpoint", has_action_head=True)
    model = load(export_model(checkpoint, tmp_path / "vlm", layout="qwen2_5_vl"))
    ids = np.arange(3, 20)[None]
    vlm = load_model(checkpoint, numerics=FLOAT32)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids)).logits[0, -1].numpy()
    ours = _last_logits(vlm, ids)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def _last_logits(model, ids):
    from wallx_jax.models.params import from_params

    config, width = model.config, model.config.action
    net = from_params(config, model.params)
    state = np.zeros((1, width.state_dim), np.float32)
    prompt = net.embed_prefix(ids, np.ones(ids.shape, bool), None, (), state, state)
    return np.asarray(net.logits(net.forward(prompt).hidden[:, -1:]))[0, 0]


@pytest.mark.slow
@pytest.mark.skipif(not LEROBOT.is_file(), reason="lerobot's wall_x is set up by `make torch-reference`")
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_lerobot_loads_an_exported_wall_x(wallx_dir, tmp_path, dtype):
    """Its own from_pretrained, with the tokenizer and processor files; then a chunk from the same noise."""
    checkpoint = convert_model(wallx_dir, tmp_path / "checkpoint", has_action_head=True)
    exported = export_model(checkpoint, tmp_path / "out", dtype=dtype)
    unit = tiny_run.unit_stats(20)
    policy = load_policy(exported, norm_stats=unit, views=("face_view",), resolution=84, horizon=6, numerics=FLOAT32)
    picture = np.random.default_rng(0).integers(0, 256, (60, 84, 3), np.uint8)
    observation = {"images": {"face_view": picture}, "state": np.linspace(-1, 1, 20), "instruction": "open it"}
    batch = stack_samples([policy.encode(observation)])
    assert not batch.token_mask.all(), "the prompt is padded on the left"
    noise = np.asarray(benchmark.noise_for(batch))
    reference = benchmark.TorchReference(LEROBOT, exported, policy.config, batch, noise)
    reference(f"chunk {benchmark.STEPS}")
    theirs = np.array(reference("actions")["actions"])
    reference.close()
    params = unstack_layers(policy.params)
    ours = np.asarray(
        benchmark.chunk_program(policy.config, params, jax.device_put(batch), noise)(params, batch, noise)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert len(open_tensors(exported)) > 60
