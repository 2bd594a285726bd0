"""Files and directories that appear whole or not at all, and small files whose damage is named."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs"  # a clone without Git LFS holds these few lines in place of the file


def is_lfs_pointer(path: Path) -> bool:
    """Tells whether a file is the stub that Git LFS leaves until the content is fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. A byte order mark is skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is empty, cut off, a Git LFS pointer or no JSON object.
    """
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty; copy it again")
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file; fetch it with `git lfs pull`")
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON (line {error.lineno}: {error.msg}); copy it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); copy it again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not sound JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {_JSON_TYPES[type(content)]}; expected an object")
    return content


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there more than once")
    return content


_JSON_TYPES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """`with atomic_file(path) as file:` writes bytes that appear at `path` only when the block has succeeded."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes its files private
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """`with new_directory(path) as partial:` makes a directory at `partial`, which becomes `path` when the block has
    succeeded. An exception removes it; what a killed process left goes when the same path is written again.

    Raises:
        FileExistsError: there is something at `path` already, other than an empty directory.
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; choose another output, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():
        logger.warning("removing %s, left by an interrupted run", partial)
        shutil.rmtree(partial)
    try:
        yield partial
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Waits until a file, or the list of a directory's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
