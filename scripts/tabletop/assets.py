"""Create the inputs of the demo: a LeRobot dataset of scripted demonstrations, and a tiny untrained Wall-X.

Both use the standard formats, so the commands that read them need no demo-specific code: the dataset is LeRobot v3.0
with video, and the model directory has upstream's layout with a tokenizer in Qwen's files.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from tabletop import simulator
from wallx_jax.utils import extras

extras.require("train", __name__)

from wallx_jax.config.robots import ALOHA_DOF
from wallx_jax.data.prompt import prompt_text
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.data.writer import DatasetWriter
from wallx_jax.models.config import ActionConfig, Numerics, TextConfig, VisionConfig, WallXConfig
from wallx_jax.models.params import init_params
from wallx_jax.utils import tree
from wallx_jax.weights.export import save_directory

# Qwen2.5's added tokens in Qwen's order: control tokens, then plain ones.
CONTROL_TOKENS = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
    "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)]  # fmt: skip
PLAIN_TOKENS = [
    "<tool_call>", "</tool_call>",
    *(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
]  # fmt: skip
STATE, ACTION = "observation.state", "action"
VIEWS = ("face_view", "left_wrist_view")
WIDTH = 64
MODEL = WallXConfig(
    vision=VisionConfig(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=WIDTH,
                        fullatt_block_indexes=(0,)),
    text=TextConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, mrope_section=(4, 2, 2)),
    action=ActionConfig(intermediate_size=2 * WIDTH, action_dim=simulator.DIMS, state_dim=simulator.DIMS),
    numerics=Numerics(param_dtype="float32", compute_dtype="float32"),
)  # fmt: skip


def write_dataset(folder: Path, episodes: int, seed: int = 0, progress: bool = False) -> None:
    """Write `episodes` demonstrations as a LeRobot v3.0 dataset; `folder` must not exist. `progress`: show a bar."""
    vector = {"dtype": "float32", "shape": (simulator.DIMS,), "names": list(ALOHA_DOF)}
    features = {STATE: vector, ACTION: vector}
    for camera, (height, width) in simulator.CAMERAS.items():
        features[camera] = {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
    rng = np.random.default_rng(seed)
    with DatasetWriter(folder, simulator.FPS, features, robot_type="aloha", codec="h264") as writer:
        for _ in tqdm(range(episodes), desc="recording", unit="episode", disable=not progress):
            layout = simulator.sample_layout(rng)
            observations, actions = simulator.demonstrate(layout)
            images = {camera: [each["images"][camera] for each in observations] for camera in simulator.CAMERAS}
            vectors = {STATE: np.stack([each["state"] for each in observations]), ACTION: np.stack(actions)}
            writer.add_episode(images | vectors, task=simulator.instruction(layout.target))


def write_tokenizer(folder: Path) -> Tokenizer:
    """Train and write a byte-level BPE for the demo's prompts, with Qwen's and Wall-X's added tokens.

    It does not split at word boundaries and keeps only merges that occur in every prompt, so that each fixed phrase of
    the prompt is one token and each colour another: 30 tokens instead of the 70 that splitting at words would give,
    which halves the compute and doubles the fraction of informative tokens.
    """
    prompts = [prompt_text(simulator.instruction(color), VIEWS) for color in simulator.COLORS]
    pieces = [piece for prompt in prompts for piece in re.split(r"<\|\w+\|>", prompt)]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=len(prompts),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [*simulator.COLORS, simulator.UNNAMED] * len(prompts)
    bpe.train_from_iterator(pieces + words, trainer)
    bpe.add_special_tokens(CONTROL_TOKENS)
    bpe.add_tokens(PLAIN_TOKENS)
    tokenizer = Tokenizer(bpe)
    tokenizer = tokenizer.with_wallx_tokens()
    tokenizer.save(folder)
    return tokenizer


def write_model(folder: Path, seed: int = 0) -> None:
    """Write an untrained Wall-X with its tokenizer."""
    tokenizer = write_tokenizer(folder)
    config = MODEL.replace(text={"vocab_size": len(tokenizer)}, tokens=dataclasses.asdict(tokenizer.token_ids()))
    save_directory(folder, config, tree.map_with_path(_rescale, init_params(config, seed)))


def _rescale(path: str, x):
    """Rescale an initial parameter so that activations keep their scale from layer to layer.

    Qwen's initial standard deviation, 0.02, suits its width. This narrow model, which has no pretraining either, does
    not learn from scratch with it.
    """
    name = path.split("/")[-1]
    if name == "kernel":
        onto_residual = any(part in path for part in ("/o/", "/down/", "/proj/", "/proj_back/"))
        return x * ((0.5 if onto_residual else 1.0) / 0.02 / x.shape[-2] ** 0.5)
    return x * (0.5 / 0.02) if name == "embedding" else x
