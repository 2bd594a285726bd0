import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.fft import dct
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from wallx_jax.data.fast import FastDecodeError, FastTokenizer, _dct_matrix


def smooth_chunks(count=64, horizon=16, dims=5, seed=0):
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, horizon)[None, :, None]
    amplitude, frequency, phase = rng.uniform(0.2, 1, (3, count, 1, dims))
    return (amplitude * np.sin(2 * frequency * time + 6 * phase)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    return FastTokenizer.fit(smooth_chunks(), vocab_size=512, scale=10)


def original_text(chunk, scale, min_token):
    """The string the original processor gives to its byte-pair tokenizer."""
    codes = np.around(dct(chunk.astype(np.float64), axis=0, norm="ortho") * scale).flatten() - min_token
    return "".join(chr(int(max(code, 0))) for code in codes)


@pytest.fixture(scope="module")
def original_dir(tmp_path_factory):
    """Files as the original processor's fit leaves them: min_token from the data, English pre-tokenisation."""
    path = tmp_path_factory.mktemp("fast")
    chunks = smooth_chunks()
    coefficients = np.around(dct(chunks, axis=1, norm="ortho") * 10)
    low, high = int(coefficients.min()), int(coefficients.max())
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=1024, min_frequency=2, show_progress=False, max_token_length=10000,
        initial_alphabet=[chr(i) for i in range(max(high - low + 1, 400))],
    )  # fmt: skip
    bpe.train_from_iterator([original_text(chunk, 10, low) for chunk in chunks], trainer=trainer)
    bpe.save(str(path / "tokenizer.json"))
    config = {"scale": 10, "vocab_size": 1024, "min_token": low, "time_horizon": None, "action_dim": None}
    config["auto_map"] = {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"}
    (path / "processor_config.json").write_text(json.dumps(config))
    (path / "processing_action_tokenizer.py").write_text("raise SystemExit('remote code must not run')")
    return path


def test_dct_is_scipys_and_orthonormal():
    x = np.random.default_rng(0).normal(size=(32, 7))
    np.testing.assert_allclose(_dct_matrix(32) @ x, dct(x, axis=0, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(_dct_matrix(9).T @ _dct_matrix(9), np.eye(9), atol=1e-12)
    np.testing.assert_allclose(_dct_matrix(1), [[1.0]])


def test_same_ids_as_the_original_on_its_files(original_dir):
    from transformers import PreTrainedTokenizerFast

    ours = FastTokenizer.from_dir(original_dir)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(original_dir / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    for chunk in smooth_chunks(count=12, seed=1):
        text = original_text(chunk, 10, ours.min_token)
        ids = theirs(text)["input_ids"]
        assert ours.encode(chunk) == ids and theirs.decode(ids) == text
        assert np.abs(ours.decode(ids, 16, 5) - chunk).max() < 0.25
    assert ours.time_horizon is None and ours.vocab_size == 1024


def test_coefficients_below_min_token_are_raised_to_it(original_dir):
    ours = FastTokenizer.from_dir(original_dir)
    ours.min_token = -5
    decoded = ours.decode(ours.encode(np.full((16, 5), -1.0)), 16, 5)
    np.testing.assert_allclose(decoded, np.full((16, 5), -0.5 / np.sqrt(16)), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), horizon=st.integers(1, 16), dims=st.integers(1, 6))
def test_round_trip_within_the_quantisation_bound(fitted, data, horizon, dims):
    elements = st.floats(-1, 1, width=32)
    chunk = data.draw(hnp.arrays(np.float32, (horizon, dims), elements=elements))
    decoded = fitted.decode(fitted.encode(chunk), horizon, dims)
    assert decoded.shape == chunk.shape and decoded.dtype == np.float32
    # Each of A coefficients is off by at most 1/2 step; a row of the orthonormal inverse has norm 1 (Cauchy-Schwarz).
    assert np.abs(decoded - chunk).max() <= np.sqrt(horizon) / (2 * fitted.scale) + 1e-6


def test_fit_compresses_is_deterministic_and_counts(fitted):
    chunks = smooth_chunks()
    again = FastTokenizer.fit(chunks, vocab_size=512, scale=10)
    ids = [fitted.encode(chunk) for chunk in chunks]
    assert ids == [again.encode(chunk) for chunk in chunks]
    assert fitted.codes_like(again)
    assert np.mean([len(row) for row in ids]) < 0.5 * 16 * 5
    assert max(map(max, ids)) < fitted.vocab_size == 512
    assert fitted.min_token == -40  # scale 10 x sqrt(16)


def test_extreme_and_tolerated_values_can_be_encoded(fitted):
    for value in (1.0, -1.0, 1.0005):
        chunk = np.full((16, 5), value)
        np.testing.assert_allclose(fitted.decode(fitted.encode(chunk), 16, 5), np.clip(chunk, -1, 1), atol=1e-6)


def test_two_byte_symbols():
    chunks = smooth_chunks(count=24, horizon=32)
    tokenizer = FastTokenizer.fit(chunks, vocab_size=600, scale=100)  # codes to 1132
    decoded = tokenizer.decode(tokenizer.encode(chunks[0]), 32, 5)
    assert np.abs(decoded - chunks[0]).max() <= np.sqrt(32) / 200
    first_byte = tokenizer._bpe.encode(chr(600)).ids[0]
    with pytest.raises(FastDecodeError, match="multi-byte symbol is truncated"):
        tokenizer.decode([first_byte], 1, 1)


def test_save_round_trip(fitted, tmp_path):
    from transformers import AutoTokenizer

    fitted.save(tmp_path)
    again = FastTokenizer.from_dir(tmp_path)
    chunk = smooth_chunks(count=1, seed=2)[0]
    ids = fitted.encode(chunk)
    assert again.encode(chunk) == ids
    for name in ("scale", "vocab_size", "min_token", "time_horizon", "action_dim"):
        assert getattr(again, name) == getattr(fitted, name)
    assert (again.time_horizon, again.action_dim) == (16, 5)
    # The original processor reads the vocabulary like this and passes the other numbers to its constructor.
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = original_text(chunk, 10, fitted.min_token)
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    assert pickle.loads(pickle.dumps(again)).encode(chunk) == ids


def test_corrupt_ids_are_errors_not_zeros(fitted):
    ids = fitted.encode(smooth_chunks(count=1)[0])
    size = fitted._bpe.get_vocab_size()
    with pytest.raises(FastDecodeError, match=rf"unknown FAST ids \[{size}\]: the vocabulary has ids 0..{size - 1}"):
        fitted.decode([*ids, size], 16, 5)
    with pytest.raises(FastDecodeError, match=r"unknown FAST ids \[-1\]"):
        fitted.decode([-1, *ids], 16, 5)
    with pytest.raises(FastDecodeError, match="16 steps x 5 channels need 80"):
        fitted.decode(ids[:-1], 16, 5)
    with pytest.raises(FastDecodeError, match="decode to 0 coefficients"):
        fitted.decode([], 16, 5)
    with pytest.raises(FastDecodeError, match="decode to 80 coefficients; 16 steps x 6 channels need 96"):
        fitted.decode(ids, 16, 6)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(-2, 700), max_size=30))
def test_any_ids_decode_or_raise(fitted, ids):
    try:
        chunk = fitted.decode(ids, 4, 2)
    except FastDecodeError:
        return
    assert chunk.shape == (4, 2) and np.isfinite(chunk).all()


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.full((16, 5), 1.5), r"in \[-1, 1\], got values in \[1.5, 1.5\]"),
        (np.full((16, 5), np.nan), r"in \[-1, 1\]"),
        (np.zeros(5), r"shape \[A, D\], not \[5\]"),
        (np.zeros((2, 16, 5)), r"shape \[A, D\], not \[2, 16, 5\]"),
        (np.ones((160, 5)), "cannot express this chunk of shape .160, 5., whose quantized coefficients reach 126"),
    ],
)
def test_encode_refuses(fitted, chunk, message):
    with pytest.raises(ValueError, match=message):
        fitted.encode(chunk)


def test_fit_refuses():
    with pytest.raises(ValueError, match=r"chunks have shape \[16, 5\]"):
        FastTokenizer.fit(smooth_chunks()[0])
    with pytest.raises(ValueError, match="vocab_size 64 is smaller than the 81 symbols"):
        FastTokenizer.fit(smooth_chunks(), vocab_size=64)


def test_bad_directories(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match="processor_config.json is missing"):
        FastTokenizer.from_dir(tmp_path)
    fitted.save(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    for broken, message in (
        ({"scale": None}, "lacks scale"),
        ({"scale": 0}, "scale is 0; it must be positive"),
        ({"vocab_size": 100}, "vocab_size is 100 but its tokenizer has"),
        ({"vocab_size": "400"}, "processor_config.json: vocab_size is '400'; expected a number"),
        ({"scale": [10]}, "processor_config.json: scale is \\[10\\]; expected a number"),
        ({"min_token": 1.5}, "processor_config.json: min_token is 1.5; expected a number"),
    ):
        (tmp_path / "processor_config.json").write_text(json.dumps(config | broken))
        with pytest.raises(ValueError, match=message):
            FastTokenizer.from_dir(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        FastTokenizer.from_dir(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read as a tokenizer"):
        FastTokenizer.from_dir(tmp_path)
