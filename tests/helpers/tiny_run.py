"""A tiny model directory and a configuration that trains it on the synthetic dataset in seconds."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from helpers import synthetic
from wallx_jax.config import default_config
from wallx_jax.data.normalize import NormStats, Stats
from wallx_jax.data.tokenizer import Tokenizer
from wallx_jax.models.config import TINY
from wallx_jax.models.params import init_params
from wallx_jax.training import sharding
from wallx_jax.weights.export import save_directory

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
CORPUS = [
    "system\nYou are a helpful assistant.\n", "user\nObservation:", " front view: left wrist view: right wrist view:",
    "\nInstruction:", "\nPredict the next action in robot action.\nProprioception: \n", "assistant\n", *synthetic.TASKS,
]  # fmt: skip

MAKE_MESH = sharding.make_mesh


def use_devices(patch: pytest.MonkeyPatch, count: int) -> None:
    """Runs in this process use so many of the virtual devices."""
    patch.setattr(sharding, "make_mesh", lambda config: MAKE_MESH(config, jax.devices()[:count]))


def write_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE of a few hundred tokens with Qwen's special ones."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    return Tokenizer.from_dir(folder)


def write_model(folder: Path, qwen: bool = False, seed: int = 0, **text) -> Path:
    """Random weights: Wall-X's layout, or Qwen2.5-VL's with more vocabulary rows than tokens, as published."""
    tokenizer = write_tokenizer(folder)
    if not qwen:
        tokenizer = tokenizer.with_wallx_tokens(None)
        tokenizer.save(folder)
    config = TINY.replace(
        vision={"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": (1,)},
        text={"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "mrope_section": (1, 1, 2),
              "vocab_size": len(tokenizer) + (20 if qwen else 0), **text},
        action={"intermediate_size": None if qwen else 24},
        tokens=dataclasses.asdict(tokenizer.token_ids()),
    )  # fmt: skip
    save_directory(folder, config, init_params(config, seed))
    return folder


def run_config(model: Path, dataset: Path, save_path: Path, **changes):
    """`changes` use "__" for the dot of nested keys."""
    c = default_config()
    c.pretrained_wallx_path, c.repo_id, c.save_path = str(model), str(dataset), str(save_path)
    c.camera_views = {"face_view": "cam_high", "left_wrist_view": "cam_left_wrist"}
    c.resolution.face_view, c.resolution.left_wrist_view = 84, 56
    c.numerics.param_dtype = c.numerics.compute_dtype = "float32"
    c.action_horizon, c.num_workers, c.batch_size_per_gpu = 4, 0, 2
    c.learning_rate, c.min_lr, c.num_warmup_steps = 1e-3, 1e-4, 1
    c.train_test_split, c.log_interval, c.eval_interval, c.save_interval, c.eval_batches = 0.75, 1, 2, 2, 2
    c.num_training_steps, c.mesh.data, c.compile_cache = 4, 1, "off"
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = c
        for parent in parents:
            node = node[parent]
        node[last] = value
    return c


def killed_after(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run as if it had been killed before the checkpoint after `step`: its metrics go further."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return copy


def unit_stats(dims: int) -> NormStats:
    """Statistics under which normalising changes nothing."""
    one = np.ones(dims)
    part = Stats(mean=0 * one, std=one, q01=-one, q99=one, min=-one, max=one)
    return NormStats(part, part, "observation.state", "action")
