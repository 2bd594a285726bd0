"""Read and write Qwen2.5's text tokenizer with Wall-X's added tokens, in Hugging Face's file layout.

This is a thin wrapper around the `tokenizers` library, which `transformers` itself delegates to.
"""

import copy
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from wallx_jax.models.config import TokenIds
from wallx_jax.utils.files import read_json_object, read_text, write_text

# How Qwen2 splits text before byte-pair merges; copied from Qwen's tokenizer.json.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "pad": "<|endoftext|>",
    "eos": "<|im_end|>",
    "propri": "<|propri|>",
    "action": "<|action|>",
}
_FAST_RANGE = ("action_token_start_index", "action_token_vocab_size")  # in tokenizer_config.json
_ADDED_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def fast_token(index: int) -> str:
    """Return the text of FAST token `index` in the language model's vocabulary."""
    return f"<|action_token_{index}|>"


def check_unicode(name: str, text: str) -> None:
    """Reject text with half of a surrogate pair, which no tokenizer accepts.

    Raises:
        ValueError: beginning with `name`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} {text!r} contains half of a surrogate pair at character {error.start}; send whole characters"
        ) from None


class Tokenizer:
    """Converts between text and token ids. Immutable; picklable, so it can be passed to data workers.

    Attributes:
        config: contents of tokenizer_config.json; `save` keeps unknown entries.
        fast_start: id of `<|action_token_0|>`, None if the vocabulary has no FAST tokens.
        fast_size: number of FAST tokens; their ids are fast_start .. fast_start + fast_size - 1.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None):
        """Wrap a tokenizer.

        Args:
            backend: the tokenizer; its truncation and padding are switched off.
            config: contents of its tokenizer_config.json.

        Raises:
            ValueError: if the config's action_token_* entries contradict the vocabulary.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.config = dict(config or {})
        self._read_vocabulary()
        for key, found in zip(_FAST_RANGE, (self.fast_start, self.fast_size), strict=True):
            if key in self.config and self.config[key] != found:
                raise ValueError(
                    f"tokenizer_config.json has {key} = {self.config[key]} but the vocabulary has {found}; "
                    f"the tokenizer files do not match"
                )

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Load tokenizer.json, or else vocab.json and merges.txt.

        tokenizer_config.json, added_tokens.json and a chat template are read if they exist.

        Raises:
            FileNotFoundError: if there is neither form.
            ValueError: if a file cannot be read, or an added token would not get the id that the files assign to it.
        """
        path = Path(path)
        config = _read_json(path / "tokenizer_config.json")
        if (path / "chat_template.jinja").is_file():
            config.setdefault("chat_template", read_text(path / "chat_template.jinja"))
        if template := _read_json(path / "chat_template.json").get("chat_template"):  # where Qwen2.5-VL stores it
            config.setdefault("chat_template", template)
        if (path / "tokenizer.json").is_file():
            backend = read_backend(path / "tokenizer.json")
        elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            backend = _qwen_backend(path / "vocab.json", path / "merges.txt")
        else:
            raise FileNotFoundError(f"no tokenizer in {path}: expected tokenizer.json, or vocab.json and merges.txt")
        _restore_added_tokens(backend, config, _read_json(path / "added_tokens.json"), path)
        return cls(backend, config)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json to directory `path`, which is created if missing."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(path / "tokenizer.json"))
        config = {"tokenizer_class": "Qwen2Tokenizer", "clean_up_tokenization_spaces": False, **self.config}
        for key in ("eos", "pad"):
            if self.token_id(_TOKENS[key]) is not None:
                config.setdefault(f"{key}_token", _TOKENS[key])
        config["added_tokens_decoder"] = {
            str(index): {name: getattr(token, name) for name in _ADDED_FIELDS}
            for index, token in sorted(self._backend.get_added_tokens_decoder().items())
        }
        if self.fast_start is not None:  # upstream reads FAST ids from these two
            config |= zip(_FAST_RANGE, (self.fast_start, self.fast_size), strict=True)
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        write_text(path / "tokenizer_config.json", text + "\n")

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without adding special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """Return the text of token ids, optionally without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, None if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def added_tokens_in(self, text: str) -> list[str]:
        """Return the added (control) tokens that encoding `text` would produce, in order of first appearance."""
        return list(dict.fromkeys(self._added[i] for i in self.encode(text) if i in self._added))

    def token_ids(self) -> TokenIds:
        """Return the ids that the model looks for; -1 where the vocabulary has no such token."""
        ids = {name: self.token_id(token) for name, token in _TOKENS.items()}
        return TokenIds(**{name: -1 if index is None else index for name, index in ids.items()})

    def with_wallx_tokens(self, fast_vocab_size: int | None = None) -> "Tokenizer":
        """Return a tokenizer with `<|propri|>`, `<|action|>` and, if a size is given, that many FAST tokens.

        Existing tokens are kept. The others are added as upstream does: as plain, not special, tokens, in this order,
        with the next free ids.

        Raises:
            ValueError: if the FAST tokens would not get consecutive ids.
        """
        names = [_TOKENS["propri"], _TOKENS["action"], *map(fast_token, range(fast_vocab_size or 0))]
        backend = copy.deepcopy(self._backend)
        backend.add_tokens([AddedToken(name, special=False) for name in names if self.token_id(name) is None])
        extended = Tokenizer(backend, {key: self.config[key] for key in self.config if key not in _FAST_RANGE})
        if extended.fast_size < (fast_vocab_size or 0):
            raise ValueError(
                f"the vocabulary already has {self.fast_size} FAST tokens followed by other tokens, so "
                f"{fast_vocab_size} cannot get consecutive ids; start from a tokenizer with none or all of them"
            )
        return extended

    def _read_vocabulary(self) -> None:
        """Cache the added tokens and the range of FAST tokens, counted while their ids are consecutive."""
        self._added = {index: token.content for index, token in self._backend.get_added_tokens_decoder().items()}
        self.fast_start, self.fast_size = self.token_id(fast_token(0)), 0
        while (
            self.fast_start is not None
            and self.token_id(fast_token(self.fast_size)) == self.fast_start + self.fast_size
        ):
            self.fast_size += 1


def read_backend(file: Path) -> tokenizers.Tokenizer:
    """Load a tokenizer.json.

    Raises:
        ValueError: naming the file, if it is damaged or not a tokenizer.
    """
    try:
        return tokenizers.Tokenizer.from_str(read_text(file))
    except ValueError:
        raise
    except Exception as error:  # the library raises bare Exception
        read_json_object(file)  # gives a clearer error for a damaged file
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file, {} if it does not exist."""
    return read_json_object(path) if path.is_file() else {}


def _qwen_backend(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Build a byte-level BPE tokenizer with Qwen2's normalizer, pre-tokenizer and decoder."""
    lines = [line.rstrip("\r") for line in read_text(merges).split("\n")]
    # Pairs, unless the file is damaged, which the library reports.
    pairs: list[Any] = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    try:
        backend = tokenizers.Tokenizer(models.BPE(read_json_object(vocab), pairs))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{vocab} and {merges.name} cannot be read as a tokenizer: {error}") from error
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _restore_added_tokens(backend: tokenizers.Tokenizer, config: dict, added_json: dict[str, int], path: Path) -> None:
    """Add the tokens that the JSON files list and the vocabulary lacks, checking that each gets its listed id."""
    try:
        listed = _listed_tokens(config, added_json)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: the added tokens in tokenizer_config.json or added_tokens.json are malformed ({error!r}); copy "
            "both again"
        ) from error
    present = backend.get_added_tokens_decoder()
    for index, token in sorted(listed.items()):
        if index not in present:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != index:
            raise ValueError(
                f"{path}: added token {token.content!r} is listed with id {index} but gets "
                f"{backend.token_to_id(token.content)}; the tokenizer files do not match"
            )


def _listed_tokens(config: dict, added_json: dict[str, int]) -> dict[int, AddedToken]:
    """Return {id: token} from tokenizer_config.json, then from added_tokens.json."""
    listed = {int(index): AddedToken(**{k: token[k] for k in _ADDED_FIELDS if k in token})
              for index, token in config.get("added_tokens_decoder", {}).items()}  # fmt: skip
    named = [config.get("eos_token"), config.get("pad_token"), *(config.get("additional_special_tokens") or ())]
    special = {token["content"] if isinstance(token, dict) else token for token in named}
    for content, index in added_json.items():
        is_special = content in special
        listed.setdefault(operator.index(index), AddedToken(content, special=is_special, normalized=not is_special))
    return listed
