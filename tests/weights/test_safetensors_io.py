import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from wallx_jax.weights import safetensors_io as io
from wallx_jax.weights.safetensors_io import WeightsError, open_tensors, read_header, write_safetensors

EXAMPLE = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.weight": np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "c": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
}


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_written_as_the_reference_implementation_writes(tmp_path):
    write_safetensors(tmp_path / "ours", EXAMPLE)
    save_file(EXAMPLE, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_read_back_lazily(tmp_path):
    write_safetensors(tmp_path / io.SINGLE, EXAMPLE)
    tensors = open_tensors(tmp_path)
    assert set(tensors) == set(EXAMPLE)
    for name, array in EXAMPLE.items():
        assert tensors.info[name].shape == array.shape
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)
    with pytest.raises(ValueError, match="read-only"):
        tensors["b.weight"][0] = 1


def test_strided_arrays_are_written_in_order(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    write_safetensors(tmp_path / io.SINGLE, {"x": x.T, "y": x[:, ::2]})
    tensors = open_tensors(tmp_path)
    np.testing.assert_array_equal(tensors["x"], x.T)
    np.testing.assert_array_equal(tensors["y"], x[:, ::2])


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    class Broken:
        dtype, shape, size = np.dtype(np.float32), (2,), 2

        def __array__(self, *args, **kwargs):
            raise OSError("no space left on device")

    path = tmp_path / io.SINGLE
    write_safetensors(path, EXAMPLE)
    before = path.read_bytes()
    with pytest.raises(OSError, match="no space"):
        write_safetensors(path, {"a": EXAMPLE["b.weight"], "b": Broken()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


MALFORMED = {
    "not JSON": (b"{nonsense", b""),
    "not an object": (b"[1, 2]", b""),
    "begins with a space": (b" {}", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "nested too deeply": (b'{"a":' + b"[" * 200_000, b""),
    "duplicate name": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "duplicate key": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "unknown dtype": ({"a": entry(dtype="F33")}, bytes(4)),
    "dtype not a string": ({"a": entry() | {"dtype": ["F32"]}}, bytes(4)),
    "key missing": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "entry not an object": ({"a": 3}, b""),
    "negative size": ({"a": entry(shape=(-1,))}, bytes(4)),
    "size not a number": ({"a": entry() | {"shape": [1.0]}}, bytes(4)),
    "boolean size": ({"a": entry() | {"shape": [True]}}, bytes(4)),
    "huge size": ({"a": entry(shape=(2**62, 8))}, bytes(4)),
    "offsets reversed": ({"a": entry(shape=(0,), offsets=(4, 0))}, bytes(4)),
    "offsets disagree with the shape": ({"a": entry(offsets=(0, 8))}, bytes(8)),
    "three offsets": ({"a": entry(offsets=(0, 4, 4))}, bytes(4)),
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)),
    "hole": ({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)),
    "hole at the start": ({"a": entry(offsets=(4, 8))}, bytes(8)),
    "truncated data": ({"a": entry()}, bytes(3)),
    "bytes left over": ({"a": entry()}, bytes(5)),
    "metadata not strings": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(4)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(tmp_path, case):
    path = raw_file(tmp_path / "x.safetensors", *MALFORMED[case])
    with pytest.raises(WeightsError, match="x.safetensors"):
        read_header(path)


@pytest.mark.parametrize(("size", "message"), [(0, "0 bytes"), (5, "5 bytes"), (40, "header"), (-1, "promises")])
def test_truncated_files_say_so(tmp_path, size, message):
    write_safetensors(tmp_path / "x", EXAMPLE)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:size])
    with pytest.raises(WeightsError, match=f"truncated.*{message}"):
        read_header(tmp_path / "x")


def test_other_files_are_named(tmp_path):
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="git lfs pull"):
        read_header(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"\x89PNG\r\n\x1a\n" * 9)
    with pytest.raises(WeightsError, match="not a safetensors file"):
        read_header(tmp_path / "x")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_file_is_read_only_if_the_reference_reads_it(tmp_path, flips):
    path = tmp_path / "x"
    write_safetensors(path, EXAMPLE)
    data = bytearray(path.read_bytes())
    for position, value in flips:
        data[position % len(data)] = value
    path.write_bytes(data)
    try:
        ours = read_header(path)
    except WeightsError:
        return
    try:
        with safe_open(path, "np") as file:
            assert set(file.keys()) == set(ours)
    except SafetensorError as error:
        pytest.fail(f"read what the reference refuses: {error}")


def shard(directory, files, weight_map=None):
    for name, tensors in files.items():
        write_safetensors(directory / name, {t: np.zeros(2, np.float32) for t in tensors})
    weight_map = {t: name for name, tensors in files.items() for t in tensors} if weight_map is None else weight_map
    (directory / io.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_shards_are_read_together(tmp_path):
    tensors = open_tensors(shard(tmp_path, {"s1.safetensors": ["a", "b"], "s2.safetensors": ["c"]}))
    assert {name: info.file.name for name, info in tensors.info.items()} == {
        "a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "s1", "b": "s2", "c": "gone", "d": "lost"}, "not there: gone, lost"),
        ({"a": "s1", "b": "s2", "c": "s2"}, "c is not in s2"),
        ({"a": "s1", "b": "s1", "x": "s2"}, "b is in s2, the index has s1"),
        ({"a": "s1", "x": "s2"}, "b is in s2, the index has no entry"),
        ({"a": "../s1"}, "outside its folder"),
        ({"a": 1}, "malformed"),
        ({}, "malformed"),
    ],
)
def test_an_index_that_contradicts_its_shards(tmp_path, weight_map, message):
    with pytest.raises(WeightsError, match=message):
        open_tensors(shard(tmp_path, {"s1": ["a"], "s2": ["b"]}, weight_map))


def test_a_tensor_in_two_shards(tmp_path):
    with pytest.raises(WeightsError, match="a is in both s1 and s2"):
        open_tensors(shard(tmp_path, {"s1": ["a", "c"], "s2": ["a", "b"]}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "cut off"),
        ("[]", "contains a JSON array"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ('{"weight_map": null}', "malformed: its weight_map"),
        ('{"weight_map": ["a"]}', "malformed: its weight_map"),
        ('{"metadata": {}}', "malformed: its weight_map"),
        ('{"weight_map": {"a": "s1", "a": "s2"}}', "malformed .*the key 'a' occurs twice"),
    ],
)
def test_a_malformed_index(tmp_path, text, message):
    (tmp_path / io.INDEX).write_text(text)
    with pytest.raises(WeightsError, match=f"{io.INDEX} .*{message}"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "contains no weights: expected model.safetensors"),
        (["pytorch_model.bin", "config.json"], r"pickled weights only \(pytorch_model.bin\).*safe_serialization"),
        (["adapter_model.safetensors"], "LoRA adapter"),
        (["model-00001-of-00002.safetensors"], "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_directories_without_readable_weights(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=message):
        open_tensors(tmp_path)


def test_one_whole_file_goes_before_an_index_and_pickles_as_in_transformers(tmp_path):
    shard(tmp_path, {"model-1.safetensors": ["a"]})
    write_safetensors(tmp_path / io.SINGLE, {"b": np.zeros(2, np.float32)})
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "optimizer.pt").touch()  # of a trainer's checkpoint: no weights of a model
    with pytest.warns(
        UserWarning, match="model.safetensors is read.*and model-1.safetensors, .*index.json, pytorch_mo"
    ):
        assert list(open_tensors(tmp_path)) == ["b"]


def test_files_that_an_index_does_not_name_are_said(tmp_path):
    shard(tmp_path, {"model-1.safetensors": ["a"], "model-2.safetensors": ["b"]})
    write_safetensors(tmp_path / "model-2-of-3.safetensors", {"b": np.ones(2, np.float32)})
    write_safetensors(tmp_path / io.NORMALIZERS, {"c": np.ones(2, np.float32)})  # beside the weights on purpose
    with pytest.warns(UserWarning, match="index.json with its files is read, .*and model-2-of-3.safetensors are not"):
        assert sorted(open_tensors(tmp_path)) == ["a", "b"]


def test_no_directory(tmp_path):
    with pytest.raises(WeightsError, match="not a folder"):
        open_tensors(tmp_path / "nowhere")
