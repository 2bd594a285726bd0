"""Encodes action chunks as FAST tokens (quantised cosine coefficients, then byte-pair encoding) and decodes them.

Pertsch et al. 2025, https://arxiv.org/abs/2501.09747. Reads and writes the files of physical-intelligence/fast
(processor_config.json and tokenizer.json) and produces the same ids, without running the code in that repository.
Legend: N chunks, A action horizon, D action channels.

Each chunk becomes one string: coefficient (k, d), with k the frequency, is the character with code point
round(scale * coefficient) - min_token, frequencies outermost. Byte-level BPE turns the string into ids.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from wallx_jax.data.tokenizer import read_backend
from wallx_jax.utils.files import read_json_object, write_text

# Reference by which transformers finds the original processor class (`trust_remote_code=True`).
_ORIGINAL_CODE = "physical-intelligence/fast--processing_action_tokenizer.UniversalActionProcessor"
_RANGE_TOLERANCE = 1e-3


class FastDecodeError(ValueError):
    """Raised for a token sequence that does not decode to an action chunk of the expected shape."""


class FastTokenizer:
    """Tokenizer that maps action chunks in [-1, 1] to ids 0 .. vocab_size - 1 and back. Picklable.

    Attributes:
        scale: quantisation steps per unit; the decoding error is at most sqrt(A) / (2 * scale) per value, because each
            coefficient is off by at most half a step and the basis is orthonormal.
        min_token: smallest quantised coefficient that has a character; smaller ones are raised to it.
        vocab_size: size of the id range; the trained vocabulary may be smaller.
        time_horizon: A of the chunks as noted in the files, or None; informative only.
        action_dim: D of the chunks as noted in the files, or None; informative only.
    """

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        scale: float,
        vocab_size: int,
        min_token: int,
        time_horizon: int | None = None,
        action_dim: int | None = None,
    ):
        if scale <= 0:
            raise ValueError(f"FAST scale is {scale}; it must be positive")
        if bpe.get_vocab_size() > vocab_size:
            raise ValueError(f"FAST vocab_size is {vocab_size} but its tokenizer has {bpe.get_vocab_size()} entries")
        bpe.no_truncation()
        bpe.no_padding()
        self._bpe = bpe
        self.scale, self.vocab_size, self.min_token = scale, vocab_size, min_token
        self.time_horizon, self.action_dim = time_horizon, action_dim

    @classmethod
    def from_dir(cls, path: str | Path) -> "FastTokenizer":
        """Load a directory laid out like physical-intelligence/fast. Python files in it are ignored.

        Raises:
            FileNotFoundError: processor_config.json or tokenizer.json is missing.
            ValueError: a file is malformed, or scale, vocab_size or min_token is missing or not a number.
        """
        path = Path(path)
        for name in ("processor_config.json", "tokenizer.json"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"no FAST tokenizer in {path}: {name} is missing")
        config = read_json_object(path / "processor_config.json")
        if missing := [key for key in ("scale", "vocab_size", "min_token") if config.get(key) is None]:
            raise ValueError(f"{path / 'processor_config.json'} lacks {', '.join(missing)}; is this a FAST tokenizer?")
        for key, kind in (("scale", int | float), ("vocab_size", int), ("min_token", int)):
            if isinstance(config[key], bool) or not isinstance(config[key], kind):
                raise ValueError(f"{path / 'processor_config.json'}: {key} is {config[key]!r}; expected a number")
        bpe = read_backend(path / "tokenizer.json")
        shape = config.get("time_horizon"), config.get("action_dim")
        return cls(bpe, config["scale"], config["vocab_size"], config["min_token"], *shape)

    @classmethod
    def fit(cls, chunks: np.ndarray, vocab_size: int = 2048, scale: float = 10) -> "FastTokenizer":
        """Train a vocabulary on action chunks, deterministically.

        Unlike with the original's `fit`, any chunk in [-1, 1] of at most this horizon can be encoded afterwards, even
        an unseen one: coefficients of an orthonormal transform are bounded by sqrt(A), and the alphabet covers that
        range. Merges may also span the whole chunk, whereas the original first splits it like English text.

        Args:
            chunks: float [N, A, D] in [-1, 1].
            vocab_size: maximum number of tokens.
            scale: quantisation steps per unit.

        Raises:
            ValueError: chunks have another shape or range, or vocab_size is smaller than the alphabet.
        """
        chunks = np.asarray(chunks)
        if chunks.ndim != 3 or 0 in chunks.shape:
            raise ValueError(f"chunks have shape {list(chunks.shape)}; fit needs [N, A, D] with at least one of each")
        _, horizon, dims = chunks.shape
        limit = math.ceil(scale * math.sqrt(horizon))
        pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ((symbols, _),) = pre_tokenizer.pre_tokenize_str("".join(map(chr, range(2 * limit + 1))))
        alphabet = sorted(set(symbols))
        if len(alphabet) > vocab_size:
            raise ValueError(
                f"FAST vocab_size {vocab_size} is smaller than the {len(alphabet)} symbols that scale {scale} and "
                f"horizon {horizon} need; raise vocab_size or lower scale"
            )
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizer, decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[], initial_alphabet=alphabet
        )
        fitted = cls(bpe, scale, vocab_size, -limit, horizon, dims)
        bpe.train_from_iterator((fitted._text(chunk) for chunk in chunks), trainer)
        return fitted

    def codes_like(self, other: "FastTokenizer") -> bool:
        """Return whether both tokenizers give the same ids for all actions."""
        ours, theirs = ((x.scale, x.vocab_size, x.min_token, x._bpe.to_str()) for x in (self, other))
        return ours == theirs

    def save(self, path: str | Path) -> None:
        """Write the files that `from_dir` and the original processor class read, creating the folder if missing."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self._bpe.save(str(path / "tokenizer.json"))
        keys = ("scale", "vocab_size", "min_token", "time_horizon", "action_dim")
        processor = {key: getattr(self, key) for key in keys}
        processor |= {"processor_class": _ORIGINAL_CODE.split(".")[-1], "auto_map": {"AutoProcessor": _ORIGINAL_CODE}}
        # Cleaning up spaces would change the decoded coefficients.
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, content in (("processor_config.json", processor), ("tokenizer_config.json", tokenizer)):
            write_text(path / name, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def encode(self, chunk: np.ndarray) -> list[int]:
        """Encode one chunk, float [A, D] in [-1, 1], as ids.

        Coefficients below min_token are raised to it, as in the original (with its -354 this needs a horizon above
        1253). Computed in float64: ids can differ from the original's where a coefficient is on a rounding tie.

        Raises:
            ValueError: the chunk has another shape, a value that is not finite or outside [-1, 1], or a coefficient
                that has no symbol in the vocabulary (the original drops it and can never decode the rest).
        """
        text = self._text(chunk)
        ids = self._bpe.encode(text, add_special_tokens=False).ids
        if self._bpe.decode(ids, skip_special_tokens=False) != text:
            raise ValueError(
                f"the FAST vocabulary cannot express this chunk of shape {list(np.shape(chunk))}, whose quantised "
                f"coefficients reach {max(map(ord, text)) + self.min_token}; fit a tokenizer on this data and horizon"
            )
        return ids

    def decode(self, ids: Sequence[int], horizon: int, dims: int) -> np.ndarray:
        """Decode `ids` to a chunk, float32 [horizon, dims].

        Raises:
            FastDecodeError: ids are unknown, end inside a multi-byte symbol, or do not decode to horizon x dims
                coefficients. (The original returns zeros instead, which a robot would execute.)
        """
        ids = [int(index) for index in ids]
        size = self._bpe.get_vocab_size()
        if unknown := [index for index in ids if not 0 <= index < size]:
            raise FastDecodeError(f"unknown FAST ids {unknown[:5]}: the vocabulary has ids 0..{size - 1}")
        text = self._bpe.decode(ids, skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" in text:
            raise FastDecodeError(f"the {len(ids)} FAST ids do not form whole symbols: a multi-byte symbol is cut")
        if len(text) != horizon * dims:
            raise FastDecodeError(
                f"{len(ids)} FAST ids hold {len(text)} coefficients; "
                f"{horizon} steps x {dims} channels need {horizon * dims}"
            )
        codes = np.fromiter(map(ord, text), np.float64, len(text)).reshape(horizon, dims)
        return (_dct_matrix(horizon).T @ ((codes + self.min_token) / self.scale)).astype(np.float32)

    def _text(self, chunk: np.ndarray) -> str:
        """Return one character per quantised coefficient of a chunk [A, D]."""
        chunk = np.asarray(chunk, np.float64)
        if chunk.ndim != 2 or 0 in chunk.shape:
            raise ValueError(f"an action chunk has shape [A, D], not {list(chunk.shape)}")
        if not np.all(np.abs(chunk) <= 1 + _RANGE_TOLERANCE):  # also catches NaN
            raise ValueError(
                f"FAST takes normalised actions in [-1, 1], got values in [{chunk.min():.4g}, {chunk.max():.4g}]; "
                f"normalise with q01/q99 statistics and clamp"
            )
        coefficients = np.around(_dct_matrix(len(chunk)) @ np.clip(chunk, -1, 1) * self.scale)
        return "".join(map(chr, np.maximum(coefficients - self.min_token, 0).astype(int).ravel()))


@functools.lru_cache(maxsize=8)
def _dct_matrix(size: int) -> np.ndarray:
    """Return the orthonormal DCT-II matrix, float64 [frequency, time]; its transpose is its inverse."""
    frequency, time = np.arange(size)[:, None], np.arange(size)
    matrix = math.sqrt(2 / size) * np.cos(np.pi / size * (time + 0.5) * frequency)
    matrix[0] /= math.sqrt(2)
    return matrix
