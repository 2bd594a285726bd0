"""Small files that are damaged, each named with the remedy; text is UTF-8 whatever the locale."""

import ast
import errno
import os
import resource
from pathlib import Path

import pytest

from wallx_jax.utils.files import DISK_REMEDIES, atomic_file, read_json_object, read_text, write_text

ROOT = Path(__file__).parents[2]
SOURCES = [file for name in ("wallx_jax", "scripts", "convert", "configs") for file in (ROOT / name).rglob("*.py")]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; copy it again"),
        (b" \r\n\t", "is empty; copy it again"),
        (b"\xef\xbb\xbf", "is empty; copy it again"),
        (POINTER, "is a Git LFS pointer, not the file; fetch it with `git lfs pull`"),
        ('{"a": 1}'.encode("utf-16"), r"is not UTF-8 text \(byte 0\); save it as UTF-8"),
        (b'{"a": "caf\xe9"}', r"is not UTF-8 text \(byte 10\); save it as UTF-8"),
        (b'{\n  "a": [1, 2', r"is not valid JSON \(line 2: it is cut off\); copy it again"),
        (b'{"a": "text', r"is not valid JSON \(line 1: it is cut off\); copy it again"),
        (b'{"a":\n', r"is not valid JSON \(line 2: it is cut off\); copy it again"),
        (b'{"a": 1}}', r"is not valid JSON \(line 1: unexpected text at column 9\); copy it again"),
        (b"{'a': 1}", r"is not valid JSON \(line 1: unexpected text at column 2\); copy it again"),
        (b"\0" * 40, r"is not valid JSON \(line 1: unexpected text at column 1\); copy it again"),
        (b'{"a": ' * 100_000, "is malformed \\(it is nested too deeply\\); copy it again"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is malformed \\(.*digits.*; copy it again"),
        (b"[1]", "contains a JSON array; expected an object, copy it again"),
        (b'"a"', "contains a JSON string; expected an object, copy it again"),
        (b"3", "contains a JSON number; expected an object, copy it again"),
        (b"true", "contains a JSON boolean; expected an object, copy it again"),
        (b"null", "contains a JSON null; expected an object, copy it again"),
    ],
)
def test_a_damaged_json_file_is_named_with_the_remedy(tmp_path, content, message):
    file = tmp_path / "small.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json_object(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a").write_bytes('\ufeff{"é": "关"}'.encode())
    assert read_json_object(tmp_path / "a") == {"é": "关"}
    assert read_text(tmp_path / "a") == '{"é": "关"}'
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "b")


def refusal(code: int, *file) -> OSError:
    return OSError(code, os.strerror(code), *file)


@pytest.mark.parametrize("code", DISK_REMEDIES)
def test_a_file_that_the_disk_refuses_is_named_with_the_remedy(tmp_path, code):
    """The system names no file where it is written to. The one that was there stays."""
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="a cannot be written: .*; (make|raise) ") as error, atomic_file(tmp_path / "a"):
        raise refusal(code)
    assert str(error.value) == f"{tmp_path / 'a'} cannot be written: {os.strerror(code)}; {DISK_REMEDIES[code]}"
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
    with pytest.raises(OSError, match=r"\[Errno .*other'"), atomic_file(tmp_path / "a"):
        raise refusal(code, "other")  # another file, which the block reads


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(OSError, match="a cannot be written: File too large; raise the limit"):
            write_text(tmp_path / "a", "é" * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    write_text(tmp_path / "a", "é" * 20)
    assert read_text(tmp_path / "a") == "é" * 20


def test_a_folder_that_files_cannot_be_made_in(tmp_path, monkeypatch):
    def refuse(path, *mode):
        raise refusal(errno.EROFS, str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match="a cannot be written: Read-only file system; make it writable again"):
        write_text(tmp_path / "a", "text")


def text_calls(file: Path) -> list[ast.Call]:
    """Calls that read or write text: read_text and write_text of a path, and open without "b" in its mode."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        is_text = not any("b" in mode for mode in modes)
        if isinstance(node.func, ast.Name):
            opens = node.func.id == "open" and is_text
        else:
            name, owner = getattr(node.func, "attr", ""), ast.unparse(node.func).split(".")[0]
            opens = name in ("read_text", "write_text") or (name == "open" and owner != "av" and modes and is_text)
        if opens:
            found.append(node)
    return found


def test_text_files_are_utf8_whatever_the_locale():
    """Who names no encoding leaves it to the locale."""
    unspecified = []
    for file in SOURCES:
        for call in text_calls(file):
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            if not any(isinstance(value, ast.Constant) and value.value == "utf-8" for value in given):
                unspecified.append(f"{file.relative_to(ROOT)}, line {call.lineno}")
    assert not unspecified, "say utf-8, or use wallx_jax.utils.files"


def test_small_files_are_read_in_one_place():
    """json.loads of a file's text names no file: `files.read_json_object` does."""
    elsewhere = []
    for file in set(SOURCES) - {ROOT / "scripts" / "bench" / "torch_reference.py"}:  # runs without our package
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            call = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if call.startswith(("json.load", "yaml.load")) and ("read_text" in call and "read_text(path)" not in call):
                elsewhere.append(f"{file.relative_to(ROOT)}, line {node.lineno}")
    assert not elsewhere


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_device_is_written_not_replaced():
    with pytest.raises(OSError, match="^/dev/full cannot be written: No space left on device$"):
        write_text(Path("/dev/full"), "text")
    assert Path("/dev/full").is_char_device()
    write_text(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
