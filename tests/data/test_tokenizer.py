import json
import pickle
import random
import subprocess
import sys
import unicodedata

import pytest
import tiktoken
from helpers import qwen_vocab
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from wallx_jax.data.tokenizer import Tokenizer, fast_token
from wallx_jax.models.config import TokenIds


@pytest.fixture(scope="module")
def plain():
    """Qwen's tokenizer as it is; not to be changed."""
    return Tokenizer.from_dir(qwen_vocab.tokenizer_dir())


@pytest.fixture
def qwen():
    """Qwen's tokenizer, for tests that add tokens."""
    return Tokenizer.from_dir(qwen_vocab.tokenizer_dir())


@pytest.fixture
def small():
    """Bytes only, and one ordinary added token."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["<|im_start|>"])
    return Tokenizer(backend)


TEXTS = [
    "pick up the red block",
    "Put the 3rd cup (blue) into box #12345.\n\n  Then stop!\r\n\tDon't move; it's DONE.",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # naïve café ÅÅ e\u0301",
    "把红色的积木放到左边。もう一度、お願いします 🤖🦾👩🏽‍🔬 Здравствуйте مرحبا",
    " leading,   inner    and trailing   ",
    "a" * 300 + "\n" * 7 + "\u00a0\u2003x\u200d",
    "<|notatoken|> <| im_end |>",
]


def test_ids_of_the_real_vocabulary(plain):
    assert plain.encode("pick up the red block") == [29245, 705, 279, 2518, 2504]
    assert len(plain) == 151665
    known = qwen_vocab.SPECIAL_TOKENS + qwen_vocab.ORDINARY_TOKENS
    assert [plain.token_id(token) for token in known] == list(range(151643, 151665))
    assert plain.encode("<|im_start|>assistant\n") == [151644, 77091, 198]
    assert plain.token_ids() == TokenIds(propri=-1, action=-1)


def test_matches_tiktoken(plain):
    reference = tiktoken.Encoding(
        "qwen", pat_str=qwen_vocab.SPLIT_REGEX, mergeable_ranks=qwen_vocab.ranks(), special_tokens={}
    )
    rng = random.Random(0)
    pieces = [chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x3000)])) for _ in range(20000)]
    words = " ".join(str(rng.randrange(10**6)) for _ in range(500))
    for text in [*TEXTS, "".join(pieces), words]:
        expected = reference.encode(unicodedata.normalize("NFC", text), disallowed_special=())
        assert plain.encode(text) == expected
        assert plain.decode(expected) == unicodedata.normalize("NFC", text)


def test_wallx_tokens(qwen):
    qwen = qwen.with_wallx_tokens()
    assert len(qwen) == 151667 and (qwen.fast_start, qwen.fast_size) == (None, 0)
    assert qwen.token_ids() == TokenIds()
    qwen = qwen.with_wallx_tokens(2048)
    assert len(qwen) == 153715 and (qwen.fast_start, qwen.fast_size) == (151667, 2048)
    assert [qwen.token_id(t) for t in ("<|propri|>", "<|action|>", fast_token(0))] == [151665, 151666, 151667]
    assert qwen.token_id(fast_token(2047)) == 153714
    assert qwen.encode("x<|action_token_2047|><|action|>y") == [87, 153714, 151666, 88]
    qwen = qwen.with_wallx_tokens(2048)  # a second time changes nothing
    qwen = qwen.with_wallx_tokens(1024)
    assert len(qwen) == 153715 and qwen.fast_size == 2048
    assert qwen.decode([29245, 151645, 151665], skip_special=True) == "pick<|propri|>"
    assert qwen.added_tokens_in("a<|action|>b<tool_call><|action|>") == ["<|action|>", "<tool_call>"]


@pytest.mark.medium
def test_save_round_trip_and_transformers(qwen, tmp_path):
    from transformers import AutoTokenizer

    qwen = qwen.with_wallx_tokens(16)
    qwen.config["something_unknown"] = {"a": 1}
    qwen.save(tmp_path)
    again = Tokenizer.from_dir(tmp_path)
    assert len(again) == len(qwen) == 151683 and (again.fast_start, again.fast_size) == (151667, 16)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == 151683 and theirs.pad_token_id == 151643 and theirs.eos_token_id == 151645
    assert theirs.init_kwargs["action_token_start_index"] == 151667
    assert theirs.init_kwargs["action_token_vocab_size"] == 16
    for text in [*TEXTS, "<|im_start|>user\nlift it<|propri|>\n<|im_end|><|action_token_3|>"]:
        assert again.encode(text) == qwen.encode(text) == theirs(text)["input_ids"]
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    original = json.loads((qwen_vocab.tokenizer_dir() / "tokenizer_config.json").read_text())
    assert saved["something_unknown"] == {"a": 1} and saved["chat_template"] == original["chat_template"]
    assert original["added_tokens_decoder"].items() <= saved["added_tokens_decoder"].items()
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": False, "normalized": True}
    assert saved["added_tokens_decoder"]["151665"] == {"content": "<|propri|>", **flags}


def test_tokens_added_by_transformers_are_read(tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(qwen_vocab.tokenizer_dir())
    theirs.add_tokens(["<|propri|>", "<|action|>", *map(fast_token, range(8))])
    theirs.init_kwargs |= {"action_token_start_index": 151667, "action_token_vocab_size": 8}
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_dir(tmp_path)
    assert (len(ours), ours.fast_start, ours.fast_size) == (151675, 151667, 8)
    assert ours.config["chat_template"] == theirs.chat_template


@pytest.mark.medium
@pytest.mark.parametrize("listing", ["added_tokens.json", "tokenizer_config.json"])
def test_slow_files_alone(qwen, tmp_path, listing):
    qwen = qwen.with_wallx_tokens(4)
    files = json.loads((qwen_vocab.tokenizer_dir() / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(files["model"]["vocab"]))
    merges = "\n".join(map(" ".join, files["model"]["merges"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges + "\n", encoding="utf-8")
    names = [
        *qwen_vocab.SPECIAL_TOKENS,
        *qwen_vocab.ORDINARY_TOKENS,
        "<|propri|>",
        "<|action|>",
        *map(fast_token, range(4)),
    ]
    if listing == "added_tokens.json":
        (tmp_path / listing).write_text(json.dumps({name: 151643 + n for n, name in enumerate(names)}))
    else:
        qwen.save(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
    slow = Tokenizer.from_dir(tmp_path)
    assert len(slow) == len(qwen) and slow.token_ids() == qwen.token_ids() and slow.fast_size == 4
    for text in [*TEXTS, "<|im_start|>assistant\n<|action_token_2|><|im_end|>\n"]:
        assert slow.encode(text) == qwen.encode(text)


def test_small_tokenizer(small):
    assert small.decode(small.encode("häl<|im_start|>\n")) == "häl<|im_start|>\n"
    assert small.token_ids() == TokenIds(-1, -1, -1, -1, -1, -1, -1)
    small = small.with_wallx_tokens(2)
    assert (small.fast_start, small.fast_size, len(small)) == (259, 2, 261)
    copy = pickle.loads(pickle.dumps(small))
    assert copy.encode("<|action|>a") == small.encode("<|action|>a") and copy.fast_start == 259


def test_adding_tokens_leaves_a_tokenizer_as_it_was(small):
    before = len(small), small.config
    first, second = small.with_wallx_tokens(2), small.with_wallx_tokens(3)
    assert (first.fast_size, second.fast_size, small.fast_size, small.token_id("<|action|>")) == (2, 3, 0, None)
    assert (len(small), small.config) == before


def test_a_saved_tokenizer_can_get_more_fast_tokens(small, tmp_path):
    small.with_wallx_tokens(2).save(tmp_path)
    assert Tokenizer.from_dir(tmp_path).with_wallx_tokens(5).fast_size == 5


def test_fast_ids_must_be_consecutive(small):
    small = small.with_wallx_tokens(2)
    small._backend.add_tokens(["<other>"])
    with pytest.raises(ValueError, match="already has 2 FAST tokens followed by other"):
        small = small.with_wallx_tokens(4)


def test_errors_name_the_file_and_the_remedy(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json, or vocab.json and merges.txt"):
        Tokenizer.from_dir(tmp_path)
    small = small.with_wallx_tokens(2)
    small.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"action_token_vocab_size": 3}))
    with pytest.raises(ValueError, match="action_token_vocab_size = 3 but the vocabulary has 2"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<late>": 400}')
    with pytest.raises(ValueError, match="'<late>' is listed with id 400 but gets 261"):
        Tokenizer.from_dir(tmp_path)
    for text, message in (
        ("{}", "tokenizer.json cannot be read as a tokenizer"),
        ("[]", "tokenizer.json contains a JSON array"),
        ('{"version": "1.0", "mod', "tokenizer.json is not valid JSON .*cut off"),
        ("version https://git-lfs.github.com/spec/v1\n", "tokenizer.json is a Git LFS pointer"),
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_byte_order_mark_in_a_file_is_skipped(small, tmp_path, name):
    small.save(tmp_path)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert Tokenizer.from_dir(tmp_path).encode("abc") == small.encode("abc")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": ["<a>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": 3}}),
        ("tokenizer_config.json", {"eos_token": {"text": "<a>"}}),
        ("added_tokens.json", {"<a>": "300"}),
        ("added_tokens.json", {"<a>": None}),
    ],
)
def test_added_tokens_of_a_wrong_type_are_named(small, tmp_path, name, content):
    small.save(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer_config.json or added_tokens.json are malformed"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.json", "", "vocab.json is empty"),
        ("vocab.json", "[]", "vocab.json contains a JSON array"),
        ("vocab.json", '{"a": "0"}', "vocab.json and merges.txt cannot be read as a tokenizer"),
        ("merges.txt", "", "merges.txt is empty"),
        ("merges.txt", "version https://git-lfs.github.com/spec/v1\n", "merges.txt is a Git LFS pointer"),
        ("merges.txt", "#version: 0.2\na b c\n", "vocab.json and merges.txt cannot be read as a tokenizer"),
    ],
)
def test_damaged_slow_files_are_named(tmp_path, name, text, message):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\r\na b\r\n", newline="")
    assert Tokenizer.from_dir(tmp_path).encode("ab") == [2]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_dir(tmp_path)


def test_data_side_modules_import_nothing_heavy():
    code = (
        "import sys, wallx_jax.data.tokenizer, wallx_jax.data.prompt, wallx_jax.data.fast, wallx_jax.data.images;"
        "print([m for m in ('jax', 'torch', 'transformers', 'lerobot', 'scipy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
