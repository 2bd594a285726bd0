"""transformers' own Qwen2.5-VL class with random tiny weights, as a reference. Importing it skips without PyTorch."""

import inspect

import pytest
import transformers

torch = pytest.importorskip("torch")

VISION_START, VISION_END, IMAGE, VIDEO, PAD = 90, 91, 92, 93, 94
VOCABULARY = 120


def qwen_config(
    heads: int, kv_heads: int, depth: int, full: list[int], layers: int, vocabulary: int = VOCABULARY, **ids: int
) -> transformers.Qwen2_5_VLConfig:
    """`ids`: image_token_id and others, for a tokenizer of one's own."""
    width = 16 * heads
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
           "vision_end_token_id": VISION_END} | ids  # fmt: skip
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 72, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "max_position_embeddings": 2048,
            "use_sliding_window": False, "tie_word_embeddings": True,
        },
        vision_config={
            "depth": depth, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "out_hidden_size": width,
            "fullatt_block_indexes": full, "window_size": 112, "patch_size": 14, "spatial_merge_size": 2,
            "tokens_per_second": 2,
        },
        tie_word_embeddings=True, attn_implementation="eager", **ids,
    )  # fmt: skip


def random_model(config, tmp_path, seed: int, layer_scale: float = 0.08):
    """Saved in `tmp_path`. With a larger `layer_scale` the layers outdo the embedding, without which a tied model says
    the same token for ever."""
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in name else layer_scale if ".layers." in name else 0.08
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))
    model.save_pretrained(tmp_path)
    return model


def token_types(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument by which transformers 5 knows images and videos in a prompt: without it, it takes the positions of
    plain text. transformers 4 finds them in the ids, and rejects the argument."""
    if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
        return {}
    image, video = tokens == model.config.image_token_id, tokens == model.config.video_token_id
    return {"mm_token_type_ids": image.int() + 2 * video.int()}
