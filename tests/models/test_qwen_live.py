"""The Qwen2.5-VL part against transformers' own PyTorch class on random tiny weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.torch_qwen import IMAGE, PAD, VISION_END, VISION_START, qwen_config, random_model, token_types, torch

from wallx_jax.models.params import from_params
from wallx_jax.models.vision import patchify
from wallx_jax.weights.load import load_params


def prompt(rng, grids, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random text with an image per grid, left padded to `length`."""
    ids = list(rng.integers(0, 90, 3))
    for _, rows, columns in grids:
        ids += [VISION_START, *[IMAGE] * (rows * columns // 4), VISION_END, *rng.integers(0, 90, 2)]
    ids += list(rng.integers(0, 90, rng.integers(2, 6)))
    pad = length - len(ids)
    return np.array([PAD] * pad + ids), np.arange(length) >= pad


@pytest.mark.parametrize(
    ("heads", "kv_heads", "depth", "full", "layers", "grids"),
    [
        (4, 2, 4, [1, 3], 2, ((1, 12, 10), (1, 4, 6))),
        (6, 1, 3, [1], 3, ((1, 8, 8),)),
        (2, 2, 2, [], 1, ((1, 18, 14), (1, 18, 14), (1, 10, 22))),
        (4, 4, 3, [0, 1, 2], 2, ((1, 2, 2),)),
    ],
)
def test_forward(tmp_path, heads, kv_heads, depth, full, layers, grids):
    rng = np.random.default_rng(heads)
    torch_model = random_model(qwen_config(heads, kv_heads, depth, full, layers), tmp_path, seed=heads)
    config, params = load_params(tmp_path, numerics={"param_dtype": "float32", "compute_dtype": "float32"})
    assert config.tokens.image == IMAGE

    batch, length = 3, sum(g[1] * g[2] // 4 + 4 for g in grids) + 12
    rows = [prompt(rng, grids, length) for _ in range(batch)]
    tokens, mask = np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])
    assert not mask.all(), "the case must have padding"
    images = [rng.integers(0, 256, (batch, 14 * g[1], 14 * g[2], 3), dtype=np.uint8) for g in grids]
    patches = jnp.concatenate([patchify(jnp.asarray(image), config.vision) for image in images], axis=1)

    with torch.no_grad():
        expected = torch_model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(int)),
            pixel_values=torch.tensor(np.asarray(patches).reshape(-1, config.vision.patch_dim)),
            image_grid_thw=torch.tensor(grids * batch),
            output_hidden_states=True,
            **token_types(torch_model, torch.tensor(tokens)),
        )

    @jax.jit
    def run(params, tokens, mask, images):
        net = from_params(config, params)
        features, seen = net.encode_images(images)
        assert seen == grids
        out = net.forward(net.embed_prefix(tokens, mask, features, seen), output_hidden_states=True)
        return net.logits(out.hidden), out.hidden_states

    logits, hidden = run(params, jnp.asarray(tokens), jnp.asarray(mask), images)
    for layer in range(layers - 1):  # transformers' last hidden state is after the final norm
        np.testing.assert_allclose(
            hidden[layer][mask], expected.hidden_states[layer + 1].numpy()[mask], atol=2e-4, rtol=2e-4
        )
    np.testing.assert_allclose(np.asarray(logits)[mask], expected.logits.numpy()[mask], atol=2e-4, rtol=2e-4)


def test_patchify_equals_the_image_processor():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    from wallx_jax.models.config import VisionConfig

    image = np.random.default_rng(0).integers(0, 256, (84, 140, 3), dtype=np.uint8)
    expected = Qwen2VLImageProcessor()(image, return_tensors="np")
    ours = patchify(jnp.asarray(image[None]), VisionConfig())
    assert expected["image_grid_thw"].tolist() == [[1, 6, 10]]
    np.testing.assert_allclose(np.asarray(ours)[0], expected["pixel_values"], atol=2e-6)
